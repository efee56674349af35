"""A module that another thread is still importing counts as not imported."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from residency.devices.card_probes import TorchProbe
from residency.imports import imported
from residency.random_state import RandomState, preserved_random_state


@pytest.fixture
def half_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and numpy as other threads see them during the import: without most of their names."""
    for name in ("torch", "numpy"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__spec__._initializing = True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def test_a_module_counts_as_imported_once_its_import_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert imported("torch") is torch
    monkeypatch.delitem(sys.modules, "torch")
    assert imported("torch") is None


@pytest.mark.usefixtures("half_imported")
def test_random_states_and_the_card_are_read_while_torch_is_being_imported() -> None:
    assert imported("torch") is imported("numpy") is None
    with preserved_random_state():
        assert not RandomState().differs_from(RandomState())
    assert TorchProbe().memory().total_bytes is None
