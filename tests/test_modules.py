from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fakes import Gate, Worker

from residency.devices.card_probes import TorchProbe
from residency.devices.cuda import _in_use
from residency.modules import imported
from residency.random_state import RandomState


def test_a_module_counts_once_its_import_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch.py").write_text("import gate_of_test\ngate_of_test.pass_through()\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "gate_of_test", gate)
    monkeypatch.delitem(sys.modules, torch.__name__)
    importing = Worker(__import__, "torch")
    gate.wait_for_arrival()
    try:
        assert "torch" in sys.modules
        assert imported("torch") is None
        assert not _in_use()
        assert TorchProbe().memory().total_bytes is None
        RandomState().put_back()
    finally:
        gate.open()
    assert importing.result() is imported("torch") is not None
    monkeypatch.delitem(sys.modules, "torch")
    assert imported("torch") is None
