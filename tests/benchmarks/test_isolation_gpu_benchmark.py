"""The measurements on a GPU: with a simulated card in its place; their arithmetic; and what they refuse."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from worker_engines import LINUX

from benchmarks import isolation_gpu
from benchmarks.isolation_gpu import BEFORE, GB, LOADED, MB, OFFLOADED, RELEASED, Card, Findings, goals
from gpu_manager import CudaDevice, SimulatedDevice
from residency.devices.card_probes import NvmlProbe, TorchProbe

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = Card(frozenset({7}), 100 * MB)
GOOD = Findings(
    8 * GB,
    {BEFORE: CLEAN, LOADED: Card(frozenset({7, 8}), 17 * GB), OFFLOADED: Card(frozenset(), 102 * MB), RELEASED: CLEAN},
    1.2, 0.9 * GB, 1.0 * GB, {0.5},
)  # fmt: skip


def verdicts(found: Findings) -> list[str]:
    return [goal.verdict for goal in goals(found)]


def test_what_is_as_before_or_fast_enough_is_reached() -> None:
    assert verdicts(GOOD) == ["yes"] * 7


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"steps": {**GOOD.steps, OFFLOADED: Card(frozenset({7, 8}), 100 * MB)}}, 0),
        ({"steps": {**GOOD.steps, OFFLOADED: Card(frozenset({7}), 103 * MB)}}, 1),
        ({"steps": {**GOOD.steps, RELEASED: Card(frozenset({7, 8}), 100 * MB)}}, 2),
        ({"steps": {**GOOD.steps, RELEASED: Card(frozenset({7}), 500 * MB)}}, 3),
        ({"return_s": 1.21}, 4),
        ({"copy_bytes_per_s": 0.89 * GB}, 5),
        ({"answers": {0.5, 0.6}}, 6),
    ],
)
def test_each_goal_can_be_missed(changes: dict[str, object], missed: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = replace(GOOD, **changes)  # type: ignore[arg-type]
    assert [number for number, verdict in enumerate(verdicts(found)) if verdict == "no"] == [missed]
    assert not isolation_gpu.report(found)
    assert capsys.readouterr().out.count("  no\n") == 1


def test_a_driver_that_shows_nothing_shows_no_success() -> None:
    found = replace(GOOD, steps={**GOOD.steps, LOADED: CLEAN})
    assert verdicts(found)[:4] == ["not shown by the driver"] * 4


def test_a_larger_model_has_more_time_and_a_smaller_one_no_goal() -> None:
    assert verdicts(replace(GOOD, nbytes=16 * GB, return_s=2.4))[4] == "yes"
    assert verdicts(replace(GOOD, nbytes=16 * GB, return_s=2.5))[4] == "no"
    assert verdicts(replace(GOOD, nbytes=GB))[4] == "needs --gb 8"


@LINUX
def test_all_steps_run_on_a_simulated_card(capsys: pytest.CaptureFixture[str]) -> None:
    card = SimulatedDevice(GB, context_bytes=100 * MB)

    def look() -> Card:
        held = {pid: nbytes for pid, nbytes in card.held_by().items() if nbytes}  # type: ignore[union-attr]
        return Card(frozenset(held), sum(held.values()))

    found = isolation_gpu.measured(card, look, 64 * MB, 1)
    used = {step: (len(seen.pids), seen.used_bytes // MB) for step, seen in found.steps.items()}
    assert used == {
        BEFORE: (0, 0), LOADED: (1, 164), "used": (1, 164), OFFLOADED: (0, 0), "restored": (1, 164),
        "offloaded and checkpointed, again": (0, 0), RELEASED: (0, 0),
    }  # fmt: skip
    isolation_gpu.report(found)
    printed = capsys.readouterr().out
    assert all(f"{step} " in printed for step in found.steps)
    assert verdicts(found)[:4] == ["yes"] * 4
    assert verdicts(found)[6] == "yes"


# -- what cannot be measured --------------------------------------------------------------------------------------


def test_a_machine_without_nvidia_driver_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "isolation_gpu.py"], capture_output=True, text=True, timeout=100,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert not done.stdout
    assert "isolation_gpu.py: error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_each_refusal_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def said() -> str:
        found = isolation_gpu.obstacle()
        assert found is not None
        return found

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    assert "NVML finds no NVIDIA driver" in said()
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54.15")
    assert "550.54.15 makes no checkpoints. Install driver 570" in said()
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.86.10")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support" / "fake_cuda_core"))
    monkeypatch.setattr(CudaDevice, "find", lambda: None)
    assert "torch finds no NVIDIA GPU" in said()
    monkeypatch.setattr(CudaDevice, "find", lambda: CudaDevice("a card", TorchProbe()))
    assert "NVML does not report the GPU" in said()
    monkeypatch.setattr(CudaDevice, "find", lambda: CudaDevice("a card", NvmlProbe(None, "a card")))
    assert isolation_gpu.obstacle() is None
