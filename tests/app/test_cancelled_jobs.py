"""``job.cancel()`` of ``gradio_client`` ends what waits, and what runs with its next step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from app_process import ForkedApp, RunningApp, wait_until
from gated_engine import close_gate, open_gate
from gradio_client import Client, handle_file
from recordings import write_tone

MANAGED = ("--enable-gpu-management", "--simulate-gpu", "48GB")


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


@pytest.fixture(params=[MANAGED, ()], ids=["managed", "bare"])
def app(request: Any, tmp_path: Path, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path / "recordings", *request.param, gates=gates) as app:
        yield app


def test_what_is_cancelled_is_not_computed(app: RunningApp, gates: Path, tmp_path: Path) -> None:
    recording = write_tone(tmp_path / "prompt.wav")
    clients = [Client(app.url, verbose=False) for _ in range(3)]

    def ask(who: int, target: str) -> Any:
        return clients[who].submit(handle_file(recording), "said", target, api_name="/clone")

    close_gate(gates, "speak")
    running = ask(0, "runs")
    app.wait_for_line("at the gate: speak")
    waiting = ask(1, "waits")
    assert wait_until(lambda: "you are next" in str(waiting.status().progress_data))
    last = ask(2, "last")
    assert wait_until(lambda: "place 2" in str(last.status().progress_data))
    waiting.cancel()
    assert wait_until(lambda: "you are next" in str(last.status().progress_data)), "its place is free at once"
    running.cancel()
    open_gate(gates, "speak")
    assert soundfile.info(last.result(60)).duration == 1
    assert "spoken: said last" in app.log
    assert "runs" not in app.log
    assert "waits" not in app.log
    assert "Traceback" not in app.log
    assert "never retrieved" not in app.log
