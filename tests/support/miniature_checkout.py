"""Scenarios with a miniature checkout, each in its own process, since the checkout's module names are common."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import soundfile
from fork_server import ForkedProcess

from residency.engines.step_audio_facts import ACOUSTIC_MODEL

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = ROOT / "tests" / "engines" / "miniature"

PRELUDE = """
from cuda_on_cpu import pretend_cuda
pretend_cuda()
import gc, sys, threading
from contextlib import closing
import torch
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines import step_audio
from tts_gpu_managed import GPUManagedTTS, Part

MODELS, VOICE = sys.argv[1:3]
SAY = VOICE, "what is said", "what to say"

def build(**flags):
    return step_audio.build(MODELS, **flags)

def managed(**settings):
    manager = GPUResourceManager(SimulatedDevice(48 << 30), **settings)
    return GPUManagedTTS(MODELS, load=build, manager=manager, name="tts")

def state(tts):
    return tts.get_gpu_status()["models"]["tts"]["state"]

def spoken(engine):
    torch.manual_seed(7)
    return [engine.clone(*SAY)[0], engine.edit(VOICE, "what is said", "speed", "faster")[0]]
"""


NEWER_PRELUDE = """
import os
import vllm

def build(**flags):
    return step_audio.build(f"{MODELS}/Step-Audio-EditX", **flags)
"""

NEWER = ROOT / "tests" / "engines" / "miniature_vllm"
STAND_IN = ROOT / "tests" / "support" / "stand_in_vllm"


def make_newer_checkout(folder: Path) -> Path:
    """Copies the miniature with the files of the newer generation over it."""
    shutil.copytree(CHECKOUT, folder, ignore=shutil.ignore_patterns("__pycache__", "requirements.txt"))
    shutil.copytree(NEWER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def make_weights(folder: Path) -> Path:
    tokenizer, llm = folder / "Step-Audio-Tokenizer", folder / "Step-Audio-EditX"
    vocoder = llm / "CosyVoice-300M-25Hz"
    acoustic = tokenizer / ACOUSTIC_MODEL
    for each in (acoustic, vocoder):
        each.mkdir(parents=True)
    for name in ("config.yaml", "model.pt"):
        (acoustic / name).write_text("")
    np.save(tokenizer / "linguistic_tokenizer.npy", np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32))
    hibari = importlib.util.find_spec("hibari")
    assert hibari is not None
    assert hibari.origin is not None
    shutil.copy(Path(hibari.origin).parent / "assets" / "oov.onnx", tokenizer / "speech_tokenizer_v1.onnx")
    (llm / "config.json").write_text(json.dumps({"vocab_size": 256, "hidden_size": 64}))
    (llm / "tokenizer_config.json").write_text("{}")
    (llm / "model.safetensors").write_bytes(safetensors_of(4))
    for name in ("cosyvoice.yaml", "flow.pt", "hift.pt", "campplus.onnx"):
        (vocoder / name).write_text("")
    return folder


def safetensors_of(nbytes: int) -> bytes:
    header = json.dumps({"t": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(nbytes)


def make_recording(file: Path, sample_rate: int = 16000) -> Path:
    time_s = np.arange(sample_rate) / sample_rate
    noise = np.random.default_rng(1).normal(size=sample_rate)
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 220 * time_s) + 0.01 * noise, sample_rate)
    return file


def run_newer(script: str, models: Path, voice: Path, checkout: Path) -> str:
    """Returns the output of a scenario with a checkout of `make_newer_checkout`."""
    return run(NEWER_PRELUDE + script, models, voice, checkout)


def run(
    script: str, models: Path, voice: Path, checkout: Path = CHECKOUT, prelude: str = PRELUDE, within_s: float = 120
) -> str:
    """Returns the output of a scenario, which must succeed."""
    with tempfile.NamedTemporaryFile() as errors:
        apart = f"import os; os.dup2(os.open({errors.name!r}, os.O_WRONLY), 2)\n"
        process = ForkedProcess(
            apart + prelude + script, [str(models), str(voice)], {**os.environ, "STEP_AUDIO_ROOT": str(checkout)},
            cwd=models, paths=[ROOT, ROOT / "tests" / "support", STAND_IN],
        )  # fmt: skip
        late = threading.Timer(within_s, process.kill)
        late.start()
        with process.stdout:
            said = process.stdout.read()
        code = process.wait()
        late.cancel()
        assert code == 0, errors.read().decode()
        return said
