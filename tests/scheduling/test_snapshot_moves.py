"""Release into a snapshot and back, through the manager, with real weights on a simulated card."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_strategies import bytes_of
from fakes import running

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, SimulatedDevice
from residency.clock import ManualClock
from residency.memory import EngineResident, weights_mirror
from residency.scheduling import mover
from residency.states import State


class Voice(torch.nn.Module):
    """Speaks a number that depends on every bit of its weights; has a tie, a cache and a field of zeros."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            for parameter in self.embed.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.head.weight = self.embed.weight
        self.register_buffer("zeros", torch.zeros(1 << 19), persistent=False)
        self.table = {"half": torch.randn(100, generator=generator).to(torch.bfloat16)}

    def speak(self) -> bytes:
        x = torch.linspace(-1, 1, 64)
        spoken = self.head(self.embed(x)).sum() + self.zeros.sum() + self.table["half"].float().sum()
        return bytes_of(spoken.detach().clone()) + bytes_of(self.embed.weight) + bytes_of(self.table["half"])


WRITTEN_BYTES = (64 * 64 + 64) * 4 + 200
ALL_BYTES = WRITTEN_BYTES + (2 << 20)


class Studio:
    """A manager over one voice, with snapshots; counts what its loader does."""

    def __init__(self, folder: Path, device: SimulatedDevice, clock: ManualClock, **settings: Any) -> None:
        self.folder, self.device, self.clock = folder, device, clock
        self.loads = 0
        self.manager = GPUResourceManager(device, snapshot_dir=folder, clock=clock, **settings)
        self.manager.register("tts", self.load)

    def load(self) -> Voice:
        self.loads += 1
        return Voice(0)

    def speak(self) -> bytes:
        with self.manager.lease("tts") as engine:
            return engine.speak()

    @property
    def status(self) -> dict[str, Any]:
        return self.manager.status()["models"]["tts"]

    @property
    def snapshot(self) -> Path:
        [path] = self.folder.glob("*.safetensors")
        return path


@pytest.fixture
def studio(tmp_path: Path, device: SimulatedDevice, clock: ManualClock) -> Iterator[Studio]:
    studio = Studio(tmp_path, device, clock)
    with studio.manager:
        yield studio


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_released_model_comes_back_from_its_snapshot_without_the_loader(studio: Studio) -> None:
    spoken = studio.speak()
    assert studio.manager.release("tts") is True
    assert studio.status["state"] == "released"
    assert (studio.status["device_bytes"], studio.status["host_bytes"]) == (0, 0)
    assert (studio.device.ledger_bytes, studio.device.pinned_bytes) == (0, 0)
    assert WRITTEN_BYTES <= studio.snapshot.stat().st_size < WRITTEN_BYTES + 8192, "zeros need no place on disk"
    for _ in range(3):
        assert studio.speak() == spoken
        studio.manager.release("tts")
    assert studio.loads == 1
    assert studio.status["last_error"] is None


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_the_idle_timeout_releases_into_a_snapshot(studio: Studio) -> None:
    spoken = studio.speak()
    studio.clock.advance(601)
    assert studio.manager.wait_for("tts", State.RELEASED, 10)
    assert studio.snapshot.exists()
    assert studio.speak() == spoken
    assert studio.loads == 1


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_the_move_back_tells_how_much_it_brought(studio: Studio) -> None:
    studio.speak()
    studio.manager.release("tts")
    with studio.manager.lease("tts"):
        assert studio.device.ledger_bytes == studio.status["device_bytes"] == ALL_BYTES
        assert studio.status["last_move"]["bytes"] == ALL_BYTES
        assert (studio.status["last_move"]["from"], studio.status["last_move"]["to"]) == ("released", "gpu")


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_what_changed_since_the_load_is_in_the_snapshot(studio: Studio) -> None:
    with studio.manager.lease("tts") as engine:
        engine.embed.weight.data[3, 5] += 1
        engine.zeros[77] = 1.0
        engine.table["made while speaking"] = torch.arange(10.0)
        changed = engine.speak()
    studio.manager.release("tts")
    assert studio.speak() == changed
    with studio.manager.lease("tts") as engine:
        assert engine.table["made while speaking"].tolist() == list(range(10))
        assert engine.head.weight is engine.embed.weight
    assert studio.loads == 1


@pytest.mark.parametrize("damage", ["flip", "header", "cut", "remove", "folder"])
@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_bad_snapshot_costs_one_warning_and_a_load(
    studio: Studio, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoken = studio.speak()
    studio.manager.release("tts")
    path = studio.snapshot
    content = bytearray(path.read_bytes())
    if damage in ("flip", "header"):
        content[-1 if damage == "flip" else 20] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        if damage == "folder":
            studio.folder.rmdir()
    caplog.clear()
    assert studio.speak() == spoken
    assert studio.loads == 2
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "loaded without its snapshot" in warnings[0].getMessage()
    assert studio.device.ledger_bytes == 0
    assert studio.status["host_bytes"] == WRITTEN_BYTES
    assert studio.speak() == spoken


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_full_disk_releases_the_normal_way(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spoken = studio.speak()
    monkeypatch.setattr(os, "fsync", full)
    assert studio.manager.release("tts") is True
    assert studio.status["state"] == "released"
    assert (studio.device.ledger_bytes, studio.status["host_bytes"]) == (0, 0)
    assert "No space left" in caplog.text
    assert list(studio.folder.iterdir()) == []
    assert studio.speak() == spoken
    assert studio.loads == 2


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_card_that_is_full_after_the_snapshot_was_read_leaves_the_model_released(studio: Studio) -> None:
    spoken = studio.speak()
    studio.manager.release("tts")
    others_bytes = studio.device.capacity_bytes - ALL_BYTES + 100
    studio.device.charge(others_bytes)
    for _ in range(2):
        with pytest.raises(DeviceOutOfMemory):
            studio.speak()
        assert studio.status["state"] == "released"
        assert (studio.status["device_bytes"], studio.status["host_bytes"]) == (0, 0)
        assert studio.device.ledger_bytes == others_bytes
        assert "DeviceOutOfMemory" in studio.status["last_error"]
    studio.device.refund(others_bytes)
    assert studio.speak() == spoken
    assert studio.loads == 1


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_after_close_nothing_is_left(tmp_path: Path, device: SimulatedDevice, clock: ManualClock) -> None:
    for last in ("gpu", "cpu", "released"):
        studio = Studio(tmp_path, device, clock, keep_warm=-1 if last == "gpu" else 0)
        studio.speak()
        studio.manager.release("tts")
        studio.speak()
        if last == "released":
            studio.manager.release("tts")
        assert studio.status["state"] == last
        studio.manager.close()
        assert (device.ledger_bytes, device.pinned_bytes, studio.status["host_bytes"]) == (0, 0, 0)
        assert not list(tmp_path.glob(".*"))
    deadline_s = time.monotonic() + 10  # a thread that was told to stop may still be on its way out
    while threads := running("gpu-", "snapshot-"):
        assert time.monotonic() < deadline_s, threads
        threading.Event().wait(0.01)


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_closing_writes_no_snapshot_that_nobody_can_read(studio: Studio) -> None:
    studio.speak()
    studio.manager.close()
    assert list(studio.folder.iterdir()) == []


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_release_that_has_no_memory_for_a_snapshot_is_done_without(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with studio.manager.lease("tts"):
        studio.manager.release("tts")

        def no_room(*_: object) -> None:
            raise MemoryError("no room in main memory")

        monkeypatch.setattr(weights_mirror, "HostMirror", no_room)
    assert studio.status["state"] == "released"
    assert studio.device.ledger_bytes == 0


def test_a_parameter_that_is_given_other_bytes_leaves_the_card_with_them(device: SimulatedDevice) -> None:
    engine = Voice(0)
    resident = EngineResident(engine, device)
    resident.offload()
    resident.restore()
    engine.embed.half()
    before = bytes_of(engine.embed.weight)
    resident.offload()
    assert engine.embed.weight.untyped_storage().nbytes() == 0
    resident.restore()
    assert bytes_of(engine.embed.weight) == before


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_two_models_in_one_folder_do_not_mix(studio: Studio) -> None:
    studio.manager.register("asr", lambda: Voice(1))
    spoken = studio.speak()
    with studio.manager.lease("asr") as engine:
        heard = engine.speak()
    assert heard != spoken
    assert studio.manager.release() is True
    assert len(list(studio.folder.glob("*.safetensors"))) == 2
    assert studio.speak() == spoken
    with studio.manager.lease("asr") as engine:
        assert engine.speak() == heard


def test_the_folder_is_the_managers_only_way_to_disk(tmp_path: Path, device: SimulatedDevice) -> None:
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: Voice(0))
        with manager.lease("tts"):
            pass
        manager.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_a_limit_too_small_for_two_models_costs_a_load_and_nothing_else(
    tmp_path: Path, device: SimulatedDevice, clock: ManualClock
) -> None:
    studio = Studio(tmp_path, device, clock, snapshot_limit_bytes=WRITTEN_BYTES + 8192)
    with studio.manager:
        studio.manager.register("asr", lambda: Voice(1))
        spoken = studio.speak()
        with studio.manager.lease("asr"):
            pass
        studio.manager.release("tts")
        studio.manager.release("asr")
        assert studio.snapshot.name.startswith("asr-")
        assert studio.speak() == spoken
        assert studio.loads == 2


@pytest.mark.in_process("with a worker process, the engine here is a proxy, and its memory ends with the process")
def test_a_released_engine_is_gone_at_once_without_a_garbage_collection_that_would_stop_all_threads(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: Voice(0))
        with manager.lease("tts") as engine:
            watched = weakref.ref(engine)
        del engine
        monkeypatch.setattr(mover.gc, "collect", lambda: pytest.fail("something still refers to the engine"))
        manager.release("tts")
        assert watched() is None
        monkeypatch.undo()


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.in_process("snapshots are refused with worker processes")
def test_what_a_kept_part_makes_while_it_works_outlives_a_release_with_it(
    device: SimulatedDevice, tmp_path: Path, snapshots: bool
) -> None:
    tokenizer = torch.nn.Linear(4, 4)
    with GPUResourceManager(device, snapshot_dir=tmp_path if snapshots else None) as manager:
        manager.register("tts", lambda: [tokenizer, Voice(0)], keep=tokenizer)
        for turn in range(4):
            with manager.lease("tts") as (kept, _):
                assert kept is tokenizer
                if turn:
                    assert kept.session.tolist() == [turn - 1] * 100
                kept.session = torch.full((100,), float(turn))
            if turn % 2:
                manager.release("tts")
            assert device.ledger_bytes == 0
