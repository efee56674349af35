"""Memory that the books do not know is shown, with the process that holds it."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.devices import host_probes
from residency.observability.outside_memory import NO_SAMPLE, MemorySample, OutsideTracker, ProcessMemory
from residency.web.api.metrics import exposition
from residency.web.shared.language import en, zh
from residency.web.ui import status_text

MB = 1 << 20
CHILD = "block = bytearray(b'x') * (120 << 20); print('ready', flush=True); input()"


class Plain:
    """An engine in which nothing can move."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


@pytest.fixture
def manager() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        yield manager


def tts(manager: GPUResourceManager) -> dict[str, Any]:
    return manager.status()["models"]["tts"]


@pytest.mark.in_process("measures this process and its children")
def test_a_child_process_is_shown_until_it_ends(manager: GPUResourceManager, caplog: pytest.LogCaptureFixture) -> None:
    begun: list[subprocess.Popen[str]] = []

    def load() -> Plain:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        begun.append(child)
        return Plain(pid=child.pid)

    manager.register("tts", load)
    try:
        with manager.lease("tts"):
            pass
        assert manager.offload("tts")
        model = tts(manager)
        assert model["outside_bytes"] >= 120 * MB
        assert begun[0].pid in [holder["pid"] for holder in model["outside_processes"]]
        assert f"pid {begun[0].pid}" in status_text.as_text(manager.status(), en)
        assert "未受管理的内存" in status_text.as_text(manager.status(), zh)
        assert b'gpu_manager_outside_bytes{model="tts"} 1' in exposition(manager)
        assert len([r for r in caplog.records if "of unmanaged memory" in r.getMessage()]) == 1
    finally:
        for child in begun:
            child.communicate("\n", timeout=60)
    manager.release("tts")
    assert tts(manager)["outside_processes"] == []


@pytest.mark.in_process("measures this process and its children")
def test_a_child_that_ends_by_itself_is_shown_no_longer(manager: GPUResourceManager) -> None:
    begun: list[subprocess.Popen[str]] = []

    def load() -> Plain:
        begun.append(subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      text=True))  # fmt: skip
        assert begun[0].stdout is not None
        begun[0].stdout.readline()
        return Plain()

    manager.register("tts", load)
    with manager.lease("tts"):
        pass
    manager.offload("tts")
    assert tts(manager)["outside_processes"]
    begun[0].communicate("\n", timeout=60)
    manager._overview._remeasured_s = -1.0
    assert tts(manager)["outside_processes"] == []
    assert tts(manager)["outside_bytes"] == 0


@pytest.mark.parametrize("extra_mb", [0, 200])
@pytest.mark.in_process("measures this process and its children")
def test_a_skeleton_that_holds_more_than_its_weights_is_released_the_normal_way(extra_mb: int, tmp_path: Path) -> None:
    loads = []

    def load() -> Plain:
        loads.append(1)
        return Plain(table=np.ones(extra_mb * MB, np.uint8), weight=torch.ones(1000))

    with GPUResourceManager(SimulatedDevice(1 << 30), snapshot_dir=tmp_path) as manager:
        manager.register("tts", load)
        for _ in range(2):
            with manager.lease("tts") as engine:
                assert engine.weight.sum() == 1000
            del engine
            manager.release("tts")
            assert tts(manager)["state"] == "released"
            assert tts(manager)["outside_bytes"] == 0
    assert len(loads) == (2 if extra_mb else 1)


@pytest.mark.in_process("measures this process and its children")
def test_an_array_that_a_request_has_made_is_shown_after_it(manager: GPUResourceManager) -> None:
    manager.register("tts", Plain)
    with manager.lease("tts") as engine:
        engine.tables = {"view": np.ones(200 * MB, np.uint8)[10:]}
    manager.release("tts")
    assert tts(manager)["outside_bytes"] == 0
    with manager.lease("tts") as engine:
        engine.weight = torch.ones(10)
        engine.tables = {"view": np.ones(200 * MB, np.uint8)[10:], "of_a_tensor": torch.ones(1 << 25).numpy()}
    manager.offload("tts")
    assert tts(manager)["outside_bytes"] == 200 * MB


@pytest.mark.in_process("measures this process and its children")
def test_native_memory_is_shown(manager: GPUResourceManager) -> None:
    def load() -> Plain:
        block = mmap.mmap(-1, 400 * MB)
        block.write(b"x" * (400 * MB))
        return Plain(block=block)

    manager.register("tts", load)
    with manager.lease("tts"):
        pass
    manager.offload("tts")
    assert tts(manager)["outside_bytes"] >= 390 * MB


@pytest.mark.in_process("measures this process and its children")
def test_a_big_array_is_shown_and_goes_with_a_release(manager: GPUResourceManager) -> None:
    manager.register("tts", lambda: Plain(table=np.ones(200 * MB, np.uint8)))
    with manager.lease("tts"):
        pass
    assert manager.offload("tts")
    assert tts(manager)["outside_bytes"] >= 190 * MB
    assert [holder["pid"] for holder in tts(manager)["outside_processes"]] == [os.getpid()]
    manager.release("tts")
    assert tts(manager)["outside_bytes"] == 0


def test_nothing_found_to_move_is_said_once(manager: GPUResourceManager, caplog: pytest.LogCaptureFixture) -> None:
    manager.register("tts", Plain)
    for _ in range(2):
        with caplog.at_level(logging.WARNING), manager.lease("tts"):
            pass
        manager.release("tts")
    told = [record.getMessage() for record in caplog.records if "nothing was found" in record.getMessage()]
    assert len(told) == 1
    assert "没有可以移动" in told[0]


def sample(host: int | None, device: int | None = 0, children: tuple[ProcessMemory, ...] | None = ()) -> MemorySample:
    return MemorySample(ProcessMemory(1, 0.0, "app", host, device), children, 0)


def test_what_overlapping_loads_have_grown_by_is_nobodys() -> None:
    books = OutsideTracker(cuda=False, separate_memory=True)
    books.began("a", sample(0), (0, 0), (0, 0))
    books.began("b", sample(0), (0, 0), (0, 0))
    both = frozenset({"a", "b"})
    for name in ("a", "b"):
        assert books.ended(name, name, sample(500 * MB), (0, 0), (0, 0), both).total_bytes == 0


def test_a_context_is_not_blamed_on_a_model() -> None:
    books = OutsideTracker(cuda=True, separate_memory=True)
    books.began("a", sample(0, 0), (0, 0), (0, 0))
    after = sample(400 * MB, 450 * MB + 100 * MB)
    assert books.ended("a", "a", after, (100 * MB, 0), (100 * MB, 0), frozenset({"a"})).total_bytes == 0


def test_a_load_that_was_given_up_is_not_waited_for() -> None:
    books = OutsideTracker(cuda=False, separate_memory=True)
    books.began("hangs", sample(0), (0, 0), (0, 0), loads=True)
    books.given_up("hangs")
    books.began("b", sample(0), (0, 0), (0, 0), loads=True)
    assert books.ended("b", "b", sample(500 * MB), (0, 0), (0, 0), frozenset({"b"})).total_bytes == 500 * MB
    assert books.ended("hangs", "a", sample(900 * MB), (0, 0), (0, 0), frozenset({"a", "b"})).total_bytes is None


@pytest.mark.parametrize("unknown", [NO_SAMPLE, sample(0, None), sample(None), sample(0, 0, None)])
def test_what_cannot_be_measured_is_unknown_and_not_nothing(unknown: MemorySample) -> None:
    books = OutsideTracker(cuda=True, separate_memory=True)
    books.began("a", unknown, (0, 0), (0, 0))
    assert books.ended("a", "a", unknown, (0, 0), (0, 0), frozenset({"a"})).total_bytes is None


@pytest.mark.in_process("measures this process and its children")
def test_the_simulated_card_counts_what_it_is_told() -> None:
    device = SimulatedDevice(1 << 30)
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: device.report_outside(os.getpid(), 300 * MB) or Plain())
        with manager.lease("tts"):
            pass
        assert tts(manager)["outside_processes"][0]["device_bytes"] == 300 * MB
        assert device.memory().free_bytes == (1 << 30) - 300 * MB
        assert manager.status()["device"]["outside_bytes"] == 300 * MB
        assert b"gpu_manager_gpu_outside_bytes 3.145728e+08" in exposition(manager)
        device.report_outside(os.getpid(), 0)
        manager.release("tts")
        assert tts(manager)["outside_bytes"] == 0
        assert manager.status()["device"]["outside_bytes"] == 0


@pytest.mark.in_process("measures this process and its children")
def test_memory_of_the_device_that_a_request_takes_is_shown_after_it_until_it_goes() -> None:
    device = SimulatedDevice(1 << 30)
    with GPUResourceManager(device) as manager:
        manager.register("tts", lambda: Plain(weight=torch.ones(1000)))
        for held_mb in (0, 300, 300, 20, 200, 0):
            with manager.lease("tts"):
                device.report_outside(os.getpid(), held_mb * MB)
            manager.offload("tts")
            assert tts(manager)["outside_bytes"] == (held_mb * MB if held_mb > 20 else 0)
        with manager.lease("tts"):
            device.report_outside(os.getpid(), 300 * MB)
        manager.release("tts")
        assert tts(manager)["outside_bytes"] == 0
        with manager.lease("tts"):
            pass
        assert tts(manager)["outside_bytes"] == 0, "it was there before this engine"


def test_main_memory_that_the_program_takes_in_a_request_is_not_the_engines(manager: GPUResourceManager) -> None:
    manager.register("tts", lambda: Plain(weight=torch.ones(1000)))
    results = []
    for _ in range(3):
        with manager.lease("tts"):
            results.append(b"x" * (200 * MB))
        manager.offload("tts")
        assert tts(manager)["outside_bytes"] == 0


def moved(books: OutsideTracker, model: str, before: int, after: int, held: tuple[int, int], loaded: str) -> int:
    """A move by which the model's books of the card go from ``held[0]`` to ``held[1]``; sizes in MB."""
    books.began(model, sample(0, before * MB), (held[0] * MB, 0), (held[0] * MB, 0))
    end = sample(0, after * MB)
    after = (held[1] * MB, 0)
    total = books.ended(model, model, end, after, after, frozenset(loaded.split()), arrived=held[1] > 0).total_bytes
    assert total is not None
    return total // MB


def test_what_others_may_have_taken_between_two_moves_is_nobodys() -> None:
    books = OutsideTracker(cuda=False, separate_memory=True)
    assert moved(books, "a", 0, 100, (0, 100), loaded="a b") == 0
    assert moved(books, "a", 500, 400, (100, 0), loaded="a b") == 0
    assert moved(books, "a", 700, 800, (0, 100), loaded="a") == 0, "it was away meanwhile"
    assert moved(books, "b", 1000, 1100, (0, 100), loaded="a b") == 0
    assert moved(books, "a", 1300, 1200, (100, 0), loaded="a") == 0


def test_what_cuda_takes_for_itself_in_a_request_is_not_blamed_on_the_model() -> None:
    books = OutsideTracker(cuda=True, separate_memory=True)
    assert moved(books, "a", 0, 400, (0, 100), loaded="a") == 0
    assert moved(books, "a", 550, 450, (100, 0), loaded="a") == 0  # libraries and workspaces of the first request
    assert moved(books, "a", 450, 550, (0, 100), loaded="a") == 0
    assert moved(books, "a", 950, 850, (100, 0), loaded="a") == 850 - 512


@pytest.mark.in_process("measures this process and its children")
def test_the_totals_are_those_of_all_models(manager: GPUResourceManager) -> None:
    for name, megabytes in (("tts", 200), ("asr", 100)):
        manager.register(name, lambda megabytes=megabytes: Plain(table=np.ones(megabytes * MB, np.uint8)))
        with manager.lease(name):
            pass
    status = manager.status()
    assert (status["device"]["outside_bytes"], status["host"]["outside_bytes"]) == (0, 300 * MB)
    assert b"gpu_manager_host_outside_bytes 3.145728e+08" in exposition(manager)


@pytest.mark.in_process("measures this process and its children")
def test_an_error_of_psutil_is_no_error_of_a_move(manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> Any:
        raise host_probes.psutil.AccessDenied

    monkeypatch.setattr(host_probes.psutil.Process, "children", fail)
    manager.register("tts", Plain)
    with manager.lease("tts"):
        pass
    status = manager.status()
    assert status["models"]["tts"]["outside_bytes"] is None
    assert (status["device"]["outside_bytes"], status["host"]["outside_bytes"]) == (None, None)
    assert b"outside_bytes" not in exposition(manager).replace(b"gpu_manager_outside_bytes", b"")


def outside_of_worker(books: OutsideTracker, held: int | None, device: int, host: int, modules: int = 0) -> int | None:
    """The unmanaged memory, in MB, of a worker process with that much main memory."""
    worker = ProcessMemory(7, 0.0, "worker process", None if held is None else held * MB, 900 * MB)
    found = books.of_worker(worker, (device * MB, host * MB), modules)
    assert {each.pid for each in found.holders} <= {7}
    assert all(each.device_bytes == 0 for each in found.holders)
    return None if found.total_bytes is None else found.total_bytes // MB


def test_a_worker_process_has_its_mirror_its_modules_and_the_libraries_of_cuda() -> None:
    books = OutsideTracker(cuda=True, separate_memory=True)
    assert outside_of_worker(books, 12_000 + 512 + 160, 0, 12_000, modules=1024) == 0
    assert outside_of_worker(books, 1512, 12_000, 0) == 1000, "what is on the device is not in main memory"
    assert outside_of_worker(books, 12_000 + 512 + 500, 0, 12_000) == 0, "less than 5 %"
    assert outside_of_worker(books, None, 0, 0) is None
    simulated = OutsideTracker(cuda=False, separate_memory=False)
    assert outside_of_worker(simulated, 1300, 1000, 0) == 300
    assert outside_of_worker(simulated, 1255, 1000, 0) == 0


def test_where_each_engine_has_a_process_the_managers_own_memory_belongs_to_none() -> None:
    books = OutsideTracker(cuda=False, separate_memory=True, isolated=True)
    assert moved(books, "a", 0, 900, (0, 100), loaded="a") == 0
