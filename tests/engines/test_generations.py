"""Both generations of the public engine are recognized by their source, and driven with their own arguments."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from miniature_checkout import CHECKOUT, make_newer_checkout, run

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines import checkout as checkouts
from residency.engines import step_audio, transformers_versions
from residency.engines.generations import TRANSFORMERS, VLLM, check_audio, check_flags, generation_of
from residency.errors import EngineUnavailable, InvalidInput
from tts_gpu_managed import GPUManagedTTS

NEWER = """
import os
import vllm

def build(**flags):
    return step_audio.build(f"{MODELS}/Step-Audio-EditX", **flags)

def managed(**settings):
    manager = GPUResourceManager(SimulatedDevice(4 << 30), **settings)
    return GPUManagedTTS(MODELS, load=build, manager=manager, name="tts")
"""


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    return make_newer_checkout(tmp_path / "newer")


def play(script: str, models: Path, voice: Path, checkout: Path) -> str:
    return run(NEWER + script, models, voice, checkout)


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


# -- requirements and traps -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_requirements_in_a_pyproject_are_compared_and_installed_by_uv(newer: Path) -> None:
    (newer / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=3.99"\n'
        'dependencies = ["not-here>=2", "numpy", "torch>=99 ; python_version > \'3\'"]\n'
    )
    unmet = checkouts.unmet(newer)
    assert next(iter(unmet)) == "not-here>=2"
    assert unmet.keys() == {"not-here>=2", "python>=3.99", "torch>=99"}
    advice = checkouts.unmet_advice(newer, unmet)
    assert advice is not None
    assert f"uv pip install --python {sys.executable} -r {newer}/pyproject.toml" in advice.en
    (newer / "pyproject.toml").write_text("not toml [")
    assert checkouts.unmet(newer) == {}


def test_an_environment_of_uv_without_pip_is_given_a_command_of_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements.txt").write_text("not-here\n")
    find = checkouts.importlib.util.find_spec
    monkeypatch.setattr(checkouts.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    advice = checkouts.unmet_advice(tmp_path, checkouts.unmet(tmp_path))
    assert advice is not None
    assert "uv pip install --python" in advice.en


def test_whisper_that_does_not_build_with_the_newest_setuptools_is_given_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("openai-whisper==20240930\n")
    advice = checkouts.unmet_advice(tmp_path, {"openai-whisper==20240930": None})
    assert advice is not None
    assert '"setuptools<81"' in advice.en
    assert "--no-build-isolation" in advice.zh


def test_a_version_of_transformers_that_hums_is_said_at_the_start(models: Path, tmp_path: Path) -> None:
    checkout = Path(shutil.copytree(CHECKOUT, tmp_path / "checkout"))
    (checkout / "requirements.txt").write_text("transformers==4.53.3\n")
    said = [each.en for each in step_audio.shortcomings(str(models), str(checkout))]
    assert any("hum or stay silent" in each and "transformers==4.53.3" in each for each in said)
    (checkout / "requirements.txt").write_text("transformers\n")
    assert step_audio.shortcomings(str(models), str(checkout)) == []


def test_a_version_of_transformers_with_other_templates_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, newer: Path, models: Path
) -> None:
    def said() -> list[str]:
        found = step_audio.shortcomings(str(models / "Step-Audio-EditX"), str(newer))
        assert all(each.en.split()[-1] == each.zh.split()[-1] for each in found)
        return [each.en for each in found if "chat template" in each.en]

    monkeypatch.setattr(transformers_versions, "installed_version", lambda package: "5.0.0")
    assert said() == [], "it does not use transformers"
    project = newer / "pyproject.toml"
    project.write_text(project.read_text().replace('"numpy",', '"numpy",\n    "transformers>=4.57.3",'))
    (warning,) = said()
    assert "With transformers 5.0.0 each request" in warning
    assert "uv pip install 'transformers>=4.57.3,<5'" in warning
    monkeypatch.setattr(transformers_versions, "installed_version", lambda package: "4.57.6")
    assert said() == []


def test_an_untied_head_is_refused_after_the_load(models: Path, voice: Path, tmp_path: Path) -> None:
    checkout = Path(shutil.copytree(CHECKOUT, tmp_path / "checkout"))
    loader = checkout / "model_loader.py"
    text = loader.read_text().replace(
        "        self.lm_head.weight = self.embed_tokens.weight\n",
        "        self.config = type('Config', (), {'tie_word_embeddings': True})\n"
        "        self.get_input_embeddings = lambda: self.embed_tokens\n"
        "        self.get_output_embeddings = lambda: self.lm_head\n",
    )
    loader.write_text(text)
    script = """
from residency.errors import EngineUnavailable
try:
    build()
except EngineUnavailable as error:
    print(error)
"""
    assert "does not tie" in run(script, models, voice, checkout)


@pytest.mark.parametrize(
    ("generation", "max_model_len", "longest_s"), [(TRANSFORMERS, None, 192), (VLLM, 3072, 69), (VLLM, None, 192)]
)
def test_a_recording_beyond_the_context_is_refused_before_a_load(
    tmp_path: Path, generation: Any, max_model_len: int | None, longest_s: int
) -> None:
    def recording(seconds: float) -> str:
        soundfile.write(tmp_path / "long.wav", np.zeros(int(seconds * 1000), np.float32), 1000)
        return str(tmp_path / "long.wav")

    check_audio(generation, max_model_len, recording(longest_s - 1))
    with pytest.raises(InvalidInput, match=f"takes {longest_s} s at most") as refused:
        check_audio(generation, max_model_len, recording(longest_s + 1))
    assert ("--max-model-len" in refused.value.en) == (max_model_len == 3072)
    check_audio(generation, max_model_len, "no file")


def test_the_drop_in_refuses_a_long_recording_and_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("STEP_AUDIO_ROOT", str(CHECKOUT))
    soundfile.write(tmp_path / "long.wav", np.zeros(200_000, np.float32), 1000)
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        tts = GPUManagedTTS(str(models / "Step-Audio-EditX"), lambda: None, manager=manager)
        for speak in (lambda path: tts.clone(path, "a", "b"), lambda path: tts.edit(path, "a", "speed")):
            with pytest.raises(InvalidInput, match="shorten it"):
                speak(str(tmp_path / "long.wav"))
        assert tts.get_gpu_status()["models"]["tts"]["last_move"] is None


# -- the engine is managed whole --------------------------------------------------------------------------------


def test_speech_is_the_same_across_offload_release_and_keep_warm(newer: Path, models: Path, voice: Path) -> None:
    script = """
bare = build(managed=False)
expected = spoken(bare)
bare.llm.llm_engine.engine_core.shutdown()
with closing(managed()) as tts:
    configure = tts.manager.configure
    for change in (lambda: None, tts.force_offload, tts.force_release, lambda: configure("tts", keep_warm=60),
                   tts.force_offload, lambda: configure("tts", keep_warm=0), tts.force_release):
        change()
        assert all(map(torch.equal, spoken(tts), expected))
    assert tts.llm.generate is not None
tts.manager.close()
import psutil
assert psutil.Process().children() == []
"""
    play(script, models, voice, newer)


def test_the_memory_of_the_process_tree_is_that_of_the_status(newer: Path, models: Path, voice: Path) -> None:
    script = """
import psutil

def tree():
    def private(pid):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_Dirty"))
    return sum(private(child.pid) for child in psutil.Process().children(recursive=True))

tts = managed(keep_warm=-1)
tts.clone(*SAY)
there = tts.get_gpu_status()["models"]["tts"]
assert tree() > 100 << 20
assert there["device_bytes"] > tree()
tts.force_offload()
away = tts.get_gpu_status()["models"]["tts"]
assert away["state"] == "cpu" and away["device_bytes"] == 0 and away["outside_bytes"] == 0, away
assert 90 << 20 < tree() <= away["host_bytes"] < tree() + (50 << 20), (tree(), away)
tts.force_release()
gone = tts.get_gpu_status()["models"]["tts"]
assert tree() == 0 and gone["host_bytes"] == gone["device_bytes"] == 0, gone
"""
    play(script, models, voice, newer)


def test_sixteen_requests_from_eight_threads_under_random_moves_lose_nothing(
    newer: Path, models: Path, voice: Path
) -> None:
    script = """
import random
from concurrent.futures import ThreadPoolExecutor
tts = managed()
expected = tts.clone(*SAY)[0]
done = threading.Event()

def disturb():
    chance = random.Random(1)
    while not done.is_set():
        chance.choice([tts.manager.offload, tts.manager.release, tts.manager.warm])("tts")

other = threading.Thread(target=disturb)
other.start()
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: tts.clone(*SAY)[0], range(16)))
done.set()
other.join()
assert all(torch.equal(answer, expected) for answer in answers)
tts.manager.close()
"""
    play(script, models, voice, newer)


def test_two_generations_in_one_process_are_refused(newer: Path, models: Path, voice: Path) -> None:
    script = f"""
from residency.errors import EngineUnavailable
build().llm.llm_engine.engine_core.shutdown()
try:
    step_audio.build(MODELS, root={str(CHECKOUT)!r})
except EngineUnavailable as error:
    print(error)
"""
    assert "has imported another one of that name" in play(script, models, voice, newer)


def test_a_checkout_that_changes_its_generation_after_its_import_needs_a_restart(
    newer: Path, models: Path, voice: Path
) -> None:
    script = f"""
import shutil
from residency.errors import EngineUnavailable
build().llm.llm_engine.engine_core.shutdown()
shutil.copy({str(CHECKOUT / "tts.py")!r}, {str(newer / "tts.py")!r})
try:
    step_audio.build(MODELS)
except EngineUnavailable as error:
    print(error)
"""
    assert "restart the program" in play(script, models, voice, newer)
