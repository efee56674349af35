from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature_checkout import PRELUDE, ROOT, make_recording, run

from residency.engines.checkout import find_checkout

sys.path.append(str(Path(__file__).parent))

from tiny_weights import FUNASR

_BEFORE = """
from fake_torchaudio import pretend_torchaudio
pretend_torchaudio()
"""
_AFTER = """
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


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The one that ``STEP_AUDIO_ROOT`` names."""
    root = os.environ.get("STEP_AUDIO_ROOT")
    if not root:
        pytest.skip("needs a Step-Audio-EditX checkout in STEP_AUDIO_ROOT, in its environment and with onnx")
    return find_checkout(root)


@pytest.fixture(scope="session")
def models(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights, tiny and random."""
    folder = tmp_path_factory.mktemp("models")
    script = f"{_BEFORE}\nimport sys, tts, tiny_weights, pathlib\ntiny_weights.make(pathlib.Path(sys.argv[1]))"
    paths = (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "upstream", checkout)
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
    )  # fmt: skip
    last_line = (made.stderr.strip().splitlines() or [""])[-1]  # modules that can be done without are named further up
    if made.returncode and last_line.startswith("ModuleNotFoundError"):
        pytest.skip(f"what the checkout needs is not installed: {last_line}")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recording(tmp_path_factory.mktemp("voice") / "voice.wav", sample_rate=44100)


@pytest.fixture
def scenario(checkout: Path, models: Path, voice: Path) -> Callable[..., str]:
    """Runs a script with the real checkout in a process of its own; returns what it prints."""

    def play(script: str, dtype: str = "bfloat16", quantization: str | None = None) -> str:
        names = f"CHECKOUT, FUNASR = {str(checkout)!r}, {FUNASR!r}\nDTYPE, QUANTIZATION = {dtype!r}, {quantization!r}\n"
        return run(script, models, voice, checkout, prelude=_BEFORE + PRELUDE + names + _AFTER, within_s=600)

    return play
