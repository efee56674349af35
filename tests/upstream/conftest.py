"""Fixtures with real checkouts of either generation, which ``STEP_AUDIO_ROOT`` names, separated as in ``PATH``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
from miniature_checkout import PRELUDE, ROOT, STAND_IN, make_recording

from residency.engines.checkout import find_checkout
from residency.engines.generations import TRANSFORMERS, VLLM, Generation, generation_of

sys.path.append(str(Path(__file__).parent))

from tiny_weights import FUNASR

HERE = Path(__file__).parent
_BEFORE = """
from fake_torchaudio import pretend_torchaudio
pretend_torchaudio()
"""
_REPORT = """
def report(*what):
    print()  # the checkout prints, too
    for line in " ".join(map(str, what)).splitlines():
        print(">", line)
"""
_OLDER = """
WHERE = "cuda" if torch.cuda.is_available() else "cpu"

def bare():
    # As a program without us does it, so that what our adapter passes is compared too.
    sys.path.insert(0, CHECKOUT)
    import model_loader, tokenizer, tts
    source = model_loader.ModelSource.AUTO
    listener = tokenizer.StepAudioTokenizer(MODELS + "/Step-Audio-Tokenizer", source, FUNASR)
    return tts.StepAudioTTS(engine_folder(), listener, source, None, QUANTIZATION, getattr(torch, DTYPE), WHERE)

def engine_folder():
    return MODELS + "/Step-Audio-EditX" + ("-AWQ-4bit" if QUANTIZATION == "awq-4bit" else "")

def build():
    return step_audio.build(
        MODELS, tokenizer_model_id=FUNASR, device_map=WHERE, torch_dtype=DTYPE, quantization=QUANTIZATION
    )
"""
_NEWER = """
import functools, os
import transformers
os.environ["VLLM_ATTENTION_BACKEND"] = "TRITON_ATTN"
if int(transformers.__version__.split(".")[0]) >= 5:  # the checkout locks 4.57, whose default this is
    TOKENIZER = transformers.PreTrainedTokenizerBase
    TOKENIZER.apply_chat_template = functools.partialmethod(TOKENIZER.apply_chat_template, return_dict=False)

def prepare(theirs):
    # The random weights would end some answers after one token, which the checkout takes for a number.
    if VLLM == "vLLM" and not isinstance(theirs.SamplingParams, functools.partial):
        theirs.SamplingParams = functools.partial(theirs.SamplingParams, min_tokens=12)

def bare():
    sys.path.insert(0, CHECKOUT)
    import model_loader, tokenizer, tts
    prepare(tts)
    source = model_loader.ModelSource.AUTO
    listener = tokenizer.StepAudioTokenizer(MODELS + "/Step-Audio-Tokenizer", model_source=source)
    return tts.StepAudioTTS(
        MODELS + "/Step-Audio-EditX", listener, source, max_model_len=4096, enforce_eager=True,
        cosyvoice_cuda_graph=False,
    )

def build():
    prepare(*step_audio.import_from(step_audio.find_checkout(CHECKOUT), "tts"))
    return step_audio.build(MODELS + "/Step-Audio-EditX", max_model_len=4096, enforce_eager=True)
"""


@dataclass(frozen=True)
class Setting:
    """A checkout, and the vLLM that it runs with: ``vLLM``, ``stand-in`` or None."""

    checkout: Path
    vllm: str | None

    def environment(self) -> dict[str, str]:
        paths = [ROOT, ROOT / "tests" / "support", HERE, *([STAND_IN] if self.vllm == "stand-in" else [])]
        paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
        return {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "STEP_AUDIO_ROOT": str(self.checkout),
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip


@cache
def _checkouts() -> dict[str, Path]:
    named = [name for name in os.environ.get("STEP_AUDIO_ROOT", "").split(os.pathsep) if name]
    return {generation_of(folder).name: folder for folder in map(find_checkout, named)}


def _setting(generation: Generation, vllm: str | None = None) -> Setting:
    if generation.name not in _checkouts():
        pytest.skip(f"needs a checkout of {generation.name} in STEP_AUDIO_ROOT, in its environment and with onnx")
    if vllm == "vLLM" and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    return Setting(_checkouts()[generation.name], vllm)


@pytest.fixture(scope="session")
def older() -> Setting:
    return _setting(TRANSFORMERS)


@pytest.fixture(scope="session", params=["older", "newer, stand-in", "newer, vLLM"])
def setting(request: pytest.FixtureRequest) -> Setting:
    if request.param == "older":
        return _setting(TRANSFORMERS)
    return _setting(VLLM, request.param.removeprefix("newer, "))


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Path]:
    """Makes the weights of a checkout, tiny and random."""

    @cache
    def made(checkout: Path) -> Path:
        folder = tmp_path_factory.mktemp("models")
        script = f"{_BEFORE}\nimport sys, tts, tiny_weights, pathlib\ntiny_weights.make(pathlib.Path(sys.argv[1]))"
        environment = Setting(checkout, "stand-in").environment()
        environment["PYTHONPATH"] += os.pathsep + str(checkout)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(folder)], capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        last_line = (done.stderr.strip().splitlines() or [""])[-1]  # optional modules are named further up
        if done.returncode and last_line.startswith("ModuleNotFoundError"):
            pytest.skip(f"what the checkout needs is not installed: {last_line}")
        assert done.returncode == 0, done.stderr
        return folder

    return lambda setting: made(setting.checkout)


@pytest.fixture(scope="session")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recording(tmp_path_factory.mktemp("voice") / "voice.wav", sample_rate=44100)


Play = Callable[..., str]


@pytest.fixture
def play(models_of: Callable[[Setting], Path], voice: Path, tmp_path: Path) -> Iterator[Play]:
    """Runs a script with a real checkout in a process of its own; returns what it reports."""
    started: list[psutil.Process] = []

    def run(setting: Setting, script: str, dtype: str = "bfloat16", quantization: str | None = None) -> str:
        models = models_of(setting)
        names = f"CHECKOUT, FUNASR = {str(setting.checkout)!r}, {FUNASR!r}\n"
        names += f"DTYPE, QUANTIZATION, VLLM = {dtype!r}, {quantization!r}, {setting.vllm!r}\n"
        file = tmp_path / "scenario_of_the_test.py"
        ours = _NEWER if setting.vllm else _OLDER
        file.write_text(_BEFORE + PRELUDE + _REPORT + names + ours + script, encoding="utf-8")
        with (tmp_path / "errors.txt").open("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HERE / "scenario.py"), str(file), str(models), str(voice)],
                env=setting.environment(), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=models,
                start_new_session=True,
            )  # fmt: skip
            started.append(psutil.Process(process.pid))
            said, _ = process.communicate(timeout=900)
            errors.seek(0)
            assert process.returncode == 0, said[-3000:] + errors.read()[-10000:]
        return "\n".join(line[2:] for line in said.splitlines() if line.startswith("> "))

    yield run
    for process in started:
        if process.is_running():
            for each in [*process.children(recursive=True), process]:
                each.kill()


@pytest.fixture
def scenario(older: Setting, play: Play) -> Play:
    """Runs a script with the older generation."""
    return lambda *arguments: play(older, *arguments)
