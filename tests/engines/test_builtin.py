"""The built-in engine behaves as StepAudioTTS does, and says clearly what it cannot do."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hibari import Hibari

from residency.cancellation import Cancellation, cancelled_by
from residency.engines import builtin, world
from residency.engines.builtin import BuiltinEngine, HTTPException
from residency.errors import InvalidInput, RequestStopped

Write = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]
TEXT = "I would like to tell you about the weather. It should be sunny tomorrow."
EDITS = [("speed", "faster"), ("speed", "more slower"), ("denoise", None), ("vad", None), ("style", "whisper"),
         ("whisper", None)]  # fmt: skip


def check_speech(audio: torch.Tensor, sample_rate: int) -> np.ndarray:
    assert sample_rate == 24000
    assert audio.dtype == torch.float32
    assert audio.device.type == "cpu"
    assert audio.ndim == 2
    assert audio.shape[0] == 1
    assert torch.isfinite(audio).all()
    assert 0.02 < audio.abs().max() <= 1
    return audio[0].numpy()


def median_pitch(samples: np.ndarray) -> float:
    f0 = world.analyse(samples).f0
    return float(np.median(f0[f0 > 0]))


@pytest.fixture(scope="session")
def deep_speech(speech: np.ndarray) -> np.ndarray:
    """Another speaker: lower and with a longer vocal tract."""
    frames = world.analyse(speech)
    return world.synthesise(world.Frames(frames.f0 * 0.6, frames.envelope, frames.aperiodicity))


def test_clone_speaks_the_text_in_the_prompts_voice(
    engine: BuiltinEngine, write: Write, deep_speech: np.ndarray, hibari: Hibari
) -> None:
    said = check_speech(*engine.clone(write(deep_speech), "什么都可以", TEXT))
    assert len(said) == len(hibari(TEXT, seed=0))
    assert median_pitch(said) == pytest.approx(median_pitch(deep_speech), rel=0.1)
    assert median_pitch(said) < 0.75 * median_pitch(hibari(TEXT, seed=0))


def test_the_global_seed_decides(engine: BuiltinEngine, prompt: str) -> None:
    said = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        said.append(engine.clone(prompt, "a fox", TEXT)[0])
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_a_new_engine_says_the_same_whatever_the_old_one_did(engine: BuiltinEngine, prompt: str) -> None:
    for edit in EDITS:
        engine.edit(prompt, "", *edit)
    torch.manual_seed(7)
    old = engine.clone(prompt, "a fox", TEXT)[0]
    new_engine = BuiltinEngine()
    torch.manual_seed(7)
    assert torch.equal(new_engine.clone(prompt, "a fox", TEXT)[0], old)
    for edit in EDITS:
        assert torch.equal(new_engine.edit(prompt, "", *edit)[0], engine.edit(prompt, "", *edit)[0]), edit


def test_a_seed_of_its_own_leaves_the_global_generator_alone(prompt: str) -> None:
    seeded = BuiltinEngine(seed=3)
    state = torch.get_rng_state()
    first = seeded.clone(prompt, "a fox", "Hello there.")[0]
    assert torch.equal(seeded.clone(prompt, "a fox", "Hello there.")[0], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("edit_type", "edit_info"), EDITS)
def test_edits_answer_speech(engine: BuiltinEngine, prompt: str, edit_type: str, edit_info: str | None) -> None:
    check_speech(*engine.edit(prompt, "", edit_type, edit_info))


def test_edits_do_what_they_say(engine: BuiltinEngine, prompt: str, speech: np.ndarray) -> None:
    lengths = [
        len(engine.edit(prompt, "", "speed", info)[0][0]) for info in ("more faster", "faster", "slower", "more slower")
    ]
    assert lengths == sorted(lengths)
    assert lengths[1] < len(speech) < lengths[2]
    whispered = engine.edit(prompt, "", "style", "whisper")[0][0].numpy()
    assert np.allclose(whispered, world.whisper(speech), atol=0.02)


def test_edits_stack(engine: BuiltinEngine, write: Write, prompt: str) -> None:
    """Each edit works on the result of the one before, whispers included."""
    path = prompt
    for number, edit in enumerate([("style", "whisper"), ("vad", None), ("denoise", None), ("speed", "slower")]):
        audio = check_speech(*engine.edit(path, "", *edit))
        path = write(audio, name=f"{number}.wav", subtype="PCM_16")


@pytest.mark.parametrize("text", ["No.", "a", "hello world " * 80, "Dr. Smith paid $1,250.50 on 3/4/2024!"])
def test_short_long_and_odd_texts(engine: BuiltinEngine, prompt: str, text: str) -> None:
    said = check_speech(*engine.clone(prompt, "a fox", text))
    words = len(text.split())
    assert 0.1 * words < len(said) / 24000 < 1 + 4 * words


@pytest.mark.parametrize(
    ("prompt_text", "target_text", "says"),
    [("", "Hello.", "Prompt Text is empty"), ("a fox", " ", "Target Text is empty"),
     ("a fox", "你好，世界", "speaks English only"), ("a fox", "!!! ... 😀", "nothing to pronounce"),
     ("a fox", "word " * 1001, "5,004 characters"), ("a fox", "1" * 400, "cannot be pronounced")],
)  # fmt: skip
def test_texts_that_cannot_be_said(
    engine: BuiltinEngine, prompt: str, prompt_text: str, target_text: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        engine.clone(prompt, prompt_text, target_text)


def test_prompts_without_a_voice(engine: BuiltinEngine, write: Write, speech: np.ndarray) -> None:
    noise = (np.random.default_rng(0).standard_normal(48000) * 0.05).astype(np.float32)
    with pytest.raises(InvalidInput, match="No speech was found"):
        engine.clone(write(noise), "nobody", "Hello.")
    with pytest.raises(InvalidInput, match="voiced speech"):
        engine.clone(write(world.whisper(speech), name="w.wav"), "a fox", "Hello.")
    with pytest.raises(InvalidInput, match="is gone"):
        engine.clone("/nowhere.wav", "nobody", "Hello.")
    check_speech(*engine.clone(write(speech, name="still works.wav"), "a fox", "Hello."))


@pytest.mark.parametrize(
    ("edit_type", "edit_info"), [("emotion", "happy"), ("paralinguistic", None), ("style", "serious"), ("style", None)]
)
def test_what_only_the_real_model_can_do(
    engine: BuiltinEngine, prompt: str, edit_type: str, edit_info: str | None
) -> None:
    with pytest.raises(InvalidInput, match="--model-path") as refused:
        engine.edit(prompt, "", edit_type, edit_info)
    assert "speed, denoise, vad, style whisper" in refused.value.en


@pytest.mark.parametrize("edit_info", [None, "", "fastest"])
def test_speeds_that_do_not_exist(engine: BuiltinEngine, prompt: str, edit_info: str | None) -> None:
    with pytest.raises(InvalidInput, match="more faster"):
        engine.edit(prompt, "", "speed", edit_info)


@pytest.mark.parametrize("edit_type", ["louder", "", "clone"])
def test_unknown_edit_types_raise_what_step_audio_raises(engine: BuiltinEngine, prompt: str, edit_type: str) -> None:
    with pytest.raises(HTTPException, match="Unsupported edit_type") as refused:
        engine.edit(prompt, "", edit_type)
    assert refused.value.status_code == 400
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.status_code, again.detail) == (400, refused.value.detail)


def test_errors_are_logged_and_raised_as_they_are(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    failure = OSError("disk")

    def fail(samples: np.ndarray) -> np.ndarray:
        raise failure

    monkeypatch.setattr(builtin, "denoise", fail)
    with pytest.raises(OSError, match="disk") as raised:
        engine.edit(prompt, "", "denoise")
    assert raised.value is failure
    assert "Edit failed: disk" in caplog.text


def test_everything_that_holds_memory_is_there_from_the_start(engine: BuiltinEngine) -> None:
    from residency.memory.discovery import discover

    fresh = BuiltinEngine()
    before, used = discover(fresh), discover(engine)
    assert len(before.sessions) == 2
    assert any(path.startswith(".vad_model") for path in before.tensors)
    with_bytes = [{path for path, tensor in found.tensors.items() if tensor.numel()} for found in (before, used)]
    assert with_bytes[0] == with_bytes[1]
    assert set(before.sessions) == set(used.sessions)


def test_signatures_are_step_audios() -> None:
    clone = list(inspect.signature(BuiltinEngine.clone).parameters)
    edit = inspect.signature(BuiltinEngine.edit).parameters
    assert clone == ["self", "prompt_wav_path", "prompt_text", "target_text"]
    assert list(edit) == ["self", "input_audio_path", "audio_text", "edit_type", "edit_info", "text"]
    assert edit["edit_info"].default is None
    assert edit["text"].default is None


def test_edit_types_can_be_listed_without_loading_anything() -> None:
    script = (
        "import sys; from residency.engines.builtin import supported_edit_types\n"
        "assert list(supported_edit_types()) == ['clone', 'style', 'vad', 'denoise', 'speed']\n"
        "assert supported_edit_types()['speed'] == ['faster', 'slower', 'more faster', 'more slower']\n"
        "assert not {'torch', 'onnxruntime', 'hibari', 'scipy', 'soundfile', 'pyworld'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


class TestCancellation:
    def test_a_clone_ends_after_the_sentence_during_which_it_was_cancelled(
        self, engine: BuiltinEngine, prompt: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cancellation, said = Cancellation(), list[int]()
        convert = builtin.world.convert

        def cancel_in_the_second(*arguments: Any) -> Any:
            said.append(1)
            if len(said) == 2:
                cancellation.cancel()
            return convert(*arguments)

        monkeypatch.setattr(builtin.world, "convert", cancel_in_the_second)
        with cancelled_by(cancellation), pytest.raises(RequestStopped):
            engine.clone(prompt, "a fox", " ".join([TEXT] * 4))
        assert len(said) == 2
        assert engine.clone(prompt, "a fox", TEXT)[1] == 24000, "the next request is another one"

    def test_nothing_is_computed_for_an_edit_that_was_cancelled(
        self, engine: BuiltinEngine, prompt: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(builtin.world, "change_speed", lambda *_: pytest.fail("it is computed"))
        cancellation = Cancellation()
        cancellation.cancel()
        with cancelled_by(cancellation), pytest.raises(RequestStopped):
            engine.edit(prompt, "", "speed", "faster")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_text": " "}, "prompt_text"),
        ({"target_text": ""}, "target_text"),
        ({"target_text": "你好"}, "target_text"),
        ({"target_text": "..."}, "target_text"),
        ({"prompt_wav_path": "nowhere.wav"}, "recording"),
    ],
)
def test_an_error_names_what_it_is_about(
    engine: BuiltinEngine, prompt: str, change: dict[str, str], field: str
) -> None:
    given = {"prompt_wav_path": prompt, "prompt_text": "a fox", "target_text": TEXT}
    with pytest.raises(InvalidInput) as raised:
        engine.clone(**{**given, **change})
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("task", "info", "field"),
    [("emotion", "happy", "task"), ("style", "child", "sub_task"), ("speed", "twice", "sub_task")],
)
def test_an_error_of_an_edit_names_the_task_or_the_sub_task(
    engine: BuiltinEngine, prompt: str, task: str, info: str, field: str
) -> None:
    with pytest.raises(InvalidInput) as raised:
        engine.edit(prompt, "", task, info)
    assert raised.value.field == field
