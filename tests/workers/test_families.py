"""Processes that workers start, and the end of the manager's process."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from app_process import wait_until
from worker_engines import LINUX, Family, Gate, await_threads, held, started

from gpu_manager import GPUResourceManager, SimulatedDevice, State
from residency.errors import ManagerClosed
from residency.memory.self_moving import orphans
from residency.workers import fork_server, spawner
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX

ROOT = Path(__file__).resolve().parents[2]


def server_of(manager: GPUResourceManager) -> int:
    return manager._isolation._spawner._server._process.pid


def all_end(pids: list[int]) -> bool:
    """Waits for the end of processes."""
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue
        if process.status() != psutil.STATUS_ZOMBIE:
            processes.append(process)
    _, alive = psutil.wait_procs(processes, 30)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def family(another: Callable[..., GPUManagedTTS]) -> GPUManagedTTS:
    return another(Family)


def test_children_live_with_their_worker_and_end_with_it(
    family: GPUManagedTTS, another: Callable[..., GPUManagedTTS]
) -> None:
    pids, shared = list(family.start().values()), family.share()
    other = another(Family)
    others = list(other.start().values())
    other.force_release()
    assert all_end(others)
    assert all(psutil.pid_exists(pid) for pid in pids)
    family.force_offload()
    assert all(psutil.pid_exists(pid) for pid in pids)
    family.force_release()
    assert all_end(pids)
    assert shared not in os.listdir("/dev/shm")


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_children_end_with_a_killed(family: GPUManagedTTS, victim: str) -> None:
    pids, shared, worker = list(family.start().values()), family.share(), family.pid()
    os.kill(worker if victim == "worker" else server_of(family.manager), signal.SIGKILL)
    assert family.manager.wait_for(family.name, State.RELEASED, 60)
    assert all_end([worker, *pids])
    assert victim == "server" or shared not in os.listdir("/dev/shm")
    if shared in os.listdir("/dev/shm"):
        (Path("/dev/shm") / shared).unlink()


def test_a_worker_needs_no_watcher_for_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(orphans.MARK, "of a server")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a watcher was started"))
    orphans.end_with_this_process([psutil.Process()])


# -- the manager's process ------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
from gpu_manager import GPUResourceManager, SimulatedDevice
from worker_engines import Family
manager = GPUResourceManager(SimulatedDevice(1 << 30), isolation="process", keep_warm=-1)
manager.register("tts", Family)  # while torch is being imported in another thread
with manager.lease("tts") as engine:
    pids = [*engine.start().values(), engine.pid(), manager._isolation._spawner._server._process.pid]
    print(json.dumps({"pids": pids, "shared": engine.share()}), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def program() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        made.append(
            subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env={**os.environ, "PYTHONPATH": path},
            )
        )  # fmt: skip
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def facts(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    found: dict[str, Any] = json.loads(line)
    return found


def test_all_end_with_a_killed_manager(program: Callable[[str], subprocess.Popen[str]]) -> None:
    process = program(SCRIPT)
    found = facts(process)
    process.kill()
    assert all_end(found["pids"])
    assert found["shared"] not in os.listdir("/dev/shm")


def guards_of(server: int) -> list[psutil.Process]:
    guards = []
    for child in psutil.Process(server).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            guards += [child] if child.name() == "gpu-guard" else []
    return guards


@pytest.mark.parametrize("guard", ["first guard", "later guard"])
def test_all_end_with_a_manager_and_its_server_that_are_killed_at_the_same_moment(
    program: Callable[[str], subprocess.Popen[str]], guard: str
) -> None:
    process = program(SCRIPT)
    found = facts(process)
    if guard == "later guard":
        (first,) = guards_of(found["pids"][-1])
        first.kill()
        assert wait_until(lambda: guards_of(found["pids"][-1]) not in ([], [first]))
    process.send_signal(signal.SIGSTOP)  # so that neither sees the end of the other
    os.kill(found["pids"][-1], signal.SIGKILL)
    process.kill()
    try:
        assert all_end(found["pids"])
    finally:
        (Path("/dev/shm") / found["shared"]).unlink(missing_ok=True)


def test_all_end_with_an_interpreter_that_closes_nothing(program: Callable[[str], subprocess.Popen[str]]) -> None:
    process = program(SCRIPT)
    found = facts(process)
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert all_end(found["pids"])
    assert found["shared"] not in os.listdir("/dev/shm")


def test_signals_to_the_whole_group_leave_workers_to_the_manager(family: GPUManagedTTS) -> None:
    """Service managers send them to each process; the running request is finished first."""
    pid = family.pid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
        os.kill(server_of(family.manager), number)
    assert family.pid() == pid
    ended = family.apply(_child_ends_by, signal.SIGTERM)
    assert ended == -signal.SIGTERM


def _child_ends_by(number: int) -> int | None:
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    os.kill(child.pid or 0, number)
    child.join()
    return child.exitcode


# -- the end of a manager -------------------------------------------------------------------------------------------


def test_a_close_waits_for_running_calls(gate: Gate) -> None:
    before, known = held(), threading.enumerate()
    manager = GPUResourceManager(SimulatedDevice(1 << 30), isolation="process")
    tts = GPUManagedTTS(None, manager=manager, load=Family, name="tts")
    pids = list(tts.start().values())
    running = started(tts.call, gate)
    gate.reached()
    assert not manager.close(grace=0)
    with pytest.raises(ManagerClosed):
        tts.pid()
    closing = started(manager.close)
    gate.open()
    running.result(60)
    assert closing.result(60)
    assert all_end(pids)
    await_threads(known)
    manager = tts = None  # type: ignore[assignment]
    del running, closing
    assert held() == before


def test_a_server_that_is_killed_before_the_first_load_is_replaced() -> None:
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation="process") as manager:
        os.kill(server_of(manager), signal.SIGKILL)
        manager.register("tts", Family)
        with manager.lease("tts") as engine:
            assert engine.volume == 1.0


def test_a_close_ends_a_server_that_does_not_react(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawner, "CLOSES_WITHIN_S", 0.1)
    manager = GPUResourceManager(SimulatedDevice(1 << 30), isolation="process", keep_warm=-1)
    manager.register("tts", Family)
    with manager.lease("tts") as engine:
        pids = [server_of(manager), engine.pid(), *engine.start().values()]
        os.kill(pids[0], signal.SIGSTOP)
        manager._isolation.close()
    assert all_end(pids)
    manager.close()


def test_a_fork_that_fails_costs_one_load_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fork)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"f"], [theirs.fileno()])
        assert fork_server._Server(theirs, theirs, theirs, -1, -1)._answer()
        assert fork_server.ANSWER.unpack(ours.recv(100)) == (b"!", 0, errno.EAGAIN)
