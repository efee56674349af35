"""Known traps of the public engine: each is reported with its remedy, before a load where that is possible."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from miniature_checkout import CHECKOUT, run, run_newer

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency import errors
from residency.engines import checkout as checkouts
from residency.engines import step_audio, transformers_versions
from residency.engines.generations import TRANSFORMERS, VLLM, check_audio
from residency.errors import ExtraMissing, InvalidInput
from tts_gpu_managed import GPUManagedTTS


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


def test_an_environment_of_uv_without_pip_is_given_commands_of_uv(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(shutil.copytree(CHECKOUT, tmp_path / "checkout"))
    (checkout / "requirements.txt").write_text("not-here\nopenai-whisper==1\ntransformers==4.53.3\n")
    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    said = [each.en for each in step_audio.shortcomings(str(models), str(checkout))]
    said.append(str(ExtraMissing("asr", "soxr")))
    commands = " ".join(said).split("pip install")
    assert len(commands) == 9
    assert all(each.endswith("uv ") for each in commands[:-1])
    assert all(each.startswith(f" --python {sys.executable} ") for each in commands[1:])


@pytest.mark.parametrize("installed", [None, "20250625"])
def test_whisper_that_does_not_build_with_the_newest_setuptools_is_given_an_older_one(
    tmp_path: Path, installed: str | None
) -> None:
    (tmp_path / "requirements.txt").write_text("openai-whisper==20240930\n")
    advice = checkouts.unmet_advice(tmp_path, {"openai-whisper==20240930": installed})
    assert advice is not None
    assert '"setuptools<81"' in advice.en
    assert 'pip install --no-build-isolation "openai-whisper==20240930" && ' in advice.zh, "then -r builds nothing"


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
    assert f"Run {errors.pip_install()} 'transformers>=4.57.3,<5'" in warning
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


@pytest.mark.parametrize("generation", [TRANSFORMERS, VLLM])
def test_a_long_recording_is_refused_without_management_too(
    generation: Any, newer: Path, models: Path, voice: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(200_000, np.float32), 1000)
    script = f"""
from residency.errors import InvalidInput
from residency.web.speech.recordings import Recordings
from residency.web.speech.service import SpeechService
speech = SpeechService(build(managed=False), {{}}, Recordings(MODELS))
speech.clone(*SAY)
for ask in (lambda path: speech.clone(path, "a", "b"), lambda path: speech.edit(path, "a", "speed", "faster", None)):
    try:
        ask({str(tmp_path / "long.wav")!r})
    except InvalidInput as refused:
        print(refused)
"""
    old = generation is TRANSFORMERS
    said = run(script, models, voice) if old else run_newer(script, models, voice, newer)
    assert said.count(f"takes {192 if old else 69} s at most") == 2


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
