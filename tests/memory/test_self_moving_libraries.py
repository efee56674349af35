"""Libraries that move their own objects: each is called as its documentation says. Stand-ins note the calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.errors import SelfMoveFailed


class Noting:
    """Notes the calls of its methods, whatever their names; fails in the one called ``broken``."""

    device = "cuda"
    broken = ""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def _note(self, name: str, **arguments: Any) -> None:
        self.calls.append((name, arguments) if arguments else name)
        if name == self.broken:
            raise RuntimeError("an error of the library")

    def release_memory_occupation(self) -> None:
        self._note("release_memory_occupation")

    def resume_memory_occupation(self) -> None:
        self._note("resume_memory_occupation")

    def shutdown(self) -> None:
        self._note("shutdown")

    def unload_model(self, to_cpu: bool = False) -> None:
        self._note("unload_model", **({"to_cpu": True} if to_cpu else {}))

    def load_model(self) -> None:
        self._note("load_model")


def stand_in(module: str, name: str) -> Any:
    return type(name, (Noting,), {"__module__": module})()


SGLANG = ("sglang.srt.entrypoints.engine", "Engine")
WHISPER = ("ctranslate2._ext", "Whisper")
CALLS = [
    (SGLANG, ["release_memory_occupation", "resume_memory_occupation"], "shutdown"),
    (WHISPER, [("unload_model", {"to_cpu": True}), "load_model"], "unload_model"),
]


@pytest.fixture
def manager() -> Iterator[GPUResourceManager]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        yield manager


def use(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        pass


@pytest.mark.parametrize(("named", "moves", "release"), CALLS, ids=["sglang", "ctranslate2"])
@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_object_is_offloaded_restored_and_released_by_its_library(
    manager: GPUResourceManager, caplog: pytest.LogCaptureFixture, named: tuple[str, str], moves: Any, release: str
) -> None:
    thing = stand_in(*named)
    manager.register("tts", lambda: {"inside": thing})
    use(manager)
    assert manager.offload("tts")
    assert thing.calls == moves[:1]
    use(manager)
    assert manager.offload("tts")
    assert thing.calls == [*moves, moves[0]]
    manager.release("tts")
    assert thing.calls[3:] == [release]
    assert "nothing was found" not in caplog.text, "its size is unknown, and it leaves all the same"


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_a_faster_whisper_model_is_moved_by_the_model_in_it(manager: GPUResourceManager) -> None:
    recognizer = type("WhisperModel", (), {"__module__": "faster_whisper.transcribe"})()
    recognizer.model = stand_in(*WHISPER)
    manager.register("tts", lambda: recognizer)
    use(manager)
    assert manager.offload("tts")
    assert recognizer.model.calls == [("unload_model", {"to_cpu": True})]


@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_a_model_of_ctranslate2_on_the_cpu_is_only_released(
    manager: GPUResourceManager, caplog: pytest.LogCaptureFixture
) -> None:
    thing = stand_in(*WHISPER)
    thing.device = "cpu"
    manager.register("tts", lambda: [thing])
    use(manager)
    manager.offload("tts")
    assert thing.calls == []
    assert "nothing was found" in caplog.text
    manager.release("tts")
    assert thing.calls == ["unload_model"]


@pytest.mark.parametrize(("named", "moves", "release"), CALLS, ids=["sglang", "ctranslate2"])
@pytest.mark.in_process("looks at objects of the engine without a lease")
def test_an_error_of_a_library_is_shown_with_the_object_in_its_place(
    manager: GPUResourceManager, named: tuple[str, str], moves: Any, release: str
) -> None:
    thing = stand_in(*named)
    manager.register("tts", lambda: {"inside": thing}, keep_warm=-1)
    use(manager)
    thing.broken = moves[0] if isinstance(moves[0], str) else moves[0][0]
    with pytest.raises(SelfMoveFailed, match="an error of the library"):
        manager.offload("tts")
    assert manager.status()["models"]["tts"]["state"] == "gpu"
