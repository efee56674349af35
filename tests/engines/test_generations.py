"""Both generations of the public engine are recognized by their source, and driven with their own arguments."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from miniature_checkout import CHECKOUT
from miniature_checkout import run_newer as play

import app
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines import step_audio
from residency.engines.generations import TRANSFORMERS, VLLM, check_flags, generation_of
from residency.errors import EngineUnavailable, InvalidInput
from residency.launch.settings import parse
from residency.web.editx_tab import EditxTab
from tts_gpu_managed import GPUManagedTTS

# -- recognized by what it is -----------------------------------------------------------------------------------


def test_a_generation_is_recognized_without_importing_anything(newer: Path) -> None:
    before = set(sys.modules)
    assert generation_of(CHECKOUT) is TRANSFORMERS
    assert generation_of(newer) is VLLM
    assert not (set(sys.modules) - before) & {"tts", "vllm", "model_loader"}


def test_arguments_that_a_later_version_adds_change_nothing(newer: Path) -> None:
    file = newer / "tts.py"
    file.write_text(file.read_text().replace("cosyvoice_cuda_graph=True,\n", "cosyvoice_cuda_graph=True,\n  more=1,\n"))
    assert generation_of(newer) is VLLM


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_model_len=8192", "context=8192", ["max_model_len", "context", "vLLM"]),
        (
            "prompt_wav_path, prompt_text, edit_type",
            "wav, text, kind",
            ["edit(prompt_wav_path", "edit(wav, text, kind"],
        ),
        ("class StepAudioTTS", "class Other", ["no class StepAudioTTS"]),
        ("class StepAudioTTS", "class StepAudioTTS(", ["cannot be read"]),
    ],
)
def test_an_unknown_one_is_refused_with_what_differs(newer: Path, old: str, new: str, said: list[str]) -> None:
    file = newer / "tts.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(EngineUnavailable) as refused:
        step_audio.shortcomings("models", str(newer))
    assert all(each in refused.value.en for each in said)


@pytest.mark.parametrize(
    ("prefix", "encoding"), [("", "utf-8-sig"), ("# -*- coding: gbk -*-\n# 编辑\n", "gbk")], ids=["bom", "gbk"]
)
def test_a_file_in_any_encoding_that_python_reads_is_recognized(newer: Path, prefix: str, encoding: str) -> None:
    file = newer / "tts.py"
    file.write_text(prefix + file.read_text(), encoding=encoding)
    assert generation_of(newer) is VLLM


@pytest.mark.parametrize("line", ["x = " + "-" * 50_000 + "1", "x = a" + ".b" * 50_000], ids=["unary", "attributes"])
def test_a_file_that_is_too_deep_for_the_parser_is_refused(newer: Path, line: str) -> None:
    with (newer / "tts.py").open("a") as file:
        file.write(line)
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        generation_of(newer)


def test_the_drop_in_refuses_an_unknown_one_at_the_start(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = newer / "tts.py"
    file.write_text(file.read_text().replace("max_model_len=8192", "context=8192"))
    monkeypatch.setenv("STEP_AUDIO_ROOT", str(newer))
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        with pytest.raises(EngineUnavailable, match="has max_model_len, this one has context"):
            GPUManagedTTS("models", manager=manager)
        assert manager.status()["models"] == {}


# -- flags and arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "flags", "named"),
    [
        (TRANSFORMERS, {"max_model_len": 3072, "dtype": "float16"}, "--max-model-len, --dtype"),
        (TRANSFORMERS, {"cosyvoice_cuda_graph": False}, "--no-cosyvoice-cuda-graph"),
        (TRANSFORMERS, {"cosyvoice_cuda_graph": True}, "--cosyvoice-cuda-graph"),
        (TRANSFORMERS, {"quantization": "fp8"}, "--quantization fp8"),
        (VLLM, {"torch_dtype": "float16"}, "--torch-dtype"),
        (VLLM, {"quantization": "int4"}, "--quantization int4"),
        (VLLM, {"tokenizer_model_id": "x"}, "--tokenizer-model-id"),
    ],
)
def test_a_flag_of_the_other_generation_is_refused_by_name(generation: Any, flags: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_flags(generation, flags)
    assert named in refused.value.en
    assert named in refused.value.zh
    check_flags(generation, dict.fromkeys(flags))


def test_the_newer_engine_is_built_with_the_arguments_of_its_app(newer: Path, models: Path, voice: Path) -> None:
    script = """
engine = build(managed=False)
assert engine.arguments == dict(
    model_path=f"{MODELS}/Step-Audio-EditX", model_source="auto", tts_model_id=None, quantization=None,
    tensor_parallel_size=1, gpu_memory_utilization=0.5, max_model_len=3072, enforce_eager=False, dtype="bfloat16",
    kv_cache_dtype=None, max_num_seqs=None, max_num_batched_tokens=None, cosyvoice_dtype="float32",
    cosyvoice_cuda_graph=True), engine.arguments
assert engine.audio_tokenizer.arguments["encoder_path"] == f"{MODELS}/Step-Audio-Tokenizer"
assert not vllm.LLM.built[-1]["enable_sleep_mode"], "without management nothing changes"
assert os.environ["VLLM_ATTENTION_BACKEND"] == "TRITON_ATTN"
given = dict(quantization="fp8", tensor_parallel_size=2, gpu_memory_utilization=0.3, max_model_len=9,
    enforce_eager=True, dtype="float16", kv_cache_dtype="fp8", max_num_seqs=3, max_num_batched_tokens=4,
    cosyvoice_dtype="float16", cosyvoice_cuda_graph=False)
engine = build(managed=False, tokenizer_path=f"{MODELS}/Step-Audio-Tokenizer", **given)
assert given.items() <= engine.arguments.items()
"""
    play(script, models, voice, newer)


def test_a_managed_engine_can_leave_the_gpu_and_the_checkout_is_as_it_was(
    newer: Path, models: Path, voice: Path
) -> None:
    script = """
engine = build()
assert vllm.LLM.built[-1]["enable_sleep_mode"]
assert engine.cosy_model.enable_cuda_graph is False
import model_loader
assert model_loader.LLM is vllm.LLM
assert build(cosyvoice_cuda_graph=True).cosy_model.enable_cuda_graph is True
"""
    play(script, models, voice, newer)


def test_cuda_graphs_that_are_asked_for_are_said_at_the_start_with_two_ways_out(newer: Path, models: Path) -> None:
    model = str(models / "Step-Audio-EditX")
    said = [each.en for each in step_audio.shortcomings(model, str(newer), cosyvoice_cuda_graph=True)]
    assert len([each for each in said if "Leave the flag out" in each and "--gpu-idle-timeout" in each]) == 1
    assert step_audio.shortcomings(model, str(newer)) == []
    assert step_audio.shortcomings(model, str(newer), cosyvoice_cuda_graph=True, managed=False) == []


def test_the_drop_in_takes_the_arguments_of_either_generation(newer: Path, models: Path, voice: Path) -> None:
    script = """
from residency.errors import InvalidInput
from tokenizer_of import make

def drop_in(**arguments):
    return GPUManagedTTS(f"{MODELS}/Step-Audio-EditX", make, manager=GPUResourceManager(SimulatedDevice(4 << 30)),
                         name="tts", **arguments)

tts = drop_in(max_model_len=3000, gpu_memory_utilization=0.2)
audio, rate = tts.clone(*SAY)
assert tts.arguments["max_model_len"] == 3000
assert tts.arguments["cosyvoice_cuda_graph"] is False
edits = [tts.edit(VOICE, "what is said", "speed", "faster", "text")[0],
         tts.edit(input_audio_path=VOICE, audio_text="what is said", edit_type="speed", edit_info="faster",
                  text="text")[0],
         tts.edit(prompt_wav_path=VOICE, prompt_text="what is said", edit_type="speed", edit_info="faster",
                  target_text="text")[0]]
assert torch.equal(edits[0], edits[1]) and torch.equal(edits[0], edits[2])
for arguments, error in [(dict(torch_dtype="x"), InvalidInput), (dict(max_modl_len=3), TypeError)]:
    try:
        drop_in(**arguments)
    except error as refused:
        print(refused)
    else:
        raise AssertionError(arguments)
try:
    tts.edit(VOICE, "x", "speed", text="a", target_text="b")
except TypeError as refused:
    print(refused)
tts.manager.close()
"""
    helper = """
def make():
    import sys, tokenizer
    return tokenizer.StepAudioTokenizer(sys.argv[1] + "/Step-Audio-Tokenizer")
"""
    (models / "tokenizer_of.py").write_text(helper)
    said = play(f"import sys; sys.path.append({str(models)!r})\n{script}", models, voice, newer)
    assert "torch_dtype: only StepAudioTTS of Step-Audio-EditX of 2025" in said
    assert "unexpected keyword argument max_modl_len" in said
    assert "by two names" in said


@pytest.mark.parametrize("generation", [TRANSFORMERS, VLLM])
def test_the_page_of_the_app_follows_the_generation(newer: Path, models: Path, tmp_path: Path, generation: Any) -> None:
    checkout, folder = (newer, models / "Step-Audio-EditX") if generation is VLLM else (CHECKOUT, models)
    settings = parse(["--model-path", str(folder), "--step-audio-root", str(checkout), "--tmp-dir", str(tmp_path)], {})
    chosen = app.choose_engine(settings)
    assert ("laugh" in chosen.page["more_tags"]) == chosen.page["clone_appends"] == (generation is VLLM)
    soundfile.write(tmp_path / "long.wav", np.zeros(80_000, np.float32), 1000)
    assert chosen.check_audio is not None
    with pytest.raises(InvalidInput, match="3,072") if generation is VLLM else nullcontext():
        chosen.check_audio(str(tmp_path / "long.wav"))
    assert chosen.check_text is not None
    with pytest.raises(InvalidInput, match="does not speak"):
        chosen.check_text("Привет, мир")
    for text, given in ((1000, settings), (7, replace(settings, max_text=7))):
        limits = EditxTab(given, tts_engine=None, **chosen.page).speech.limits
        assert (limits.target_text, limits.text) == (text, 5000 if text == 1000 else 7), "as in both public apps"


@pytest.mark.parametrize("where", ["beside", "inside", "named"])
def test_the_tokenizer_is_found_where_the_public_app_looks(newer: Path, models: Path, where: str) -> None:
    model, tokenizer = models / "Step-Audio-EditX", models / "Step-Audio-Tokenizer"
    flags: dict[str, Any] = {}
    if where == "inside":
        shutil.move(tokenizer, model / "Step-Audio-Tokenizer")
    if where == "named":
        shutil.move(tokenizer, models / "mine")
        flags["tokenizer_path"] = str(models / "mine")
    assert step_audio.shortcomings(str(model), str(newer), **flags) == []
    assert "missing" in step_audio.shortcomings(str(models), str(newer))[0].en, "the older generation's path"


def test_on_a_hub_the_tokenizer_is_beside_the_model() -> None:
    for source in ("auto", "huggingface"):
        assert VLLM.folders("stepfun-ai/Step-Audio-EditX", source, {}) == (
            "stepfun-ai/Step-Audio-Tokenizer",
            "stepfun-ai/Step-Audio-EditX",
        )


def test_an_id_of_a_hub_has_the_form_of_the_generation(
    newer: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for checkout, model_path, other in (
        (CHECKOUT, "stepfun-ai", "stepfun-ai/Step-Audio-EditX"),
        (newer, "stepfun-ai/Step-Audio-EditX", "stepfun-ai"),
    ):
        assert "Hugging Face" in step_audio.shortcomings(model_path, str(checkout))[0].en
        for source in ("auto", "huggingface"):
            with pytest.raises(InvalidInput, match=f"no id like {model_path}"):
                step_audio.shortcomings(other, str(checkout), model_source=source)
