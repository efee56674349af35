"""Calls of replicas by `RayTTS`, with replicas that end, fail, or do not answer."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="needs Ray: scripts/test_cluster installs it")

import ray
from ray.exceptions import ActorDiedError, RayError

from residency.cancellation import Cancellation, cancelled_by
from residency.cluster import ray_tts
from residency.cluster.ray_tts import KEPT_BYTES, NoReplica, RayTTS, ReplicasEnded, SharedRecordings
from residency.cluster.replica import Answered, Asked, failed
from residency.errors import DeviceLost, EngineUnavailable, InvalidInput, LoadTimeout, RequestStopped

SPOKEN = Answered(np.zeros(3, np.float32), 24_000)


class Response:
    def __init__(self, answer: Callable[[], Answered]) -> None:
        self._answer = answer

    def result(self, timeout_s: float) -> Answered:
        return self._answer()

    def cancel(self) -> None:
        pass


class Replicas:
    """Stands in for a handle; calls ``answer`` for each call."""

    def __init__(self, answer: Callable[[], Answered]) -> None:
        self.answer, self.call, self.calls = answer, self, 0
        self.responses: list[weakref.ref[Response]] = []

    def options(self, **options: object) -> Replicas:
        return self

    def remote(self, asked: Asked, recording: Any) -> Response:
        self.calls += 1
        response = Response(self.answer)
        self.responses.append(weakref.ref(response))
        return response


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ray, "put", lambda content: content)
    monkeypatch.setattr(ray_tts, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ray_tts, "LONGEST_PAUSE_S", 0.001)
    (tmp_path / "voice.wav").write_bytes(b"RIFF")
    return str(tmp_path / "voice.wav")


def raising(error: Exception) -> Callable[[], Answered]:
    def answer() -> Answered:
        raise error

    return answer


@pytest.mark.parametrize("ends", [raising(ActorDiedError()), lambda: failed(DeviceLost("Xid 79"))])
def test_a_request_that_ends_each_replica_ends_a_few_only(recording: str, ends: Callable[[], Answered]) -> None:
    replicas = Replicas(ends)
    with pytest.raises(ReplicasEnded):
        RayTTS(replicas, "tts", True).clone(recording, "one", "two")
    assert replicas.calls == ray_tts.ATTEMPTS


def test_a_call_waits_for_a_replica_up_to_its_time(recording: str) -> None:
    replicas = Replicas(raising(RayError()))
    with pytest.raises(NoReplica):
        RayTTS(replicas, "tts", True, timeout_s=0.1).clone(recording, "one", "two")
    assert replicas.calls > ray_tts.ATTEMPTS


@pytest.mark.parametrize("error", [InvalidInput("too long", "太长"), LoadTimeout("tts", 5.0)])
def test_an_error_of_the_engine_is_not_tried_again(recording: str, error: Exception) -> None:
    replicas = Replicas(lambda: failed(error))
    with pytest.raises(type(error)):
        RayTTS(replicas, "tts", True).clone(recording, "one", "two")
    assert replicas.calls == 1


FAULTS = [OSError(errno.ENOSPC, "no space left"), EngineUnavailable("no checkout", "没有代码"), ImportError("torch")]


@pytest.mark.parametrize("fault", FAULTS)
def test_another_replica_answers_if_the_machine_of_one_is_at_fault(recording: str, fault: Exception) -> None:
    answers = iter([failed(fault), failed(fault), SPOKEN])
    replicas = Replicas(lambda: next(answers))
    assert RayTTS(replicas, "tts", True).clone(recording, "one", "two")
    with pytest.raises(type(fault)):
        RayTTS(Replicas(lambda: failed(fault)), "tts", True).clone(recording, "one", "two")


def test_answers_of_a_request_are_dropped_one_by_one(recording: str) -> None:
    replicas = Replicas(lambda: SPOKEN)
    with cancelled_by(Cancellation()):
        for _ in range(5):
            RayTTS(replicas, "tts", True).clone(recording, "one", "two")
        gc.collect()
        assert not [response for response in replicas.responses if response() is not None]


def test_a_cancelled_request_does_not_wait_for_another_replica(recording: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tts, "FIRST_PAUSE_S", 1000.0)
    cancellation, called = Cancellation(), threading.Event()

    def answer() -> Answered:
        called.set()
        raise RayError

    threading.Thread(target=lambda: (called.wait(), cancellation.cancel())).start()
    with cancelled_by(cancellation), pytest.raises(RequestStopped):
        RayTTS(Replicas(answer), "tts", True, timeout_s=2000.0).clone(recording, "one", "two")


def test_the_calls_of_a_request_share_the_recording(tmp_path: Path) -> None:
    put: list[int] = []
    recordings = SharedRecordings(lambda content: put.append(len(content)) or object())
    (tmp_path / "a.wav").write_bytes(b"a" * 10)
    (tmp_path / "copy.wav").write_bytes(b"a" * 10)
    (tmp_path / "b.wav").write_bytes(b"b" * 20)
    first = recordings.stored(str(tmp_path / "a.wav"))
    assert recordings.stored(str(tmp_path / "copy.wav")) is first
    recordings.stored(str(tmp_path / "b.wav"))
    assert put == [10, 20]
    recordings.forget()
    assert recordings.stored(str(tmp_path / "a.wav")) is not first


def test_recordings_leave_the_store_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tts, "KEPT_BYTES", 25)
    assert KEPT_BYTES > 25
    recordings = SharedRecordings(lambda content: object())
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 10)
    first, second = (recordings.stored(str(tmp_path / name)) for name in "ab")
    recordings.stored(str(tmp_path / "c"))
    assert recordings.stored(str(tmp_path / "b")) is second
    assert recordings.stored(str(tmp_path / "a")) is not first
