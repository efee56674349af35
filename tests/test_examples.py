"""The examples name metrics and calls that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.contracts import Telemetry
from residency.web.metrics import exposition

EXAMPLES = Path(__file__).parent.parent / "examples"


class Card(SimulatedDevice):
    def telemetry(self) -> Telemetry:
        return Telemetry(0, 60.0)


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """The labels of each metric of an app that has been used."""
    with GPUResourceManager(Card(1 << 30)) as manager:
        manager.register("tts", lambda: [])
        with manager.lease("tts"):
            pass
        families = text_string_to_metric_families(exposition(manager).decode())
        return {sample.name: set(sample.labels) | {"instance"} for family in families for sample in family.samples}


def used(text: str) -> set[str]:
    return set(re.findall(r"gpu_manager_\w+", text))


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-rules.yml"])
def test_every_metric_that_is_asked_for_is_there(metrics: dict[str, set[str]], name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert used(text)
    assert used(text) <= set(metrics)
    for metric, labels in re.findall(r"(gpu_manager_\w+)\{([^}]*)\}", text):
        assert set(re.findall(r"(\w+)=", labels)) <= metrics[metric], metric


def test_a_busy_instance_does_not_hide_an_idle_one() -> None:
    text = (EXAMPLES / "prometheus-rules.yml").read_text(encoding="utf-8")
    for labels in re.findall(r"\b(?:on|by) \(([^)]*)\)", text):
        assert "instance" in labels


def test_the_dashboard_is_one_and_its_panels_do_not_overlap() -> None:
    board: Any = json.loads((EXAMPLES / "grafana-dashboard.json").read_text(encoding="utf-8"))
    cells = [
        (x, y)
        for panel in board["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {variable["name"] for variable in board["templating"]["list"]} == {"source", "instance"}


def test_the_scrape_asks_where_the_metrics_are() -> None:
    text = (EXAMPLES / "prometheus.yml").read_text(encoding="utf-8")
    assert "metrics_path: /metrics" in text
    assert (EXAMPLES / re.findall(r"- (\S+rules\.yml)", text)[0]).is_file()
