"""What a worker reports during a call, and how a call is stopped."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_engines import LINUX, Engine, EngineError, Gate, started

from gpu_manager import Event, GPUResourceManager, SimulatedDevice, State
from residency import progress
from residency.cancellation import Cancellation, cancelled_by, checkpoint
from residency.errors import InvalidInput, RequestStopped, WorkerDied
from residency.workers import process
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX


class Logged(logging.Handler):
    def __init__(self, at_least: int = 1) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.come = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.come.release()


@pytest.fixture
def logged() -> Any:
    handler, logger = Logged(), logging.getLogger("an_engine")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


# -- progress and log records ---------------------------------------------------------------------------------------


def test_progress_of_a_load_is_shown(another: Callable[..., GPUManagedTTS], gate: Gate) -> None:

    def load() -> Engine:
        current = progress.current()
        current.enter("reading", 100)
        current.advance(100)
        gate()
        return Engine()

    tts = another(load)
    request = started(lambda: tts.pid())
    gate.reached()
    move = tts.manager.status()["models"][tts.name]["progress"]
    gate.open()
    request.result(60)
    assert (move["phase"], move["bytes"], move["total_bytes"]) == ("reading", 100, 100)


def test_progress_of_moves_is_shown(tts: GPUManagedTTS) -> None:
    shown: list[str] = []
    delivered = threading.Semaphore(0)

    def listener(event: Event) -> None:
        shown.append(event.phase)
        if event.what == "done":
            delivered.release()

    unsubscribe = tts.manager.subscribe(listener)
    tts.pid()
    tts.force_offload()
    tts.pid()
    for _move in ("load", "offload", "restore"):
        assert delivered.acquire(timeout=30)
    unsubscribe()
    assert {"building", "copying"} <= set(shown)


def test_log_records_appear_here(another: Callable[..., GPUManagedTTS], logged: Logged) -> None:
    def speak(engine: Engine) -> None:
        logger = logging.getLogger("an_engine")
        logger.debug("%s words", 3, extra={"words": 3, "lock": threading.Lock()})
        try:
            raise EngineError(5, device="cpu")
        except EngineError:
            logger.exception("no voice")

    another().use_part((), speak)
    for _ in range(2):
        assert logged.come.acquire(timeout=30)
    first, second = logged.records
    assert (first.levelname, first.getMessage(), first.words) == ("DEBUG", "3 words", 3)
    assert first.process != os.getpid()
    assert second.levelname == "ERROR"
    assert second.exc_info is not None
    assert isinstance(second.exc_info[1], EngineError)
    shown = logging.Formatter().format(second)
    assert shown.startswith("no voice\nTraceback")
    assert shown.endswith("EngineError: error 5 on cpu")


# -- stops ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_engine_with_checkpoints_stops(tts: GPUManagedTTS, gate: Gate) -> None:
    pid, cancellation = tts.pid(), Cancellation()

    def speak(engine: Engine) -> None:
        gate()
        while True:
            checkpoint()

    def request() -> None:
        with cancelled_by(cancellation):
            tts.use_part((), speak)

    running = started(request)
    gate.reached()
    cancellation.cancel()
    gate.open()
    with pytest.raises(RequestStopped):
        running.result(60)
    assert tts.pid() == pid


def test_a_cancelled_engine_without_checkpoints_is_ended(
    tts: GPUManagedTTS, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOPS_WITHIN_S", 0.1)
    pid, cancellation = tts.pid(), Cancellation()

    def request() -> None:
        with cancelled_by(cancellation):
            tts.call(gate)

    running = started(request)
    gate.reached()
    cancellation.cancel()
    with pytest.raises(RequestStopped):
        running.result(60)
    assert tts.pid() != pid


def test_the_answer_of_a_call_that_ends_in_time_is_kept(tts: GPUManagedTTS, gate: Gate) -> None:
    pid, cancellation = tts.pid(), Cancellation()

    def speak(engine: Engine) -> int:
        gate()
        return engine.pid()

    def request() -> int:
        with cancelled_by(cancellation):
            return int(tts.use_part((), speak))

    running = started(request)
    gate.reached()
    cancellation.cancel()
    gate.open()
    assert running.result(60) == pid


def interrupted(gate: Gate) -> None:
    """Sends Ctrl-C to this process once the engine is at the gate."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell

    def interrupt() -> None:
        gate.reached()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def test_an_interrupt_stops_an_engine_with_checkpoints(tts: GPUManagedTTS, gate: Gate) -> None:
    pid = tts.pid()

    def speak(engine: Engine) -> None:
        for step in itertools.count():
            checkpoint()
            threading.Event().wait(0.01)
            if step == 20:  # by now the caller waits: an interrupt within a send would end the worker
                Path(gate._reached).write_text("1")

    interrupted(gate)
    with pytest.raises(KeyboardInterrupt):
        tts.use_part((), speak)
    assert tts.manager.status()["models"][tts.name]["leases"] == 0
    assert tts.pid() == pid


def test_an_interrupt_ends_an_engine_without_checkpoints(
    tts: GPUManagedTTS, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOPS_WITHIN_S", 0.1)
    pid = tts.pid()
    interrupted(gate)
    with pytest.raises(KeyboardInterrupt):
        tts.call(gate)
    assert tts.pid() != pid


def test_an_interrupt_within_a_send_ends_the_connection(tts: GPUManagedTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would wait for the rest of the frame."""
    pid = tts.pid()
    channel = tts.manager._managed_models[tts.name].resident.worker._channel
    connection = channel._socket

    class Interrupted:
        def sendmsg(self, parts: Any, rights: Any) -> int:
            connection.send(parts[0][:5])
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

    monkeypatch.setattr(channel, "_socket", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tts.audio(3)
    assert tts.pid() != pid


# -- workers that hang ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(process, "PING_EVERY_S", 0.05)
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation="process", keep_warm=-1) as manager:
        manager._isolation._hangs_after_s = 1.0
        yield GPUManagedTTS(None, manager=manager, load=Engine, name="tts")


def test_a_stopped_worker_is_ended(impatient: GPUManagedTTS) -> None:
    pid = impatient.pid()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerDied, match="did not react"):
        impatient.audio(3)
    assert impatient.pid() != pid


def test_a_long_call_after_a_long_pause_is_no_hang(impatient: GPUManagedTTS, gate: Gate) -> None:
    """Only silence that follows a question counts."""
    pid = impatient.pid()
    worker = impatient.manager._managed_models["tts"].resident.worker
    running = started(impatient.call, gate)
    gate.reached()
    heard = worker._heard
    while worker._heard < heard + 40:  # two seconds of pings
        threading.Event().wait(0.01)
    gate.open()
    running.result(60)
    assert impatient.pid() == pid


def test_a_worker_that_is_stopped_in_an_offload_is_ended(impatient: GPUManagedTTS) -> None:
    pid = impatient.pid()
    os.kill(pid, signal.SIGSTOP)
    with suppress(WorkerDied):
        impatient.force_offload()
    assert impatient.manager.wait_for("tts", State.RELEASED, 60)
    assert impatient.pid() != pid


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_loader_that_refers_to_more_at_the_load_is_refused_then(isolated: GPUResourceManager) -> None:
    found: list[Any] = []
    isolated.register("later", lambda: found[0])
    found.append(threading.Lock())
    with pytest.raises(InvalidInput, match="cannot be sent to a worker process"), isolated.lease("later"):
        pass
    isolated.unregister("later")


class Counted:
    """A loader that counts how often it is pickled."""

    times = 0

    def __call__(self) -> Engine:
        return Engine()

    def __getstate__(self) -> dict[str, Any]:
        Counted.times += 1
        return {}


def test_a_loader_is_pickled_once_for_each_load(isolated: GPUResourceManager) -> None:
    isolated.register("counted", Counted())
    for load in (1, 2):
        with isolated.lease("counted") as engine:
            assert engine.volume == 1.0
        isolated.release("counted")
        assert Counted.times == 1 + load, "once for the check at the registration"
    isolated.unregister("counted")


def test_what_cannot_be_isolated_is_refused(isolated: GPUResourceManager, tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(InvalidInput, match="cannot be sent to a worker process"):
        isolated.register("refused", lambda: lock)
    with pytest.raises(InvalidInput, match="keep"):
        isolated.register("refused", Engine, keep=torch.nn.Linear(1, 1))
    assert "refused" not in isolated.names()
    device = SimulatedDevice(1 << 20)
    with pytest.raises(InvalidInput, match="snapshot"):
        GPUResourceManager(device, isolation="process", snapshot_dir=tmp_path)
    with pytest.raises(InvalidInput, match="none or process"):
        GPUResourceManager(device, isolation="container")


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InvalidInput, match="needs Linux"):
        GPUResourceManager(SimulatedDevice(1 << 20), isolation="process", residue="keep")


def test_a_load_that_takes_too_long_is_ended(another: Callable[..., GPUManagedTTS], gate: Gate) -> None:
    from residency.errors import LoadTimeout

    def load() -> Engine:
        gate()
        return Engine()

    tts = another(load, gpu_load_timeout=3)
    request = started(lambda: tts.pid())
    gate.reached()
    began_s = time.monotonic()
    with pytest.raises(LoadTimeout):
        request.result(60)
    assert time.monotonic() - began_s < 60
