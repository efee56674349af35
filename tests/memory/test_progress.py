"""Residents report their progress during a move."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from residency.devices import SimulatedDevice
from residency.memory import SnapshotFolder, Weights
from residency.progress import Progress, current, reporting


class Watched(Progress):
    """Records every step; checks that no phase decreases or exceeds its total."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []
        super().__init__("begins")
        self.changed = self._look

    def _look(self) -> None:
        phase, done_bytes, total_bytes = self.facts
        assert total_bytes is None or 0 <= done_bytes <= total_bytes
        if self.steps and self.steps[-1][0] == phase and done_bytes:
            assert done_bytes >= self.steps[-1][1]
        self.steps.append(self.facts)

    @property
    def ends(self) -> dict[str, tuple[int, int | None]]:
        return {phase: (done_bytes, total_bytes) for phase, done_bytes, total_bytes in self.steps}


def tensors() -> dict[str, torch.Tensor]:
    large = torch.arange(5 << 20, dtype=torch.float32)
    return {
        "large": large,
        "view": large[100:200],
        "zeros": torch.zeros(1 << 20),
        **{f"small{number}": torch.randn(11) for number in range(300)},
    }


@pytest.fixture
def weights() -> Weights:
    return Weights(tensors(), SimulatedDevice(1 << 30))


def watched(move: object, *arguments: object) -> Watched:
    progress = Watched()
    with reporting(progress):
        move(*arguments)
    return progress


def test_moves_tell_of_every_byte_that_travels(weights: Weights) -> None:
    first = watched(weights.offload)
    travelling = (20 << 20) + 300 * 44  # constant storages are not copied; small ones are padded in the mirror
    done_bytes, total_bytes = first.ends["copying"]
    assert done_bytes == total_bytes
    assert travelling <= total_bytes < travelling + 300 * 64 + 8192
    assert first.ends["checking"] == (total_bytes, total_bytes)
    assert watched(weights.restore).ends == {"copying": (total_bytes, total_bytes)}
    assert watched(weights.offload).ends == {"checking": (total_bytes, total_bytes)}, "unchanged: nothing is copied"


def test_only_what_has_changed_is_copied_back() -> None:
    held = tensors()
    weights = Weights(held, SimulatedDevice(1 << 30))
    total_bytes = watched(weights.offload).ends["copying"][1]
    weights.restore()
    held["large"][0] = 5
    copied_bytes = watched(weights.offload).ends["copying"]
    assert 0 < copied_bytes[0] == copied_bytes[1] < total_bytes


def test_snapshots_tell_what_they_write_and_read(weights: Weights, tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    saved = watched(weights.save, folder, "tts")
    written_bytes, total_bytes = saved.ends["writing"]
    assert written_bytes == total_bytes > 20 << 20
    read = watched(weights.load, folder, "tts")
    done_bytes, total_bytes = read.ends["reading"]
    assert done_bytes == total_bytes > 20 << 20
    assert len(read.steps) > 3, "told piece by piece"
    again = watched(weights.restore), watched(weights.save, folder, "tts")
    assert "writing" not in again[1].ends, "it is on disk already"


def test_a_move_without_bytes_tells_of_none() -> None:
    weights = Weights({"zeros": torch.zeros(1 << 20)}, SimulatedDevice(1 << 30))
    assert watched(weights.offload).steps == []
    assert watched(weights.restore).steps == []


def test_outside_of_a_move_nobody_looks_and_nothing_breaks(weights: Weights) -> None:
    current().enter("anything", 5)
    current().advance(3)
    assert current().facts == ("idle", 0, None)
    weights.offload()
    weights.restore()


def test_a_progress_belongs_to_its_context() -> None:
    outer, inner = Progress("outer"), Progress("inner")
    with reporting(outer):
        with reporting(inner):
            assert current() is inner
        assert current() is outer
        seen: list[Progress] = []
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert seen[0] is not outer, "another thread is another move"


def test_advancing_adds_up_and_a_phase_begins_at_nothing() -> None:
    progress = Progress("loading", 10)
    assert progress.facts == ("loading", 0, 10)
    progress.advance(4)
    progress.advance(6)
    assert progress.facts == ("loading", 10, 10)
    progress.enter("copying")
    assert progress.facts == ("copying", 0, None)


def test_threads_lose_no_bytes() -> None:
    progress = Progress("reading", 80_000)
    threads = [threading.Thread(target=lambda: [progress.advance(1) for _ in range(10_000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.facts == ("reading", 80_000, 80_000)
