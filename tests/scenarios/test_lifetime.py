"""Managers in processes that fork, and in interpreters that end without having closed them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

PRELUDE = """
import os, sys, threading, time
sys.path[:0] = [{root!r}, {tests!r}]
from fakes import Gate, Workshop
from gpu_manager import GPUResourceManager, ManagerClosed, SimulatedDevice, get_gpu_manager
shop = Workshop()
device = SimulatedDevice(1000)
manager = GPUResourceManager(device, keep_warm=60, adopt=shop.adopt)
manager.register("tts", shop.load)

def use(manager=manager):
    with manager.lease("tts") as engine:
        return engine

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


def run(script: str, within_s: float = 60) -> subprocess.CompletedProcess[str]:
    prelude = PRELUDE.format(root=str(ROOT), tests=str(ROOT / "tests" / "support"))
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", prelude + script],
        capture_output=True, text=True, timeout=within_s, check=False,
    )  # fmt: skip


def succeeds(script: str, within_s: float = 60) -> str:
    done = run(script, within_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestForkedChildren:
    CHILD = """
def child():
    assert manager.closed
    assert manager.names() == ()
    for call in (use, lambda: manager.warm("tts"), lambda: manager.offload("tts")):
        try:
            call()
        except ManagerClosed:
            continue
        raise AssertionError("a child may use nothing of the parent's")
    manager.close()
    mine = get_gpu_manager(SimulatedDevice(1000))
    assert mine is not manager
    mine.register("own", lambda: __import__("torch").nn.Linear(2, 2))
    with mine.lease("own") as engine:
        assert engine.weight.shape == (2, 2)
    mine.close()
"""

    def test_the_parents_models_are_left_alone(self) -> None:
        succeeds(
            self.CHILD
            + """
engine = use()
in_child(child)
assert engine.resident.log == [] and engine.resident.place == "device"
assert use() is engine
manager.close()
assert engine.resident.place == "nowhere"
"""
        )

    def test_a_lock_that_another_thread_holds_at_the_fork_is_no_trap(self) -> None:
        succeeds(
            self.CHILD
            + """
with manager._dispatcher.lock:
    in_child(child)
assert use()
"""
        )

    def test_a_load_that_runs_at_the_fork_is_the_parents(self) -> None:
        succeeds(
            self.CHILD
            + """
gate = shop.gate = Gate()
manager.warm("tts")
gate.wait_for_arrival()
in_child(child)
gate.open()
assert use() is shop.engines[0] and shop.loads == 1
"""
        )

    @pytest.mark.parametrize("move", ["offload", "restore", "recall"])
    def test_a_constant_that_moves_at_the_fork_is_whole_in_the_child(self, move: str) -> None:
        """A process-wide constant, such as a filter bank, needs no lease: it must neither hang nor be empty there."""
        succeeds(
            f"move = {move!r}"
            """
import signal, torch
from contextlib import contextmanager
from residency.memory import EngineResident

class Slow(SimulatedDevice):
    gate = None

    @contextmanager
    def transfer(self):
        yield
        if self.gate is not None:
            self.gate.pass_through()

card = Slow(1 << 20)
constant = torch.arange(100.0)
engine = torch.nn.Module()
engine.register_buffer("filters", constant)
resident = EngineResident(engine, card)
if move != "offload":
    resident.offload()
work = constant.sum if move == "recall" else getattr(resident, move)
card.gate = Gate()
mover = threading.Thread(target=work)
mover.start()
card.gate.wait_for_arrival()

def child():
    signal.alarm(20)
    card.gate = None
    assert constant.sum() == 4950
    other = torch.nn.Linear(4, 4)
    EngineResident(other, card).offload()

in_child(child)
card.gate.open()
mover.join()
assert constant.sum() == 4950
"""
        )

    def test_a_lease_that_is_held_at_the_fork_ends_in_the_child_without_a_trace(self) -> None:
        succeeds(
            """
with manager.lease("tts") as engine:
    pid = os.fork()
    # both leave the block
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert manager.status()["models"]["tts"]["state"] == "gpu"
assert use() is engine
"""
        )

    def test_a_lease_made_before_the_fork_is_refused_in_the_child_even_inside_one_that_is_held(self) -> None:
        succeeds(
            """
later = manager.lease("tts")
def child():
    try:
        later.__enter__()
    except ManagerClosed:
        return
    raise AssertionError("the engine is the parent's")

with manager.lease("tts"):
    in_child(child)
    with later as engine:
        assert engine is shop.engines[0]
"""
        )

    def test_multiprocessing_with_fork_and_a_child_that_exits_normally(self) -> None:
        succeeds(
            self.CHILD
            + """
import multiprocessing
engine = use()
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert engine.resident.log == []
"""
        )


class TestTheEndOfTheInterpreter:
    def test_idle(self) -> None:
        succeeds("use()\n")

    def test_in_the_middle_of_native_code_of_a_move(self) -> None:
        out = succeeds(
            """
import torch
started = threading.Event()
def load():
    started.set()
    for _ in range(30):
        torch.randn(600, 600) @ torch.randn(600, 600)
    print("loaded", flush=True)
    return shop.load()
manager.register("slow", load)
manager.warm("slow")
started.wait()
"""
        )
        assert "loaded" in out, "the move was waited for"

    def test_with_a_request_in_a_daemon_thread(self) -> None:
        succeeds(
            """
inside = threading.Event()
def request():
    with manager.lease("tts"):
        inside.set()
        threading.Event().wait()
threading.Thread(target=request, daemon=True).start()
inside.wait()
"""
        )

    def test_a_loader_that_hangs_does_not_keep_the_process_for_long(self) -> None:
        started_s = time.monotonic()
        succeeds(
            """
gate = shop.gate = Gate()
manager.warm("tts")
gate.wait_for_arrival()
"""
        )
        assert time.monotonic() - started_s < 29, "the gate would have opened by itself after 30 s"
