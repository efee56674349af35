"""A simulated card that several processes use."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from card_processes import CardProcess
from fakes import Worker

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, SimulatedDevice
from residency.contracts import Memory
from residency.devices import ledger
from residency.devices.named_cards import path_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd and /proc")


@pytest.fixture
def card() -> SimulatedDevice:
    return SimulatedDevice(1000)


@pytest.fixture
def child(card: SimulatedDevice) -> Iterator[CardProcess]:
    with CardProcess(card) as process:
        yield process


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_process_that_unpickles_it_uses_the_same_card(card: SimulatedDevice, start: str) -> None:
    card.charge(100)
    with CardProcess(card, start) as child:
        child.ask("device.charge(300)")
        card.charge(50)
        own = {os.getpid(): 150, child.pid: 300}
        for asked in (card.memory(), child.ask("device.memory()")):
            assert asked == Memory(1000, 550, 450)
        assert card.held_by() == child.ask("device.held_by()") == own
        assert card.ledger_bytes == child.ask("device.ledger_bytes") == 450
        child.ask("device.refund(100)")
        card.refund(150)
        assert card.held_by() == {os.getpid(): 0, child.pid: 200}
        assert child.ask("device.name") == card.name


def test_a_process_may_pass_it_on_and_end(card: SimulatedDevice, child: CardProcess) -> None:
    grandchild = pickle.loads(child.ask("__import__('pickle').dumps(device)"))
    assert grandchild.ledger is card.ledger, "it is this process's own"
    with CardProcess(grandchild) as other:
        other.ask("device.charge(10)")
        child.kill()
        other.ask("device.charge(10)")
        assert card.ledger_bytes == 20


def test_a_process_that_has_ended_cannot_pass_it_on(card: SimulatedDevice) -> None:
    with CardProcess(card) as child:
        child.ask("device.__dict__.update(other=type(device)(1000))")
        pickled = child.ask("__import__('pickle').dumps(device.other)")
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_a_descriptor_that_is_another_file_now_is_noticed(card: SimulatedDevice, tmp_path: os.PathLike[str]) -> None:
    attach, (pid, owner, _, device, inode) = card.ledger.__reduce__()
    descriptors = set(os.listdir("/proc/self/fd"))
    with open(os.path.join(tmp_path, "other"), "w+b") as other, pytest.raises(FileNotFoundError, match="no longer"):
        attach(pid, owner, other.fileno(), device, inode + 1)
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_without_shared_memory_it_stays_with_its_process(
    card: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(pickle.PicklingError, match="Linux only"):
        pickle.dumps(card)
    card.charge(1000)


def test_its_descriptors_end_with_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    card = SimulatedDevice(1000)
    assert len(os.listdir("/proc/self/fd")) == before, "a card of one process needs none"
    pickle.dumps(card)
    assert len(os.listdir("/proc/self/fd")) > before
    del card
    assert len(os.listdir("/proc/self/fd")) == before


# -- ends of processes ------------------------------------------------------------------------------------------


def test_what_a_killed_process_held_is_free_even_before_it_is_waited_for(
    card: SimulatedDevice, child: CardProcess
) -> None:
    child.ask("device.charge(900)")
    child.kill()
    card.charge(1000)
    assert card.held_by() == {os.getpid(): 1000}


@pytest.mark.parametrize("look", ["memory", "held_by", "ledger_bytes"])
def test_a_killed_process_counts_in_no_look(card: SimulatedDevice, child: CardProcess, look: str) -> None:
    child.ask("device.charge(900)")
    child.kill()
    if look == "memory":
        assert card.memory() == Memory(1000, 1000, 0)
    elif look == "held_by":
        assert card.held_by() == {os.getpid(): 0}
    else:
        assert card.ledger_bytes == 0


def test_the_row_of_a_process_can_be_removed(card: SimulatedDevice, child: CardProcess) -> None:
    child.ask("device.charge(900)")
    card.ended(child.pid)
    card.ended(child.pid)
    assert card.held_by() == {os.getpid(): 0}
    child.ask("device.charge(1)")
    assert card.held_by() == {os.getpid(): 0, child.pid: 1}, "it was alive"


def test_a_later_process_of_the_same_number_does_not_inherit(card: SimulatedDevice, child: CardProcess) -> None:
    child.ask("device.charge(900)")
    row = card.ledger.find(child.pid)
    card.ledger.started[row] -= 1
    assert card.ledger_bytes == 0
    with CardProcess(SimulatedDevice(1)) as other:
        card.report_outside(other.pid, 5)
        card.ledger.started[card.ledger.find(other.pid)] -= 1
        other.ask(f"device.__dict__.update(card=__import__('pickle').loads({pickle.dumps(card)!r}))")
        other.ask("device.card.charge(7)")
        assert card.held_by() == {os.getpid(): 0, other.pid: 7}


def test_rows_of_ended_processes_are_used_again(card: SimulatedDevice, child: CardProcess) -> None:
    rows = card.ledger
    for row in range(len(rows.pids)):
        if not rows.pids[row]:
            rows.pids[row], rows.started[row], rows.charged[row] = (1 << 40) + row, 1, 1
    rows._words[0] = len(rows.pids)
    child.ask("device.charge(1)")
    assert card.held_by() == {os.getpid(): 0, child.pid: 1}
    for row in range(len(rows.pids)):
        rows.pids[row], rows.started[row] = rows.pids[row] or (1 << 40) + row, 0
    card.ended(child.pid)
    card.report_outside(1 << 41, 1)
    with pytest.raises(RuntimeError, match="more than 256 processes"):
        child.ask("device.charge(1)")


def test_a_process_that_is_killed_with_the_lock_keeps_no_other_waiting(
    card: SimulatedDevice, child: CardProcess
) -> None:
    assert child.ask("hold(device, pipe)") == "held"
    charging = Worker(card.charge, 10)
    charging.join(0.05)
    assert charging.is_alive()
    child.kill()
    charging.result()
    assert card.ledger_bytes == 10


def test_processes_that_race_for_the_last_bytes_never_get_more_than_there_is(card: SimulatedDevice) -> None:
    with CardProcess(card) as one, CardProcess(card) as other:
        for process in (one, other):
            process.begin("charge_and_refund(device, 3000)")
        (taken, exceeded), (taken_there, exceeded_there) = one.result(), other.result()
        assert taken + taken_there > 0
        assert exceeded == exceeded_there == 0
        assert card.ledger_bytes == 0


def test_an_error_of_a_full_card_names_the_free_bytes_and_who_holds_the_others(
    card: SimulatedDevice, child: CardProcess
) -> None:
    card.charge(900)
    with pytest.raises(DeviceOutOfMemory, match=f"101 bytes needed, 100 free .held by pid {os.getpid()}: 900") as error:
        child.ask("device.charge(101)")
    assert (error.value.needed_bytes, error.value.free_bytes) == (101, 100)
    assert error.value.holders == ((os.getpid(), 900),)
    child.ask("device.charge(100)")


# -- forked children without pickling ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_forked_child_has_a_copy_of_its_own(shared: bool) -> None:
    card = SimulatedDevice(1000)
    card.charge(600)
    if shared:
        pickle.dumps(card)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            card.refund(500)
            seen = [card.ledger_bytes, card.memory().free_bytes, card.held_by() == {os.getpid(): 100}]
            os.write(write, repr(seen).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() == "[100, 900, True]"
    assert card.held_by() == {os.getpid(): 600}
    os.close(read)
    os.close(write)


def test_pickled_to_a_forked_child_it_is_the_same_card_there(card: SimulatedDevice, child: CardProcess) -> None:
    card.charge(600)
    child.ask("device.charge(400)")
    assert card.ledger_bytes == child.ask("device.ledger_bytes") == 1000


# -- cards with a name ---------------------------------------------------------------------------------------------


NAMED = """
import os, signal, sys
from gpu_manager import SimulatedDevice
SimulatedDevice(1000, shared=sys.argv[1]).charge(600)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def name() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


def test_a_forked_child_that_opens_a_card_by_its_name_uses_that_card(name: str) -> None:
    card = SimulatedDevice(1000, shared=name)
    card.charge(600)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            again = SimulatedDevice(1000, shared=name)
            again.charge(300)
            seen = [
                card.ledger_bytes,
                again.memory().free_bytes,
                again.held_by() == {os.getppid(): 600, os.getpid(): 300},
            ]
            os.write(write, repr(seen).encode())
            signal.pause()
        finally:
            os._exit(0)
    try:
        assert os.read(read, 100).decode() == "[600, 100, True]"
        assert card.held_by() == {os.getpid(): 600, child: 300}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert card.held_by() == {os.getpid(): 600}


def test_the_file_of_a_card_whose_processes_were_killed_is_removed_by_the_next_one(name: str) -> None:
    used = SimulatedDevice(1000, shared=f"{name}-used")
    used.report_outside(1 << 40, 10)  # no process that runs
    subprocess.run([sys.executable, "-c", NAMED, name], cwd=ROOT, check=False)
    assert path_of(name).exists()
    SimulatedDevice(1000, shared=f"{name}-next")
    assert not path_of(name).exists()
    assert path_of(f"{name}-used").exists()
    subprocess.run([sys.executable, "-c", NAMED, name], cwd=ROOT, check=False)
    assert SimulatedDevice(500, shared=name).memory() == Memory(500, 500, 0), "also with another size"


def test_a_file_that_another_process_begins_is_not_removed(name: str) -> None:
    """It is locked until its first process is in it."""
    path_of(name).touch()
    begin = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", begin, str(path_of(name))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        SimulatedDevice(1000, shared=f"{name}-next")
        assert path_of(name).exists()
        other.communicate("\n")
    SimulatedDevice(1000, shared=f"{name}-last")
    assert not path_of(name).exists()


# -- contexts ---------------------------------------------------------------------------------------------------


def test_a_process_takes_its_context_at_its_first_use_and_keeps_it_to_its_end() -> None:
    card = SimulatedDevice(1000, context_bytes=300)
    assert card.memory() == Memory(1000, 1000, 0), "a look at it is no use"
    card.charge(100)
    assert card.memory() == Memory(1000, 600, 400)
    assert (card.ledger_bytes, card.held_by()) == (100, {os.getpid(): 400})
    card.refund(100)
    card.settle()
    assert card.memory() == Memory(1000, 700, 300), "it stays after a release"
    storage = torch.UntypedStorage(0)
    card.allocate(storage, 10)
    assert card.memory().free_bytes == 690
    with CardProcess(card) as child:
        assert child.ask("device.memory().free_bytes") == 690
        child.ask("device.ensure_usable()")
        child.ask("device.ensure_usable()")
        assert card.held_by() == {os.getpid(): 310, child.pid: 300}
        assert card.memory() == Memory(1000, 390, 610)
        child.kill()
        assert card.held_by() == {os.getpid(): 310}


def test_a_context_that_does_not_fit_is_an_error_and_takes_nothing() -> None:
    card = SimulatedDevice(1000, context_bytes=300)
    card.charge(500)
    with CardProcess(card) as child:
        for call, needed_bytes in (("ensure_usable()", 300), ("charge(7)", 307)):
            with pytest.raises(DeviceOutOfMemory) as error:
                child.ask(f"device.{call}")
            assert (error.value.needed_bytes, error.value.free_bytes) == (needed_bytes, 200)
        card.refund(100)
        with pytest.raises(DeviceOutOfMemory):
            child.ask("device.charge(7)")
        assert card.held_by() == {os.getpid(): 700}
        child.ask("device.ensure_usable()")
        assert card.memory().free_bytes == 0


@pytest.mark.parametrize("context_bytes", [-1, 1000, 1001])
def test_a_context_is_smaller_than_its_card(context_bytes: int) -> None:
    with pytest.raises(ValueError, match="context_bytes"):
        SimulatedDevice(1000, context_bytes=context_bytes)


@pytest.mark.in_process("the context is that of this process")
def test_a_context_is_no_memory_of_a_model() -> None:
    card = SimulatedDevice(4 << 30, context_bytes=1 << 30)
    with GPUResourceManager(card, keep_warm=60) as manager:
        manager.register("tts", lambda: torch.nn.Linear(1000, 1000))
        with manager.lease("tts"):
            pass
        status = manager.status()
        assert status["device"]["outside_bytes"] == 0
        assert status["device"]["process_bytes"] == (1 << 30) + status["models"]["tts"]["device_bytes"]
        manager.release("tts")
        assert manager.status()["device"]["process_bytes"] == 1 << 30


def test_the_start_of_a_process_is_known_while_it_runs(child: CardProcess) -> None:
    assert ledger.started_at(child.pid) >= ledger.started_at(os.getpid()) > 0
    child.kill()
    assert ledger.started_at(child.pid) == 0
