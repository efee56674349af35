"""A full card is when others need the room most: what leaves it needs none, and what comes and fails harms nothing.

The card fills up at every step of every move: torch gets room for one more segment each time, until the move has not
run out of it. To torch that is a ``cudaMalloc`` that fails, one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from engine_strategies import small_layout
from gpu_memory import MB, Leave, all_equal, random_bytes

from gpu_manager import CudaDevice, DeviceOutOfMemory, GPUResourceManager
from residency.memory import EngineResident, SnapshotFolder, checksum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that torch can use through CUDA")


class Engine:
    """Small tensors, large ones of odd sizes, a view, and one value all over."""

    def __init__(self) -> None:
        self.small = [random_bytes(1000 + number) for number in range(30)]
        self.large = [random_bytes(3 * MB + 3), random_bytes(9 * MB)]
        self.view = self.large[1][10:20]
        self.zeros = torch.zeros(MB, device="cuda")
        self.late: list[torch.Tensor] = []

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        all_of_them = [*self.small, *self.large, self.view, self.zeros, *self.late]
        return {str(number): tensor for number, tensor in enumerate(all_of_them)}

    def copies(self) -> list[torch.Tensor]:
        return [tensor.cpu() for tensor in self.tensors.values()]


class FillingUp:
    """A card on which a block of code has room for nothing, then for 2 MB, 4 MB and so on, until that was enough."""

    def __init__(self, leave: Leave) -> None:
        self._leave = leave
        self.failed = False
        self.room = 0

    def __iter__(self) -> Iterator[FillingUp]:
        for self.room in range(0, 200 * MB, 2 * MB):
            yield self
            if not self.failed:
                return
        raise AssertionError("it never has room enough")

    def __enter__(self) -> None:
        self._leave(self.room)
        self._before = self._failures()

    def __exit__(self, *_: object) -> None:
        self.failed = self._failures() > self._before
        self._leave(None)

    @staticmethod
    def _failures() -> int:
        return int(torch.cuda.memory_stats()["num_ooms"])


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that the scratch space for comparing weights is small, and filled up to in few steps."""
    monkeypatch.setattr(checksum, "SPAN_BYTES", MB)
    with small_layout(MB, 4 * MB):
        yield


@pytest.fixture
def filling_up(leave: Leave) -> FillingUp:
    return FillingUp(leave)


@pytest.fixture
def held(device: CudaDevice) -> Callable[[], tuple[int, int]]:
    """What torch has allocated and reserved beyond what there was when the test began."""
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def now() -> tuple[int, int]:
        gc.collect()
        device.settle()
        return torch.cuda.memory_allocated() - before[0], torch.cuda.memory_reserved() - before[1]

    return now


Held = Callable[[], tuple[int, int]]
Change = Callable[[Engine], None]


def nothing(engine: Engine) -> None: ...


def weights(engine: Engine) -> None:
    engine.small[7][3] ^= 1
    engine.large[1][8 * MB + 5] ^= 1


def a_constant(engine: Engine) -> None:
    engine.zeros[5] += 1


def latecomers(engine: Engine) -> None:
    engine.late.append(random_bytes(5 * MB))


@pytest.mark.parametrize(
    ("first", "change"),
    [(True, nothing), (False, nothing), (False, weights), (False, a_constant), (False, latecomers)],
)
def test_what_leaves_a_full_card_needs_no_room_and_keeps_its_bytes(
    first: bool, change: Change, device: CudaDevice, filling_up: FillingUp, held: Held
) -> None:
    for card in filling_up:
        engine = Engine()
        resident = EngineResident(engine, device)
        if not first:
            resident.offload()
            resident.restore()
        change(engine)
        before = engine.copies()
        with card:
            resident.offload()
        assert (resident.device_bytes, held()) == (0, (0, 0))
        assert resident.host_bytes > 12 * MB
        for _ in range(2):  # there, and from a mirror that is compared again
            resident.restore()
            assert all_equal(engine.tensors, before)
            resident.offload()
        resident.release()
        assert (resident.device_bytes, resident.host_bytes) == (0, 0)


def test_what_cannot_come_back_stays_whole_where_it_is(device: CudaDevice, filling_up: FillingUp, held: Held) -> None:
    engine = Engine()
    resident = EngineResident(engine, device)
    before, nbytes = engine.copies(), resident.device_bytes
    resident.offload()
    host_bytes = resident.host_bytes
    failures = 0
    for card in filling_up:
        with card, suppress(DeviceOutOfMemory):
            resident.restore()
        if not resident.device_bytes:
            failures += 1
            assert (resident.device_bytes, resident.host_bytes, held()) == (0, host_bytes, (0, 0))
            resident.restore()
        assert resident.device_bytes == nbytes
        assert all_equal(engine.tensors, before)
        resident.offload()
    assert failures > 5
    resident.release()


def test_what_is_released_or_saved_on_a_full_card_leaves_it(
    device: CudaDevice, filling_up: FillingUp, held: Held, tmp_path: Path
) -> None:
    store = SnapshotFolder(tmp_path)
    for card in filling_up:
        engine = Engine()
        resident = EngineResident(engine, device)
        before = engine.copies()
        with card:
            resident.save(store, "m")
        assert (resident.device_bytes, resident.host_bytes, held()) == (0, 0, (0, 0))
        resident.load(store, "m")
        resident.restore()
        assert all_equal(engine.tensors, before)
        with card:
            resident.release()
        assert (resident.device_bytes, resident.host_bytes, held()) == (0, 0, (0, 0))


def test_a_load_that_fails_at_any_step_leaves_nothing(device: CudaDevice, filling_up: FillingUp, held: Held) -> None:
    with GPUResourceManager(device) as manager:
        manager.register("m", Engine)
        for card in filling_up:
            with card, suppress(Exception), manager.lease("m"):
                pass
            manager.release("m")
            assert (manager.status()["models"]["m"]["device_bytes"], held()) == (0, (0, 0))
        with manager.lease("m") as engine:
            assert len(engine.copies()) == 34
        del engine


@pytest.mark.parametrize("snapshots", [False, True])
def test_an_idle_model_leaves_a_full_card_for_main_memory_and_comes_back_when_there_is_room(
    snapshots: bool, device: CudaDevice, filling_up: FillingUp, tmp_path: Path
) -> None:
    loads: list[Engine] = []

    def load() -> Engine:
        loads.append(Engine())
        return loads[-1]

    with GPUResourceManager(device, snapshot_dir=tmp_path if snapshots else None) as manager:
        manager.register("m", load, keep_warm=3600)
        with manager.lease("m") as engine:
            before = engine.copies()
        for card in filling_up:
            with card:
                manager.offload("m")
            assert manager.status()["models"]["m"]["state"] == "cpu"
            if snapshots:
                manager.release("m")
            came = False
            with card, suppress(DeviceOutOfMemory), manager.lease("m"):
                came = True
            assert manager.status()["models"]["m"]["state"] == ("gpu" if came else "released" if snapshots else "cpu")
            with manager.lease("m") as again:
                assert again is engine
                assert all_equal(engine.tensors, before)
        assert len(loads) == 1
        del engine, again
        loads.clear()
