"""The pins of the stand-alone app and the ranges of the package speak of the same things."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).resolve().parents[2]


def _lines(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


def _ranges() -> dict[str, Requirement]:
    """Of the package and of the extras that the app installs, but for those that name other extras of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {pin.name for pin in _lines("requirements.txt")}
    for extra in ("checkpoint", "ray"):  # not of the app
        assert not {Requirement(line).name for line in extras.pop(extra)} & pinned
    lines = [*project["dependencies"], *itertools.chain(*extras.values())]
    ranges: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            assert ranges.setdefault(requirement.name, requirement) == requirement, "one range for all extras"
    return ranges


@pytest.mark.parametrize("pin", _lines("requirements.txt") + _lines("requirements-dev.txt"), ids=str)
def test_pins_are_exact(pin: Requirement) -> None:
    assert [part.operator for part in pin.specifier] == ["=="]


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = _lines("requirements.txt")
    ranges = _ranges()
    assert {pin.name for pin in pins} == set(ranges)
    for pin in pins:
        (part,) = pin.specifier
        assert ranges[pin.name].specifier.contains(part.version), f"{pin} is outside {ranges[pin.name]}"
