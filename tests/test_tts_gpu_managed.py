"""`GPUManagedTTS` is StepAudioTTS to those who call it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from fakes import Gate

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
from residency.errors import InvalidInput
from tts_gpu_managed import GPUManagedTTS


class RecordingEngine:
    """Logs its calls, with the state in which they found it, and answers or raises as told."""

    def __init__(self, tts: GPUManagedTTS | None = None) -> None:
        self.weights = torch.ones(4)
        self.calls: list[tuple] = []
        self.states: list[str] = []
        self.raises: Exception | None = None
        self.raises_once: Exception | None = None
        self.answer = torch.rand(1, 10), 24000
        self.tts = tts

    def _call(self, *arguments: object) -> tuple[torch.Tensor, int]:
        self.calls.append(arguments)
        self.states.append(self.tts.get_gpu_status()["models"]["tts"]["state"])
        assert self.weights.sum() == 4
        once, self.raises_once = self.raises_once, None
        if once or self.raises:
            raise once or self.raises
        return self.answer

    def clone(self, prompt_wav_path, prompt_text, target_text):
        return self._call("clone", prompt_wav_path, prompt_text, target_text)

    def edit(self, input_audio_path, audio_text, edit_type, edit_info=None, text=None):
        return self._call("edit", input_audio_path, audio_text, edit_type, edit_info, text)


@pytest.fixture
def simulated(device: SimulatedDevice) -> Iterator[GPUResourceManager]:
    with GPUResourceManager(device) as manager:
        yield manager


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


@pytest.fixture
def tts(simulated: GPUResourceManager, engine: RecordingEngine) -> GPUManagedTTS:
    engine.tts = GPUManagedTTS(None, None, manager=simulated, load=lambda: engine)
    return engine.tts


def state(tts: GPUManagedTTS) -> str:
    return tts.get_gpu_status()["models"][tts.name]["state"]


def test_clone_and_edit_pass_arguments_and_results_through_unchanged(
    tts: GPUManagedTTS, engine: RecordingEngine
) -> None:
    expected = engine.answer[0].clone()
    answers = [
        tts.clone("a.wav", "said", "to say"),
        tts.edit("a.wav", "said", "speed", "faster"),
        tts.edit(input_audio_path="a.wav", audio_text="said", edit_type="paralinguistic", text="[Sigh]"),
    ]
    assert all(torch.equal(audio, expected) and rate == 24000 for audio, rate in answers)
    assert engine.calls == [
        ("clone", "a.wav", "said", "to say"),
        ("edit", "a.wav", "said", "speed", "faster", None),
        ("edit", "a.wav", "said", "paralinguistic", None, "[Sigh]"),
    ]
    assert engine.states == ["gpu"] * 3
    assert state(tts) == "cpu"


@pytest.mark.parametrize("error", [HTTPException(400, "Unsupported edit_type: x"), RuntimeError("broken"), OSError()])
def test_what_the_engine_raises_reaches_the_caller_and_the_model_leaves_the_device(
    tts: GPUManagedTTS, engine: RecordingEngine, error: Exception
) -> None:
    engine.raises = error
    with pytest.raises(type(error)) as raised:
        tts.edit("a.wav", "said", "x")
    assert raised.value is error
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


def test_two_in_one_process_have_names_of_their_own(simulated: GPUResourceManager, engine: RecordingEngine) -> None:
    first, second = (GPUManagedTTS(None, None, manager=simulated, load=lambda: engine) for _ in range(2))
    assert (first.name, second.name) == ("tts", "tts-2")
    with pytest.raises(ModelExists):
        GPUManagedTTS(None, None, manager=simulated, load=lambda: engine, name="tts")
    first.close()
    assert simulated.names() == ("tts-2",)
    assert GPUManagedTTS(None, None, manager=simulated, load=lambda: engine).name == "tts"


def test_without_a_manager_it_shares_the_one_of_the_process(engine: RecordingEngine) -> None:
    tts = GPUManagedTTS(None, None, load=lambda: engine, gpu_idle_timeout="5m", gpu_keep_warm=3)
    try:
        assert tts.manager is get_gpu_manager()
        status = tts.get_gpu_status()["models"]["tts"]
        assert (status["idle_timeout_s"], status["keep_warm_s"]) == (300, 3)
    finally:
        tts.manager.close()


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("full"), DeviceOutOfMemory(5, 1, "card"), RuntimeError("CUDA out of memory")]
)
def test_a_device_that_is_full_in_the_middle_of_a_request_is_emptied_and_asked_once_more(
    tts: GPUManagedTTS, engine: RecordingEngine, simulated: GPUResourceManager, error: Exception
) -> None:
    simulated.register("asr", lambda: RecordingEngine(), keep_warm=60)
    with simulated.lease("asr"):
        pass
    assert simulated.status()["models"]["asr"]["state"] == "gpu"
    engine.raises_once, expected = error, engine.answer[0].clone()
    audio, _ = tts.clone("a.wav", "said", "to say")
    assert torch.equal(audio, expected)
    assert len(engine.calls) == 2
    assert simulated.status()["models"]["asr"]["state"] == "cpu", "idle models make room"
    assert state(tts) == "cpu"


def test_a_device_that_stays_full_is_told(tts: GPUManagedTTS, engine: RecordingEngine) -> None:
    engine.raises = DeviceOutOfMemory(5, 1, "card")
    with pytest.raises(DeviceOutOfMemory):
        tts.clone("a.wav", "said", "to say")
    assert len(engine.calls) == 2
    engine.raises = None
    tts.clone("a.wav", "said", "to say")


def test_after_an_error_that_leaves_no_engine_usable_the_next_request_builds_a_new_one(
    tts: GPUManagedTTS, engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts.manager.device, "is_usable", lambda: False)
    engine.raises = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory"):
        tts.clone("a.wav", "said", "to say")
    assert state(tts) == "released"


def test_a_load_that_takes_too_long_is_given_up(simulated: GPUResourceManager, engine: RecordingEngine) -> None:
    gate = Gate()
    hangs = iter([True, False])

    def load() -> RecordingEngine:
        if next(hangs):
            gate.pass_through()
            return RecordingEngine()
        return engine

    tts = engine.tts = GPUManagedTTS(None, None, manager=simulated, load=load, gpu_load_timeout=0.5)
    with pytest.raises(LoadTimeout):
        tts.clone("a.wav", "said", "to say")
    gate.open()
    assert tts.clone("a.wav", "said", "to say")[1] == 24000


# -- what else the engine has -----------------------------------------------------------------------------------


class Rich(torch.nn.Module):
    """An engine with parts, containers, private methods, and methods that answer generators."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])
        self.named = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
        self.caches: dict[str, torch.Tensor] = {"latest": torch.ones(3)}
        self.weights, self.prompt, self.calls = torch.ones(3), "Edit.", 0

    clone = edit = _build = lambda self, *arguments: arguments

    def stream(self, count: int) -> Iterator[torch.Tensor]:
        self.calls += 1
        return (self.weights * number for number in range(count))


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
    given: list[dict[str, object]] = []
    monkeypatch.setattr(step_audio, "tts_shortcomings", lambda *_, **__: [])
    monkeypatch.setattr(step_audio, "build_tts", lambda path, make, root, **more: given.append(more) or Rich())
    for arguments in ({}, {"torch_dtype": None, "device_map": None, "model_source": None}):
        GPUManagedTTS("models", lambda: None, manager=simulated, **arguments).clone("a.wav", "said", "to say")
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
        engine = RecordingEngine()
        engine.tts = tts = GPUManagedTTS("weights", manager=simulated, load=lambda: engine)
        tts.check_text("你好，世界")
        assert not engine.states
        assert simulated.status()["models"]["tts"]["state"] == "released", "to ask does not load it"
        tts.clone("prompt.wav", "said", "你好，世界")
        assert engine.calls == [("clone", "prompt.wav", "said", "你好，世界")]

    def test_are_refused_by_a_check_that_is_given(self, simulated: GPUResourceManager) -> None:
        def check(text: str) -> None:
            raise InvalidInput("too rude", "太粗鲁")

        tts = GPUManagedTTS("weights", manager=simulated, load=RecordingEngine, check_text=check)
        with pytest.raises(InvalidInput, match="too rude"):
            tts.clone("prompt.wav", "said", "...")
        assert simulated.status()["models"]["tts"]["state"] == "released"
