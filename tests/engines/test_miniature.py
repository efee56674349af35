"""The contract of the adapter to Step-Audio-EditX, against a checkout in miniature with its shape and its traps."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature_checkout import CHECKOUT, make_recording, make_weights, run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recording(tmp_path_factory.mktemp("voice") / "voice.wav")


def test_speech_is_bit_identical_to_the_bare_engine_wherever_the_model_has_been(
    models: Path, voice: Path, tmp_path: Path
) -> None:
    script = """
bare = build()
expected = spoken(bare)
assert expected[0].dtype is torch.float32 and expected[0].shape[0] == 1 and expected[0].abs().max() > 0
assert not torch.equal(*expected), "the two differ"
for settings in ({}, {"snapshot_dir": FOLDER}, {"keep_warm": -1}):
    tts = managed(**settings)
    with closing(tts.manager):
        for turn, leave in enumerate([None, "offload", "release", "offload"]):
            if leave:
                assert getattr(tts, f"force_{leave}")() is True
                assert tts.manager.device.ledger_bytes == 0, "nothing of it is on the device"
            assert all(map(torch.equal, spoken(tts), expected)), (settings, turn)
        assert state(tts) == ("gpu" if "keep_warm" in settings else "cpu")
    assert tts.manager.device.ledger_bytes == 0
"""
    run(f"FOLDER = {str(tmp_path)!r}\n{script}", models, voice)


def test_nothing_is_imported_or_built_before_the_first_request(models: Path, voice: Path) -> None:
    script = """
tts = managed()
assert not {"tts", "tokenizer", "onnxruntime"} & set(sys.modules)
assert state(tts) == "released"
tts.clone(*SAY)
assert {"tts", "tokenizer", "onnxruntime"} <= set(sys.modules)
"""
    run(script, models, voice)


def test_a_load_in_the_middle_of_a_request_leaves_its_random_numbers_alone(models: Path, voice: Path) -> None:
    script = """
import random
import numpy as np
tts = managed()
torch.manual_seed(3); random.seed(3); np.random.seed(3)
with tts.lease():  # the load seeds everything with 0
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
torch.manual_seed(3); random.seed(3); np.random.seed(3)
assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
"""
    run(script, models, voice)


def test_everything_that_the_engine_holds_is_found(models: Path, voice: Path) -> None:
    """Compared with every tensor and session that came to life with it, by brute force."""
    script = """
from residency.memory.discovery import discover
import onnxruntime

def alive():
    gc.collect()
    things = gc.get_objects()
    return (
        {t.untyped_storage()._cdata: t for t in things if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes()},
        {id(s): s for s in things if type(s) is onnxruntime.InferenceSession},
    )

tensors_before, sessions_before = alive()
engine = build()
spoken(engine)
found = discover(engine)
tensors, sessions = alive()
import utils
module_globals = {window.untyped_storage()._cdata for window in utils.windows.values()}
missed = set(tensors) - set(tensors_before) - {t.untyped_storage()._cdata for t in found.tensors.values()}
assert missed == module_globals, [tensors[key].shape for key in missed]
assert set(sessions) - set(sessions_before) == set(map(id, found.sessions.values())) and len(found.sessions) == 1
paths = set(found.tensors)
assert {
    ".cosy_model.cosy_impl.flow.rand_noise", ".cosy_model.cosy_impl.flow.att_cache_buffer",
    ".cosy_model.cosy_impl.hift.stft_window", ".audio_tokenizer.kms", ".audio_tokenizer.funasr_model.model.cmvn",
} <= {path.replace("._buffers[\\'", ".").replace("._modules[\\'", ".").replace("\\']", "") for path in paths}, paths
"""
    run(script, models, voice)


def test_the_device_that_the_vocoder_remembers_stays_right(models: Path, voice: Path) -> None:
    script = """
tts = managed()
spoken(tts)
with tts.lease() as engine:
    stream = engine.cosy_model.cosy_impl
    remembered = vars(stream)["device"], vars(stream)["dtype"]
    parameter = next(stream.hift.parameters())
tts.force_offload()
with tts.lease() as engine:
    assert next(stream.hift.parameters()) is parameter and engine.cosy_model.cosy_impl is stream
    assert (parameter.device, parameter.dtype) == remembered
    assert engine.llm.lm_head.weight is engine.llm.embed_tokens.weight, "tied as before"
"""
    run(script, models, voice)


def test_errors_are_the_engines_own(models: Path, voice: Path) -> None:
    script = """
tts = managed()
try:
    tts.edit(VOICE, "what is said", "no such type")
except Exception as error:
    from tts import HTTPException
    assert type(error) is HTTPException
    assert (error.status_code, str(error)) == (400, "Unsupported edit_type: no such type")
else:
    raise AssertionError
assert state(tts) == "cpu" and tts.manager.device.ledger_bytes == 0
"""
    run(script, models, voice)


def test_whatever_else_the_engine_has_is_reached_under_a_lease(models: Path, voice: Path) -> None:
    script = """
tts = managed()
assert tts.edit_sys_prompt == "Edit the speech."
assert tts.detect_instruction_name("(softly) hello") == "softly"
assert tts.tokenizer.encode("ab") == [97, 98]
samples, rate = tts.process_audio_file(VOICE)
assert (len(samples), rate) == (16000, 16000)
codes, window = tts.preprocess_prompt_wav(VOICE)
assert state(tts) == "cpu"
assert window.sum() == torch.hann_window(240).sum(), "what is part of the engine is handed out as a copy"
assert tts.audio_tokenizer(torch.from_numpy(samples), rate) == codes
assert tts.audio_tokenizer.arguments["model_source"] == "auto"
tts.cosy_model.cosy_impl.hift.stft_window.zero_()
assert tts.cosy_model.cosy_impl.hift.stft_window.any()
assert "llm" in repr(tts.llm)
tokens = torch.tensor([[1, 2, 3]]), torch.tensor([codes])
parts = list(tts.cosy_model.token2wav_stream(*tokens))
assert torch.equal(torch.cat(parts, 1), tts.cosy_model.token2wav_nonstream(*tokens))
assert tts.llm.embed_tokens.weight.shape == (256, 64)
assert state(tts) == "cpu" and tts.manager.device.ledger_bytes == 0
before = tts.manager.device.ledger_bytes
for name in ("_private", "__deepcopy__", "_repr_html_"):
    assert not hasattr(tts, name)
tts.force_release()
assert not hasattr(tts, "_repr_html_") and state(tts) == "released", "who only looks loads nothing"
assert not hasattr(tts, "no_such_thing")
"""
    run(script, models, voice)


def test_a_program_that_uses_the_checkout_itself_needs_no_further_word(models: Path, voice: Path) -> None:
    """As in the public app: its modules are imported, its tokenizer is made or will be; only the class is another."""
    script = """
import os
os.environ.pop("STEP_AUDIO_ROOT")
sys.path.insert(0, CHECKOUT)
from model_loader import ModelSource
from tokenizer import StepAudioTokenizer
from tts import StepAudioTTS
import inspect
theirs = list(inspect.signature(StepAudioTTS).parameters)
assert list(inspect.signature(GPUManagedTTS).parameters)[: len(theirs)] == theirs
folder = os.path.join(MODELS, "Step-Audio-EditX")
def tokenizer():
    return StepAudioTokenizer(os.path.join(MODELS, "Step-Audio-Tokenizer"), model_source=ModelSource.LOCAL)
arguments = {"model_source": ModelSource.LOCAL, "tts_model_id": None, "quantization_config": "int8",
             "torch_dtype": torch.float16, "device_map": "cpu"}
bare = StepAudioTTS(folder, tokenizer(), **arguments)
expected = spoken(bare)
for ready in (False, True):
    manager = GPUResourceManager(SimulatedDevice(1 << 30))
    given = tokenizer() if ready else tokenizer
    tts = GPUManagedTTS(folder, given, **arguments, manager=manager)
    torch.manual_seed(99)  # where a request loads it, another one may be
    for leave in (tts.force_offload, tts.force_release, tts.force_offload):
        assert manager.device.ledger_bytes == 0
        assert tts.arguments == bare.arguments
        assert all(map(torch.equal, spoken(tts), expected)), ready
        leave()
    tts.close()
    assert manager.device.ledger_bytes == 0
    if ready:
        samples, rate = bare.process_audio_file(VOICE)
        assert given(torch.from_numpy(samples), rate) == bare.audio_tokenizer(torch.from_numpy(samples), rate)
    manager.close()
"""
    run(f"CHECKOUT = {str(CHECKOUT)!r}\n{script}", models, voice)


def test_a_request_that_is_cancelled_ends_with_the_next_step_of_the_language_model(models: Path, voice: Path) -> None:
    script = """
from residency.cancellation import Cancellation, cancelled_by
from residency.errors import RequestStopped
tts = managed(keep_warm=-1)
with closing(tts.manager):
    before = spoken(tts)
    cancellation, steps = Cancellation(), []
    def step(*_):
        steps.append(1)
        if len(steps) == 3:
            cancellation.cancel()
    with tts.lease() as engine:
        hook = engine.llm.lm_head.register_forward_pre_hook(step)
    try:
        with cancelled_by(cancellation):
            tts.clone(*SAY)
    except RequestStopped:
        pass
    else:
        raise AssertionError("it went on")
    assert len(steps) == 3, len(steps)
    hook.remove()
    assert tts.manager.history()["models"]["tts"]["totals"]["requests"].get("cancelled") == 1
    assert tts.get_gpu_status()["models"]["tts"]["last_error"] is None
    assert all(map(torch.equal, spoken(tts), before)), "the engine is as it was"
"""
    run(script, models, voice)
