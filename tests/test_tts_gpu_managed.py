"""`GPUManagedTTS` is StepAudioTTS to those who call it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import Worker
from managed_engines import LostDevice, OutOfMemoryError, RecordingEngine, Rich, hanging
from worker_engines import Gate as PipeGate

from gpu_manager import (
    DeviceOutOfMemory,
    GPUResourceManager,
    LoadTimeout,
    ModelExists,
    SimulatedDevice,
    State,
    get_gpu_manager,
)
from residency.engines import step_audio
from residency.engines.builtin import HTTPException
from residency.engines.text import speakable
from residency.errors import InvalidInput
from tts_gpu_managed import GPUManagedTTS


@pytest.fixture
def simulated(device: SimulatedDevice) -> Iterator[GPUResourceManager]:
    with GPUResourceManager(device) as manager:
        yield manager


@pytest.fixture
def tts(simulated: GPUResourceManager) -> GPUManagedTTS:
    return GPUManagedTTS(None, None, manager=simulated, load=RecordingEngine)


def raising(simulated: GPUResourceManager, *errors: Exception) -> GPUManagedTTS:
    """An engine whose first calls raise these errors."""
    return GPUManagedTTS(None, None, manager=simulated, load=partial(RecordingEngine, raises=errors))


def state(tts: GPUManagedTTS) -> str:
    return tts.get_gpu_status()["models"][tts.name]["state"]


def test_clone_and_edit_pass_arguments_and_results_through_unchanged(tts: GPUManagedTTS) -> None:
    answers = [
        tts.clone("a.wav", "said", "to say"),
        tts.edit("a.wav", "said", "speed", "faster"),
        tts.edit(input_audio_path="a.wav", audio_text="said", edit_type="paralinguistic", text="[Sigh]"),
    ]
    assert all(torch.equal(audio, RecordingEngine().answer[0]) and rate == 24000 for audio, rate in answers)
    assert tts.calls == [
        ("clone", "a.wav", "said", "to say"),
        ("edit", "a.wav", "said", "speed", "faster", None),
        ("edit", "a.wav", "said", "paralinguistic", None, "[Sigh]"),
    ]
    assert state(tts) == "cpu"


@pytest.mark.parametrize("call", ["clone", "edit"])
def test_the_model_is_on_the_device_during_a_call(simulated: GPUResourceManager, tmp_path: Path, call: str) -> None:
    gate = PipeGate(tmp_path)
    tts = GPUManagedTTS(None, None, manager=simulated, load=partial(RecordingEngine, passes=gate))
    worker = Worker(getattr(tts, call), "a.wav", "said", "to say")
    gate.reached()
    assert state(tts) == "gpu"
    gate.open()
    assert worker.result()[1] == 24000
    assert state(tts) == "cpu"


@pytest.mark.parametrize("error", [HTTPException(400, "Unsupported edit_type: x"), RuntimeError("broken"), OSError()])
def test_what_the_engine_raises_reaches_the_caller_and_the_model_leaves_the_device(
    simulated: GPUResourceManager, error: Exception, isolation: str
) -> None:
    tts = raising(simulated, error)
    with pytest.raises(type(error)) as raised:
        tts.edit("a.wav", "said", "x")
    assert raised.value is error or isolation == "process"
    assert (str(raised.value), raised.value.args) == (str(error), error.args)
    assert vars(raised.value) == vars(error)
    assert state(tts) == "cpu"


def test_the_signature_is_that_of_step_audio_tts_with_keywords_behind_it() -> None:
    parameters = list(inspect.signature(GPUManagedTTS).parameters.values())
    assert [parameter.name for parameter in parameters[:8]] == [
        "model_path", "audio_tokenizer", "model_source", "tts_model_id", "quantization_config", "torch_dtype",
        "device_map", "gpu_idle_timeout",
    ]  # fmt: skip
    assert parameters[6].default == "cuda"
    assert parameters[7].default == 600
    assert all(parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) for parameter in parameters[8:])


def test_force_offload_and_release(tts: GPUManagedTTS) -> None:
    tts.clone("a.wav", "said", "to say")
    assert tts.force_offload() is True
    assert tts.force_release() is True
    assert state(tts) == "released"


def test_a_lease_says_how_long_it_stays_and_the_calls_under_it_do_not_change_that(tts: GPUManagedTTS) -> None:
    with tts.lease(timeout="30s", keep_warm="5m"):
        tts.clone("a.wav", "said", "to say")
    model = tts.get_gpu_status()["models"]["tts"]
    assert (model["state"], model["keep_warm_s"], model["keep_warm_by"]) == ("gpu", 300, "request")
    tts.clone("a.wav", "said", "to say")
    assert tts.get_gpu_status()["models"]["tts"]["keep_warm_s"] == 0


def test_two_in_one_process_have_names_of_their_own(simulated: GPUResourceManager) -> None:
    first, second = (GPUManagedTTS(None, None, manager=simulated, load=RecordingEngine) for _ in range(2))
    assert (first.name, second.name) == ("tts", "tts-2")
    with pytest.raises(ModelExists):
        GPUManagedTTS(None, None, manager=simulated, load=RecordingEngine, name="tts")
    first.close()
    assert simulated.names() == ("tts-2",)
    assert GPUManagedTTS(None, None, manager=simulated, load=RecordingEngine).name == "tts"


def test_without_a_manager_it_shares_the_one_of_the_process() -> None:
    tts = GPUManagedTTS(None, None, load=RecordingEngine, gpu_idle_timeout="5m", gpu_keep_warm=3)
    try:
        assert tts.manager is get_gpu_manager()
        status = tts.get_gpu_status()["models"]["tts"]
        assert (status["idle_timeout_s"], status["keep_warm_s"]) == (300, 3)
    finally:
        tts.manager.close()


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("full"), DeviceOutOfMemory(5, 1, "card"), RuntimeError("CUDA out of memory")]
)
def test_a_device_that_is_full_in_the_middle_of_a_request_is_emptied_and_asked_once_more(
    simulated: GPUResourceManager, error: Exception
) -> None:
    tts = raising(simulated, error)
    simulated.register("asr", RecordingEngine, keep_warm=60)
    with simulated.lease("asr"):
        pass
    assert simulated.status()["models"]["asr"]["state"] == "gpu"
    audio, _ = tts.clone("a.wav", "said", "to say")
    assert torch.equal(audio, RecordingEngine().answer[0])
    assert len(tts.calls) == 2
    assert simulated.status()["models"]["asr"]["state"] == "cpu", "idle models make room"
    assert state(tts) == "cpu"


def test_a_device_that_stays_full_is_told(simulated: GPUResourceManager) -> None:
    tts = raising(simulated, *[DeviceOutOfMemory(5, 1, "card") for _ in range(2)])
    with pytest.raises(DeviceOutOfMemory):
        tts.clone("a.wav", "said", "to say")
    assert len(tts.calls) == 2
    tts.clone("a.wav", "said", "to say")


def test_after_an_error_that_leaves_no_engine_usable_the_next_request_builds_a_new_one() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with GPUResourceManager(LostDevice(1 << 30)) as manager:
        tts = raising(manager, error)
        with pytest.raises(RuntimeError, match="illegal memory"):
            tts.clone("a.wav", "said", "to say")
        assert state(tts) == "released"


def test_a_load_that_takes_too_long_is_given_up(simulated: GPUResourceManager, tmp_path: Path, isolation: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    limit_s = 0.5 if isolation == "none" else 5  # also for the start of the worker that succeeds
    tts = GPUManagedTTS(None, None, manager=simulated, load=partial(hanging, pipe), gpu_load_timeout=limit_s)
    with pytest.raises(LoadTimeout):
        tts.clone("a.wav", "said", "to say")
    with suppress(OSError):  # ended
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    pipe.unlink()
    assert tts.clone("a.wav", "said", "to say")[1] == 24000


# -- what else the engine has -----------------------------------------------------------------------------------


@pytest.fixture
def rich(simulated: GPUResourceManager) -> GPUManagedTTS:
    return GPUManagedTTS(None, None, manager=simulated, load=Rich)


def test_a_method_that_answers_a_generator_is_called_once_and_keeps_the_model_until_its_end(
    rich: GPUManagedTTS,
) -> None:
    stream = rich.stream(3)
    assert state(rich) == "gpu", "what it has begun is not moved under it"
    assert [part.sum().item() for part in stream] == [0, 3, 6]
    assert state(rich) == "cpu"
    assert rich.calls == 1
    stream = rich.stream(3)
    next(stream)
    assert state(rich) == "gpu"
    stream.close()
    assert state(rich) == "cpu"


def test_a_generator_that_nobody_wants_keeps_nothing(rich: GPUManagedTTS, simulated: GPUResourceManager) -> None:
    rich.stream(3)
    assert simulated.wait_for("tts", State.HOST, 60)


def test_private_methods_are_reached_too_but_for_what_tools_look_for(rich: GPUManagedTTS) -> None:
    for name in ("__deepcopy__", "_repr_html_", "_ipython_display_"):
        assert not hasattr(rich, name)
    assert state(rich) == "released"
    assert rich._build(1, 2) == (1, 2)
    assert not hasattr(rich, "_no_such_thing")


def test_what_would_be_set_on_the_wrong_object_is_refused_with_what_to_do(rich: GPUManagedTTS) -> None:
    for target in (rich, rich.blocks):
        with pytest.raises(AttributeError, match=r"'prompt' cannot be set on .*with tts\.lease\(\) as engine"):
            target.prompt = "OTHER"
    with rich.lease() as engine:
        engine.prompt = "OTHER"
    assert rich.prompt == "OTHER"

    class Mine(GPUManagedTTS):
        extra = None

    mine = Mine(None, None, manager=rich.manager, load=Rich)
    mine.extra = 1
    assert mine.extra == 1


def test_parts_that_are_containers_are_used_like_them(rich: GPUManagedTTS, simulated: GPUResourceManager) -> None:
    assert len(rich.blocks) == 2
    assert rich.blocks
    assert "blocks[0]" in repr(rich.blocks[0])
    assert torch.equal(rich.blocks[0].weight, next(iter(rich.blocks)).weight)
    assert rich.blocks[-1](torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert list(rich.named) == ["a"]
    assert "a" in rich.named
    assert rich.named["a"].in_features == 2
    cached = rich.caches["latest"]
    rich.force_offload()
    assert cached.tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="len"):
        iter(rich.blocks[0])
    assert simulated.device.ledger_bytes == 0


def test_arguments_reach_the_engine_as_they_were_given_also_none(
    simulated: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_audio, "tts_shortcomings", lambda *_, **__: [])
    monkeypatch.setattr(step_audio, "build_tts", lambda path, make, root, **more: Rich(more))
    given = [
        GPUManagedTTS("models", lambda: None, manager=simulated, **arguments).given
        for arguments in ({}, {"torch_dtype": None, "device_map": None, "model_source": None})
    ]
    plain = {"tts_model_id": None, "quantization_config": None, "device_map": "cuda"}
    assert given == [plain, {**plain, "torch_dtype": None, "device_map": None, "model_source": None}]
    assert "own default" in repr(inspect.signature(GPUManagedTTS).parameters["torch_dtype"].default)


class TestTextsThatTheEngineCannotSay:
    def test_are_refused_before_it_is_loaded(self, simulated: GPUResourceManager) -> None:
        tts = GPUManagedTTS(None, manager=simulated)
        for refuse in (tts.check_text, lambda text: tts.clone("prompt.wav", "said", text)):
            with pytest.raises(InvalidInput, match="English only"):
                refuse("你好，世界")
            with pytest.raises(InvalidInput, match="is empty"):
                refuse(None)
        assert simulated.status()["models"]["tts"]["last_move"] is None
        assert simulated.status()["models"]["tts"]["state"] == "released"

    def test_are_for_the_engine_to_refuse_if_nobody_else_can(self, simulated: GPUResourceManager) -> None:
        tts = GPUManagedTTS("weights", manager=simulated, load=RecordingEngine)
        tts.check_text("你好，世界")
        assert simulated.status()["models"]["tts"]["state"] == "released", "to ask does not load it"
        tts.clone("prompt.wav", "said", "你好，世界")
        assert tts.calls == [("clone", "prompt.wav", "said", "你好，世界")]

    def test_are_refused_for_step_audio_too(self, simulated: GPUResourceManager) -> None:
        tts = GPUManagedTTS("weights", lambda: None, manager=simulated)
        with pytest.raises(InvalidInput, match="does not speak"):
            tts.clone("prompt.wav", "said", "Привет, мир")
        assert simulated.status()["models"]["tts"]["state"] == "released"
        tts.check_text("你好，世界")

    def test_are_refused_as_the_new_text_of_an_edit(self, simulated: GPUResourceManager) -> None:
        tts = GPUManagedTTS("weights", lambda: None, manager=simulated, load=RecordingEngine, check_text=speakable)
        with pytest.raises(InvalidInput, match="English only"):
            tts.edit("a.wav", "Привет", "paralinguistic", None, "Привет [Sigh]")
        assert simulated.status()["models"]["tts"]["state"] == "released"
        tts.edit("a.wav", "Привет", "emotion", "happy", "Привет")  # keeps the words of the recording
        assert tts.calls == [("edit", "a.wav", "Привет", "emotion", "happy", "Привет")]

    def test_are_refused_by_a_check_that_is_given(self, simulated: GPUResourceManager) -> None:
        def check(text: str) -> None:
            raise InvalidInput("too rude", "太粗鲁")

        tts = GPUManagedTTS("weights", manager=simulated, load=RecordingEngine, check_text=check)
        with pytest.raises(InvalidInput, match="too rude"):
            tts.clone("prompt.wav", "said", "...")
        assert simulated.status()["models"]["tts"]["state"] == "released"
