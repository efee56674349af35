"""The adapter to a Step-Audio-EditX checkout, against a stand-in of the same outward shape, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from residency.engines import step_audio
from residency.errors import EngineUnavailable

ROOT = Path(__file__).resolve().parents[2]

TTS = """
import torch
class StepAudioTTS:
    def __init__(self, model_path, audio_tokenizer, model_source="default", tts_model_id=None,
                 quantization_config=None, torch_dtype=torch.bfloat16, device_map="cuda"):
        self.arguments = (model_path, audio_tokenizer, model_source, tts_model_id, quantization_config, torch_dtype,
                          device_map)
        self.llm = torch.nn.Linear(8, 8)
    def clone(self, prompt_wav_path, prompt_text, target_text):
        return self.llm(torch.ones(1, 8)).detach(), 24000
"""
TOKENIZER = """
class StepAudioTokenizer:
    def __init__(self, path, model_source="default", funasr_model_id="default"):
        self.arguments = (path, model_source, funasr_model_id)
    def wav2token(self): ...
    def __call__(self): raise AssertionError("a ready tokenizer is not a factory")
"""
LOADER = """
import enum
class ModelSource(enum.Enum):
    AUTO = "auto"
    LOCAL = "local"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "Step-Audio-EditX"
    (folder / "stepvocoder").mkdir(parents=True)
    for name, text in (("tts", TTS), ("tokenizer", TOKENIZER), ("model_loader", LOADER)):
        (folder / f"{name}.py").write_text(text)
    return folder


def run(script: str, checkout: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script where our root modules can be imported; the checkout's names must not leak into the tests."""
    environ = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", **environ}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=checkout.parent, env=environ, capture_output=True, text=True, check=False
    )


def test_the_engine_is_built_with_the_arguments_of_the_public_app(checkout: Path) -> None:
    script = """
import sys, torch
from residency.engines.step_audio import build
engine = build("/models", root="Step-Audio-EditX", model_source="local", tokenizer_model_id="funasr", tts_model_id="id",
               quantization="awq-4bit", torch_dtype="float16", device_map="cpu")
path, tokenizer, source, *rest = engine.arguments
assert path == "/models/Step-Audio-EditX-AWQ-4bit", path
assert source.value == "local"
assert rest == ["id", "awq-4bit", torch.float16, "cpu"], rest
assert tokenizer.arguments == ("/models/Step-Audio-Tokenizer", source, "funasr"), tokenizer.arguments
assert build("/models", root="Step-Audio-EditX").arguments[0] == "/models/Step-Audio-EditX"
"""
    result = run(script, checkout)
    assert result.returncode == 0, result.stderr


def test_managed_it_is_a_drop_in_and_loads_its_tokenizer_lazily_too(checkout: Path) -> None:
    script = """
import sys, torch
from gpu_manager import GPUResourceManager, SimulatedDevice
from tts_gpu_managed import GPUManagedTTS
manager = GPUResourceManager(SimulatedDevice(1 << 20))
built = []
def tokenizer():
    from tokenizer import StepAudioTokenizer
    built.append(1)
    return StepAudioTokenizer("/models/Step-Audio-Tokenizer")
tts = GPUManagedTTS("/models/Step-Audio-EditX", tokenizer, manager=manager)
assert "tts" not in sys.modules and not built
torch.manual_seed(1)
first, rate = tts.clone("a.wav", "b", "c")
assert rate == 24000 and built == [1]
assert manager.status()["models"]["tts"]["state"] == "cpu" and manager.device.ledger_bytes == 0
assert torch.equal(tts.clone("a.wav", "b", "c")[0], first)
with manager.lease("tts") as engine:
    path, ready, source, *rest = engine.arguments
assert (path, source, rest) == ("/models/Step-Audio-EditX", "default", [None, None, torch.bfloat16, "cuda"])
again = GPUManagedTTS("/models/Step-Audio-EditX", ready, manager=manager)
again.clone("a.wav", "b", "c")
manager.close()
"""
    result = run(script, checkout, STEP_AUDIO_ROOT=str(checkout))
    assert result.returncode == 0, result.stderr


def test_a_missing_dependency_names_the_command_that_installs_it(checkout: Path) -> None:
    (checkout / "tts.py").write_text("import hyperpyyaml_not_here")
    result = run("from residency.engines.step_audio import build; build('/m', root='Step-Audio-EditX')", checkout)
    assert "hyperpyyaml_not_here" in result.stderr
    assert f"pip install -r {checkout}/requirements.txt" in result.stderr


def test_a_missing_checkout_says_how_to_get_it(tmp_path: Path) -> None:
    result = run("from residency.engines.step_audio import build; build('/models')", tmp_path / "nowhere")
    assert "git clone https://github.com/stepfun-ai/Step-Audio-EditX" in result.stderr


def test_the_checkout_is_found_by_name_environment_and_neighbourhood(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEP_AUDIO_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert step_audio.find_checkout() is None
    assert step_audio.find_checkout(str(checkout)) == checkout
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    assert step_audio.find_checkout() == checkout
    monkeypatch.chdir(checkout)
    assert step_audio.find_checkout() == checkout
    monkeypatch.setenv("STEP_AUDIO_ROOT", str(tmp_path / "ours"))
    with pytest.raises(EngineUnavailable, match="no Step-Audio-EditX checkout"):
        step_audio.find_checkout()
