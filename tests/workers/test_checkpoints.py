"""Checkpoints by a stand-in for the driver, of real processes, through the real helper process."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pynvml
import pytest

from residency.contracts import ProcessCheckpoints
from residency.devices import checkpoint_transitions as transitions
from residency.devices.checkpoint_transitions import ROWS, Remedy, Row
from residency.errors import CheckpointFailed
from residency.observability.error_classification import is_out_of_device_memory, may_be_device_loss
from residency.workers.checkpoints import DriverCheckpoints

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "fake_cuda_core"
TIMEOUT_S = 20.0
FULL = "CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory."
#: What ends a call without success, at the driver or in the helper, beside the state that it leaves.
ENDS = {"error": {"error": "CUDA_ERROR_UNKNOWN: an unknown error."}, "helper killed": {"die": True}}


class Driver:
    """The stand-in's folder, and a process of which the driver knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.mkfifo(folder / "hangs")
        self.children: list[subprocess.Popen[bytes]] = []
        self.pid = self.child()

    def child(self) -> int:
        self.children.append(subprocess.Popen(["sleep", "infinity"]))
        return self.children[-1].pid

    def order(self, call: str, **order: object) -> None:
        (self.folder / f"{call}.order").write_text(json.dumps(order))

    def set(self, state: str) -> None:
        (self.folder / f"{self.pid}.state").write_text(state)

    def log(self) -> list[list[str]]:
        """The pid of the helper, then its call and the process, or ``end of`` these."""
        file = self.folder / "log"
        return [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[str]:
        found = [line.split()[0] for _, line in self.log() if not line.startswith("end of")]
        return [call for call in found if call not in ("state", "cuInit")]

    def helpers(self) -> list[int]:
        return [int(pid) for pid, line in self.log() if line == "cuInit 0"]

    def wait_until_it_hangs(self) -> None:
        (self.folder / "hangs").open("r").close()

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setenv("FAKE_CHECKPOINTS", str(tmp_path))
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.86.10")
    driver = Driver(tmp_path)
    yield driver
    driver.close()
    left = list(map(psutil.Process, filter(psutil.pid_exists, driver.helpers())))
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE], "a helper is left"


@pytest.fixture
def checkpoints(driver: Driver) -> Iterator[DriverCheckpoints]:
    checkpoints = DriverCheckpoints()
    yield checkpoints
    checkpoints.close()


def as_contract(checkpoints: ProcessCheckpoints) -> ProcessCheckpoints:
    return checkpoints


def test_a_process_is_checkpointed_and_restored(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    assert as_contract(checkpoints).unavailable() is None
    assert checkpoints.state(driver.pid) == "running"
    assert not driver.log(), "a question starts no helper"
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "checkpointed"
    checkpoints.restore(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "running"
    assert driver.calls() == ["lock", "checkpoint", "restore", "unlock"]
    assert (driver.folder / "timeout_ms").read_text() == "20000"
    assert len(driver.helpers()) == 1


def test_what_is_done_already_is_no_error(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    for _ in range(2):
        checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "checkpointed"
    for _ in range(2):
        checkpoints.restore(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "running"


def name_of(row: Row) -> str:
    return f"{row.operation}: {row.call} {row.outcome}"


def arrange(row: Row, driver: Driver, end: dict[str, object]) -> None:
    """Makes the operation of a row meet it."""
    driver.set("running" if row.operation == "checkpoint" else "checkpointed")
    if row.operation == "checkpoint" and row.call == "unlock":
        driver.order("checkpoint", error="CUDA_ERROR_UNKNOWN: the first error")
    if row.outcome == "gone":
        driver.order(row.call, kill=True, **end)
    elif row.outcome != "done":
        driver.order(row.call, state=row.outcome, **end)


@pytest.mark.parametrize(
    ("row", "end"),
    [(row, end) for row in ROWS for end in ENDS if end == "error" or row.outcome != "done"],
    ids=lambda each: name_of(each) if isinstance(each, Row) else each,
)
def test_every_row_of_the_table_holds(checkpoints: DriverCheckpoints, driver: Driver, row: Row, end: str) -> None:
    arrange(row, driver, ENDS[end])
    error = None
    try:
        getattr(checkpoints, row.operation)(driver.pid, TIMEOUT_S)
    except CheckpointFailed as failed:
        error = failed
    made = driver.calls()
    position = made.index(row.call)
    then, after = row.then, row.after
    while isinstance(then, str):  # what follows is not disturbed
        position += 1
        assert made[position] == then
        after = transitions.AFTER[then]
        then = transitions.TRANSITIONS[row.operation, then, "done"].then
    assert made[position + 1 :] == []
    assert checkpoints.state(driver.pid) == after
    assert (error is None) == (then is None)
    if error is not None:
        assert isinstance(then, Remedy)
        assert error.en.endswith(f"{then.value.en}.")
        assert error.zh.endswith(f"{then.value.zh}。")
        assert error.pid == driver.pid
        assert error.step == ("checkpoint" if row.operation == "checkpoint" and row.call == "unlock" else row.call)
        assert not may_be_device_loss(error)
    assert len(driver.helpers()) == 1 + (end == "helper killed" and row.outcome != "gone")


def test_the_table_is_complete_and_keeps_its_promise() -> None:
    calls = {(row.operation, row.before, row.call) for row in ROWS}
    outcomes = ("done", "running", "locked", "checkpointed", "failed", "gone")
    assert len(ROWS) == len(transitions.TRANSITIONS) == len(calls) * len(outcomes)
    for row in ROWS:
        goal = "checkpointed" if row.operation == "checkpoint" else "running"
        if row.then is None:
            assert row.after == goal
        elif isinstance(row.then, Remedy):
            states = {Remedy.KEEP: "running", Remedy.RETRY: "checkpointed", Remedy.GONE: "gone"}
            assert row.after == states.get(row.then, row.after)
            assert row.then is not Remedy.END or row.after in ("failed", "locked")
        else:
            assert (row.operation, row.after, row.then) in calls
    for operation, (state, call) in transitions.FIRST.items():
        assert (operation, state, call) in calls


def fails(checkpoints: DriverCheckpoints, operation: str, pid: int, timeout_s: float = TIMEOUT_S) -> CheckpointFailed:
    with pytest.raises(CheckpointFailed) as caught:
        getattr(checkpoints, operation)(pid, timeout_s)
    return caught.value


def test_a_process_that_computes_for_too_long_runs_on(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    driver.order("lock", error="CUDA_ERROR_NOT_READY: asynchronous operations have not completed yet.")
    error = fails(checkpoints, "checkpoint", driver.pid)
    assert "still computing" in error.en
    assert checkpoints.state(driver.pid) == "running"
    assert checkpoints.unavailable() is None
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)


def test_a_failed_checkpoint_is_undone(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    driver.order("checkpoint", error=FULL)
    error = fails(checkpoints, "checkpoint", driver.pid)
    assert "main memory has no room" in error.en
    assert not is_out_of_device_memory(error), "room on the device would not help"
    assert driver.calls() == ["lock", "checkpoint", "unlock"]
    assert checkpoints.state(driver.pid) == "running"


def test_a_restore_on_a_full_card_can_be_repeated(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    driver.order("restore", error=FULL)
    error = fails(checkpoints, "restore", driver.pid)
    assert is_out_of_device_memory(error)
    assert checkpoints.state(driver.pid) == "checkpointed"
    checkpoints.restore(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "running"


def test_a_restore_that_breaks_the_process_is_not_repeated(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    driver.order("restore", state="failed", error=FULL)
    assert not is_out_of_device_memory(fails(checkpoints, "restore", driver.pid))
    assert checkpoints.state(driver.pid) == "failed"


def test_what_the_driver_does_not_permit_is_not_tried_for_ever(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    for call in ("lock", "state"):
        driver.order(call, error="CUDA_ERROR_NOT_PERMITTED: the attempted operation is not permitted.")
    assert "does not permit it" in fails(checkpoints, "checkpoint", driver.pid).en
    assert checkpoints.state(driver.pid) == "running", "it was never locked"
    found = checkpoints.unavailable()
    assert found is not None
    assert "--gpu-idle-timeout" in found.en
    assert "--gpu-idle-timeout" in found.zh
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    assert checkpoints.unavailable() is None, "it is permitted now"


@pytest.mark.parametrize("row", [row for row in ROWS if row.outcome == "done"], ids=name_of)
def test_a_call_that_hangs_ends_with_the_helper(driver: Driver, row: Row) -> None:
    checkpoints = DriverCheckpoints(grace_s=1.5)
    arrange(row, driver, {})
    if row.before == "locked" and row.operation == "restore":
        driver.set("checkpointed")
    driver.order(row.call, hang=True)
    watcher = threading.Thread(target=driver.wait_until_it_hangs)
    watcher.start()
    error = fails(checkpoints, row.operation, driver.pid, 0.1)
    watcher.join()
    assert error.step == ("checkpoint" if row.operation == "checkpoint" and row.call == "unlock" else row.call)
    assert ("not answered within 1.6 s" in error.en) == (error.step == row.call)
    found = transitions.TRANSITIONS[row.operation, row.call, row.before]
    then = found.then if isinstance(found.then, Remedy) else Remedy.KEEP
    assert then.value.en in error.en
    assert len(driver.helpers()) == 2
    checkpoints.close()


def test_a_process_whose_state_nobody_can_tell_counts_as_failed(driver: Driver) -> None:
    checkpoints = DriverCheckpoints(grace_s=1.5)
    driver.order("checkpoint", die=True)
    driver.order("state", error="CUDA_ERROR_UNKNOWN: it does not know")
    assert Remedy.END.value.en in fails(checkpoints, "checkpoint", driver.pid).en
    driver.order("state", error="CUDA_ERROR_UNKNOWN: it does not know")
    assert checkpoints.state(driver.pid) == "failed"
    assert checkpoints.state(driver.pid) == "locked", "now the driver tells it"
    checkpoints.close()


def test_a_lost_answer_of_a_call_that_was_done_is_no_error(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    for operation, call in (("checkpoint", "checkpoint"), ("restore", "restore"), ("restore", "unlock")):
        driver.order(call, work=True, die=True)
        if operation == "restore" and call == "unlock":
            checkpoints.checkpoint(driver.pid, TIMEOUT_S)
        getattr(checkpoints, operation)(driver.pid, TIMEOUT_S)
    assert checkpoints.state(driver.pid) == "running"


def test_a_helper_that_is_killed_while_idle_costs_nothing(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    (helper,) = driver.helpers()
    os.kill(helper, signal.SIGKILL)
    os.waitid(os.P_PID, helper, os.WEXITED | os.WNOWAIT)
    checkpoints.restore(driver.pid, TIMEOUT_S)
    assert len(driver.helpers()) == 2


def test_a_process_that_is_gone_is_not_asked_for(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    driver.children[0].kill()
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)
    assert checkpoints.state(driver.pid) == "gone", "a zombie"
    for operation in ("checkpoint", "restore"):
        assert Remedy.GONE.value.en in fails(checkpoints, operation, driver.pid).en
    driver.children[0].wait()
    assert checkpoints.state(driver.pid) == "gone"
    assert not driver.log()


def test_threads_take_turns_at_one_helper(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    pids = [driver.pid, driver.child()]
    barrier = threading.Barrier(2)

    def work(pid: int) -> None:
        barrier.wait()
        for _ in range(5):
            checkpoints.checkpoint(pid, TIMEOUT_S)
            checkpoints.restore(pid, TIMEOUT_S)

    threads = [threading.Thread(target=work, args=(pid,)) for pid in pids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for _, line in driver.log()]
    assert len(lines) == 2 * (1 + 2 * 5 * 4)
    assert lines[1::2] == [f"end of {line}" for line in lines[::2]]
    assert len(driver.helpers()) == 1


def test_an_interrupted_call_leaves_no_answer_behind(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    def interrupt() -> None:
        driver.wait_until_it_hangs()
        os.kill(os.getpid(), signal.SIGUSR1)

    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    checkpoints.restore(driver.pid, TIMEOUT_S)
    driver.order("lock", work=True, hang=True)
    watcher = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)  # SIGINT may be ignored in the background
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    watcher.join()
    signal.signal(signal.SIGUSR1, before)
    assert checkpoints.state(driver.pid) == "locked"
    assert len(driver.helpers()) == 2


def test_closing_ends_a_call_that_hangs(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    driver.order("lock", hang=True)
    failed: list[CheckpointFailed] = []
    thread = threading.Thread(target=lambda: failed.append(fails(checkpoints, "checkpoint", driver.pid)))
    thread.start()
    driver.wait_until_it_hangs()
    checkpoints.close()
    thread.join()
    assert failed[0].step == "lock"
    assert fails(checkpoints, "checkpoint", driver.pid).step == "start"
    assert len(driver.helpers()) == 1


@pytest.mark.parametrize(
    ("order", "reason"),
    [({"error": "100"}, "cuInit: 100"), ({"die": True}, "exit code -9"), ({"hang": True}, "not ready within 1 s")],
    ids=["error", "killed", "hangs"],
)
def test_a_helper_that_cannot_start_is_said(driver: Driver, order: dict[str, object], reason: str) -> None:
    checkpoints = DriverCheckpoints(start_timeout_s=1.0 if "hang" in order else 60.0)
    driver.order("cuInit", **order)
    error = fails(checkpoints, "checkpoint", driver.pid)
    assert error.step == "start"
    assert reason in error.en
    assert Remedy.KEEP.value.en in error.en
    assert checkpoints.state(driver.pid) == "running"
    found = checkpoints.unavailable()
    assert found is not None
    assert reason in found.en
    with suppress(CheckpointFailed):  # 1 s may be short on a busy machine
        checkpoints.checkpoint(driver.pid, TIMEOUT_S)
        assert checkpoints.unavailable() is None, "it starts now"
    checkpoints.close()


def test_a_helper_that_has_started_before_is_tried_again(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    checkpoints.restore(driver.pid, TIMEOUT_S)
    (helper,) = driver.helpers()
    os.kill(helper, signal.SIGKILL)
    os.waitid(os.P_PID, helper, os.WEXITED | os.WNOWAIT)
    driver.order("cuInit", die=True)
    assert fails(checkpoints, "checkpoint", driver.pid).step == "start"
    assert checkpoints.unavailable() is None
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)


PARENT = """
import os, signal, sys
from residency.workers.checkpoints import DriverCheckpoints
checkpoints = DriverCheckpoints()
if sys.argv[2] == "idle":
    checkpoints.checkpoint(int(sys.argv[1]), 60)
    fork = os.fork()  # has the parent's end of the socket
    if not fork:
        os.close(1)
        signal.pause()
    print(fork, flush=True)
    sys.stdin.read()
checkpoints.checkpoint(int(sys.argv[1]), 60)
"""


@pytest.mark.parametrize("doing", ["idle", "in a call"])
def test_the_helper_ends_with_a_parent_that_is_killed(driver: Driver, doing: str) -> None:
    if doing == "in a call":
        driver.order("checkpoint", hang=True)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(driver.pid), doing], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(FAKE)},
    )  # fmt: skip
    assert parent.stdout
    fork = 0
    if doing == "idle":
        fork = int(parent.stdout.readline())
    else:
        driver.wait_until_it_hangs()
    (helper,) = driver.helpers()
    handle = os.pidfd_open(helper)
    links = {os.readlink(f"/proc/{helper}/fd/{number}") for number in (0, 1, 2)}
    assert links == {os.devnull}
    parent.kill()
    parent.communicate()
    ended, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    if fork:
        os.kill(fork, signal.SIGKILL)
    assert ended


def test_the_helper_survives_ctrl_c_of_the_terminal(checkpoints: DriverCheckpoints, driver: Driver) -> None:
    checkpoints.checkpoint(driver.pid, TIMEOUT_S)
    (helper,) = driver.helpers()
    assert os.getsid(helper) == helper


def test_what_is_missing_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def said() -> str:
        found = DriverCheckpoints().unavailable()
        assert found is not None
        assert not found.zh.isascii()
        return found.en

    before = {name for name in sys.modules if name.startswith("cuda.")}
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        assert "Linux on x86-64" in said()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "system", lambda: "Darwin")
        assert "Linux on x86-64" in said()
    with monkeypatch.context() as patch:
        patch.setattr(pynvml, "nvmlInit", no_library)
        assert "Install driver 570" in said()
    with monkeypatch.context() as patch:
        patch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54.15")
        assert "550.54.15 makes no checkpoints. Install driver 570" in said()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT)])
        assert "'gpu-managed-tts[checkpoint]'" in said()
    assert DriverCheckpoints().unavailable() is None
    assert not driver.log()
    assert {name for name in sys.modules if name.startswith("cuda.")} == before, "no CUDA in this process"
