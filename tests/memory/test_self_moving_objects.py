"""Objects that move themselves, other than vLLM: recognized by class, found wherever they are, moved in order."""

from __future__ import annotations

import ctypes
import gc
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.memory import self_moving
from residency.memory.discovery import discover
from residency.memory.self_moving import OwnMoves, moves_of, register

sys.path.append(str(Path(__file__).parents[1] / "support" / "stand_in_vllm"))

import vllm


@pytest.fixture
def manager() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30), keep_warm=-1) as manager:
        yield manager


class Own:
    """An object with the protocol of this project."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def offload_from_gpu(self) -> None:
        self.calls.append("offload")

    def restore_to_gpu(self) -> None:
        self.calls.append("restore")

    def release_from_gpu(self) -> None:
        self.calls.append("release")


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_any_object_with_the_protocol_is_moved_wherever_it_is_in_the_engine(manager: GPUResourceManager) -> None:
    own = Own()
    manager.register("tts", lambda: {"deep": [(own, "beside it")]})
    with manager.lease("tts"):
        pass
    manager.offload("tts")
    with manager.lease("tts"):
        pass
    manager.release("tts")
    assert own.calls == ["offload", "restore", "release"]


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_a_class_can_be_registered_by_name(manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch:
        on = True

    monkeypatch.setattr(self_moving, "_by_name", {})
    assert moves_of(Switch) is None
    moves = OwnMoves(lambda switch: setattr(switch, "on", False), lambda switch: setattr(switch, "on", True))
    register(f"{Switch.__module__.partition('.')[0]}.Switch", moves)
    switch = Switch()
    manager.register("tts", lambda: [switch])
    with manager.lease("tts"):
        assert switch.on
    manager.offload("tts")
    assert not switch.on


def test_a_call_that_waits_for_a_killed_worker_ends(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits:
        def __init__(self) -> None:
            self.child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            self.answers: queue.Queue[Exception] = queue.Queue()

        def speak(self) -> None:
            self.child.kill()
            raise self.answers.get(timeout=60)

    def end(thing: Any) -> None:
        thing.child.kill()
        thing.child.communicate()

    monkeypatch.setattr(self_moving, "_by_name", {})
    ended = OwnMoves(
        lambda thing: None, lambda thing: None, end, worker_ended=lambda thing: thing.answers.put(KeyError("ended"))
    )
    register(f"{Waits.__module__.partition('.')[0]}.Waits", ended)
    manager.register("tts", lambda: [Waits()])
    for _ in range(2):
        with pytest.raises(KeyError, match="ended"), manager.lease("tts") as engine:
            engine[0].speak()
    manager.release("tts")
    watching = [thread for thread in threading.enumerate() if thread.name == "gpu-worker-watch"]
    for thread in watching:
        thread.join(10)
    assert not any(thread.is_alive() for thread in watching)


def test_calls_of_vllm_that_wait_for_its_process_are_ended() -> None:
    waiting: Future[None] = Future()
    core = SimpleNamespace(utility_results={1: waiting}, outputs_queue=queue.Queue())
    moves = moves_of(vllm.LLM)
    assert moves is not None
    assert moves.worker_ended is not None
    moves.worker_ended(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)))
    with pytest.raises(RuntimeError, match="has ended"):
        waiting.result(timeout=0)
    assert "has ended" in str(core.outputs_queue.get_nowait())
    moves.worker_ended(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=None)))  # of another version


def test_classes_are_recognized_by_name_alone() -> None:
    def of(module: str, name: str) -> Any:
        return moves_of(type(name, (), {"__module__": module}))

    for module, name in [
        ("vllm.entrypoints.llm", "LLM"),
        ("sglang.srt.entrypoints.engine", "Engine"),
        ("ctranslate2._ext", "Whisper"),
        ("ctranslate2._ext", "Translator"),
    ]:
        assert of(module, name) is not None
        assert of(f"my_{module}", name) is None
    assert moves_of(type("Mine", (vllm.LLM,), {})) is not None


class Native:
    """Like the objects of CTranslate2, which the garbage collector does not track."""

    calls: list[str] = []  # noqa: RUF012
    device = "cuda"

    def unload_model(self, to_cpu: bool = False) -> None:
        self.calls.append(f"unload_model {to_cpu}")

    def load_model(self) -> None:
        self.calls.append("load_model")


Native.__module__ = "ctranslate2._ext"
Native.__name__ = "Whisper"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_object_in_native_code_is_found_and_moved_if_it_is_on_a_gpu(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    native = Native()
    ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(native))
    assert not gc.is_tracked(native)
    monkeypatch.setattr(Native, "calls", [])
    monkeypatch.setattr(Native, "device", device)
    manager.register("tts", lambda: {"asr": native})
    for move in (manager.offload, manager.release):
        with manager.lease("tts"):
            pass
        move("tts")
    moved = ["unload_model True", "load_model"] if device == "cuda" else []
    assert Native.calls == [*moved, "unload_model False"]


def test_an_object_that_moves_itself_is_not_entered() -> None:
    own = Own()
    own.hidden = torch.ones(3)  # type: ignore[attr-defined]
    found = discover([own])
    assert list(found.self_moving.values()) == [own]
    assert not found.tensors
