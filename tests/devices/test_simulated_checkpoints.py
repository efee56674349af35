"""Checkpoints of processes on a simulated card."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from card_processes import CardProcess
from fakes import Worker

from gpu_manager import DeviceOutOfMemory, SimulatedDevice
from residency.contracts import Memory
from residency.devices import SimulatedCheckpoints
from residency.devices.checkpoint_transitions import AFTER, ROWS, TRANSITIONS, Remedy, Row
from residency.errors import CheckpointFailed
from residency.observability.error_classification import is_out_of_device_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd and /proc")


@pytest.fixture
def card() -> SimulatedDevice:
    return SimulatedDevice(1000, context_bytes=100)


@pytest.fixture
def child(card: SimulatedDevice) -> Iterator[CardProcess]:
    """A process with 400 bytes on the card."""
    with CardProcess(card) as process:
        process.ask("device.charge(300)")
        yield process


@pytest.fixture
def checkpoints(card: SimulatedDevice) -> SimulatedCheckpoints:
    return SimulatedCheckpoints(card)


def test_a_checkpointed_process_holds_nothing_and_gets_all_back(
    card: SimulatedDevice, child: CardProcess, checkpoints: SimulatedCheckpoints
) -> None:
    assert checkpoints.unavailable() is None
    assert checkpoints.state(child.pid) == "running"
    checkpoints.checkpoint(child.pid, 10)
    assert checkpoints.state(child.pid) == "checkpointed"
    assert card.memory() == Memory(1000, 1000, 0)
    assert (card.held_by(), card.ledger_bytes) == ({os.getpid(): 0}, 0)
    checkpoints.restore(child.pid, 10)
    assert checkpoints.state(child.pid) == "running"
    assert card.held_by() == {os.getpid(): 0, child.pid: 400}
    child.ask("device.refund(300)")
    assert card.held_by() == {os.getpid(): 0, child.pid: 100}
    checkpoints.close()


@pytest.mark.parametrize("call", ["charge(1)", "refund(1)", "wait()", "settle()", "ensure_usable()"])
def test_its_calls_of_the_card_wait_and_nothing_else_does(
    child: CardProcess, checkpoints: SimulatedCheckpoints, call: str
) -> None:
    checkpoints.checkpoint(child.pid, 10)
    assert child.ask("device.memory().free_bytes") == 1000
    child.begin(f"device.{call}")
    assert not child.answers_within(0.05)
    checkpoints.restore(child.pid, 10)
    child.result()


def test_a_process_that_has_not_used_the_card_can_be_checkpointed(
    card: SimulatedDevice, checkpoints: SimulatedCheckpoints
) -> None:
    with CardProcess(card) as child:  # which may unpickle the card before or after this
        checkpoints.checkpoint(child.pid, 10)
        child.begin("device.charge(5)")
        assert not child.answers_within(0.05)
        checkpoints.restore(child.pid, 10)
        child.result()
        assert card.held_by() == {os.getpid(): 0, child.pid: 105}


def test_the_only_process_of_a_card_waits_too(card: SimulatedDevice, checkpoints: SimulatedCheckpoints) -> None:
    card.charge(100)
    checkpoints.checkpoint(os.getpid(), 10)
    assert card.memory().free_bytes == 1000
    refunding = Worker(card.refund, 100)
    refunding.join(0.05)
    assert refunding.is_alive()
    checkpoints.restore(os.getpid(), 10)
    refunding.result()
    assert card.held_by() == {os.getpid(): 100}


def test_other_processes_see_the_state(child: CardProcess, checkpoints: SimulatedCheckpoints) -> None:
    checkpoints.checkpoint(child.pid, 10)
    there = "__import__('residency.devices').devices.SimulatedCheckpoints(device)"
    assert child.ask(f"{there}.state({child.pid})") == "checkpointed"
    assert child.ask(f"{there}.restore({child.pid}, 10)") is None
    assert checkpoints.state(child.pid) == "running"


def test_without_room_it_stays_checkpointed_and_may_be_restored_later(
    card: SimulatedDevice, child: CardProcess, checkpoints: SimulatedCheckpoints
) -> None:
    checkpoints.checkpoint(child.pid, 10)
    card.charge(501)
    with pytest.raises(CheckpointFailed, match=r"\(restore\).*400 bytes needed, 399 free.*still checkpointed") as error:
        checkpoints.restore(child.pid, 10)
    assert is_out_of_device_memory(error.value)
    full = error.value.__cause__
    assert isinstance(full, DeviceOutOfMemory)
    assert (full.needed_bytes, full.free_bytes) == (400, 399)
    assert checkpoints.state(child.pid) == "checkpointed"
    card.refund(1)
    checkpoints.restore(child.pid, 10)
    assert card.memory().free_bytes == 0


# -- failures at each step ---------------------------------------------------------------------------------------


def there_and_back(checkpoints: SimulatedCheckpoints, pid: int) -> None:
    checkpoints.checkpoint(pid, 10)
    checkpoints.restore(pid, 10)


@pytest.mark.parametrize(
    ("step", "state", "held_bytes", "left"),
    [
        ("lock", "running", 400, "runs as before"),
        ("checkpoint", "running", 400, "runs as before"),
        ("restore", "checkpointed", 0, "still checkpointed"),
        ("unlock", "locked", 400, "cannot go on: it is ended"),
    ],
)
def test_a_step_that_fails(
    card: SimulatedDevice, child: CardProcess, checkpoints: SimulatedCheckpoints, step: str, state: str,
    held_bytes: int, left: str,
) -> None:  # fmt: skip
    checkpoints.failure[step] = "the driver says no"
    with pytest.raises(CheckpointFailed, match=f"the driver says no.*{left}") as error:
        there_and_back(checkpoints, child.pid)
    assert (error.value.pid, error.value.step) == (child.pid, step)
    assert checkpoints.state(child.pid) == state
    assert card.held_by().get(child.pid, 0) == held_bytes
    child.begin("device.wait()")
    assert child.answers_within(60 if state == "running" else 0.05) == (state == "running")
    child.kill()
    assert checkpoints.state(child.pid) == "gone"
    assert card.memory().free_bytes == 1000


@pytest.mark.parametrize("fatal", ["failed", "gone"])
@pytest.mark.parametrize("step", ["lock", "checkpoint", "restore", "unlock"])
def test_a_step_that_the_process_does_not_survive(
    card: SimulatedDevice, child: CardProcess, checkpoints: SimulatedCheckpoints, step: str, fatal: str
) -> None:
    checkpoints.failure[step], checkpoints.leaves[step] = "the driver says no", fatal
    with pytest.raises(CheckpointFailed, match="has ended" if fatal == "gone" else "cannot go on") as error:
        there_and_back(checkpoints, child.pid)
    assert error.value.step == step
    assert checkpoints.state(child.pid) == fatal
    assert card.held_by().get(child.pid, 0) == (400 if fatal == "failed" else 0)


def test_a_process_that_cannot_be_unlocked_after_a_failure_stays_locked(
    child: CardProcess, checkpoints: SimulatedCheckpoints
) -> None:
    checkpoints.failure.update(checkpoint="no memory", unlock="no reason")
    with pytest.raises(CheckpointFailed, match="no memory; the process cannot go on: it is ended") as error:
        checkpoints.checkpoint(child.pid, 10)
    assert error.value.step == "checkpoint"
    assert checkpoints.state(child.pid) == "locked"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operation}: {row.call} {row.outcome}")
def test_every_row_of_the_table_holds(child: CardProcess, checkpoints: SimulatedCheckpoints, row: Row) -> None:
    """The same table as the driver's: tests/workers/test_checkpoints.py."""
    if row.operation == "restore":
        checkpoints.checkpoint(child.pid, 10)
    elif row.call == "unlock":
        checkpoints.failure["checkpoint"] = "the first error"
    if row.outcome != "done":
        checkpoints.failure[row.call], checkpoints.leaves[row.call] = "the driver says no", row.outcome
    made, make = [], checkpoints.make
    checkpoints.make = lambda call, *rest: made.append(call) or make(call, *rest)  # type: ignore[method-assign]
    error = None
    try:
        getattr(checkpoints, row.operation)(child.pid, 10)
    except CheckpointFailed as failed:
        error = failed
    then, after, position = row.then, row.after, made.index(row.call)
    while isinstance(then, str):  # what follows is not disturbed
        position += 1
        assert made[position] == then
        after, then = AFTER[then], TRANSITIONS[row.operation, then, "done"].then
    assert made[position + 1 :] == []
    assert checkpoints.state(child.pid) == after
    assert (error is None) == (then is None)
    if isinstance(then, Remedy):
        assert error is not None
        assert (error.en.endswith(f"{then.value.en}."), error.zh.endswith(f"{then.value.zh}。")) == (True, True)


def test_what_is_done_already_is_no_error(child: CardProcess, checkpoints: SimulatedCheckpoints) -> None:
    checkpoints.restore(child.pid, 10)
    for _ in range(2):
        checkpoints.checkpoint(child.pid, 10)
    assert checkpoints.state(child.pid) == "checkpointed"
    child.kill()
    for operation in (checkpoints.checkpoint, checkpoints.restore):
        with pytest.raises(CheckpointFailed, match="has ended"):
            operation(child.pid, 10)


# -- time -------------------------------------------------------------------------------------------------------


def test_a_copy_takes_the_time_of_its_bytes(card: SimulatedDevice, child: CardProcess) -> None:
    seen: list[tuple[float, str, int]] = []
    checkpoints = SimulatedCheckpoints(
        card, 100, lambda seconds: seen.append((seconds, checkpoints.state(child.pid), card.memory().free_bytes))
    )
    checkpoints.checkpoint(child.pid, 4)
    checkpoints.restore(child.pid, 4)
    assert seen == [(4, "locked", 600), (4, "locked", 600)], "its bytes are on the card during both"


def test_a_copy_that_takes_too_long_is_given_up(card: SimulatedDevice, child: CardProcess) -> None:
    slept: list[float] = []
    checkpoints = SimulatedCheckpoints(card, 100, slept.append)
    with pytest.raises(CheckpointFailed, match=r"longer than 3\.5 s; the process runs as before"):
        checkpoints.checkpoint(child.pid, 3.5)
    checkpoints.checkpoint(child.pid, 4)
    with pytest.raises(CheckpointFailed, match=r"longer than 3\.5 s; the process is still checkpointed"):
        checkpoints.restore(child.pid, 3.5)
    assert slept == [3.5, 4, 3.5]
    assert card.memory().free_bytes == 1000


@pytest.mark.parametrize("copy", ["checkpoint", "restore"])
def test_a_process_that_is_killed_during_a_copy(card: SimulatedDevice, child: CardProcess, copy: str) -> None:
    checkpoints = SimulatedCheckpoints(card)
    if copy == "restore":
        checkpoints.checkpoint(child.pid, 10)
    checkpoints = SimulatedCheckpoints(card, 100, lambda _: child.kill())
    with pytest.raises(CheckpointFailed, match="the process has ended"):
        getattr(checkpoints, copy)(child.pid, 10)
    assert checkpoints.state(child.pid) == "gone"
    assert card.memory() == Memory(1000, 1000, 0)
