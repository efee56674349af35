"""``python -m gpu_manager infer`` with a served app."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp, RunningApp

from residency.launch import command_line
from residency.web.speech.sample_voices import FOLDER, VOICES

RECORDING, WORDS = str(FOLDER / VOICES["high"].file), VOICES["high"].says


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("app")) as app:
        yield app


def infer(app: RunningApp, folder: Path, *flags: str) -> int:
    given = ("--prompt-audio", RECORDING, "--prompt-text", WORDS, "--output-dir", str(folder), "--url", app.url)
    return command_line.main(["infer", *given, *flags])


def test_a_clone_with_the_flags_of_the_public_program(
    app: RunningApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model-path", "/models", "--quantization=int4", "--enforce-eager")
    assert infer(app, tmp_path / "new", *flags, "--generated-text", "Good morning.") == 0
    assert soundfile.info(tmp_path / "new" / "high_cloned.wav").duration > 0.3
    said = capsys.readouterr()
    assert said.out == f"[Saved] {tmp_path}/new/high_cloned.wav\n"
    assert "--model-path, --quantization, --enforce-eager" in said.err


def test_repeated_edits(app: RunningApp, tmp_path: Path) -> None:
    flags = ("--edit-type", "speed", "--edit-info", "faster", "--n-edit-iter", "2")
    assert infer(app, tmp_path, *flags) == 0
    first, second = (soundfile.info(tmp_path / f"high_edited_iter{number}.wav").duration for number in (1, 2))
    assert second < first < soundfile.info(RECORDING).duration


@pytest.mark.parametrize("flags", [("--generated-text", "Good morning."), ("--edit-type", "denoise")])
def test_a_recording_as_large_as_the_app_allows(app: RunningApp, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Of 24 MB: base64 of it in JSON would be larger than JSON may be."""
    samples, sample_rate = soundfile.read(RECORDING, dtype="float32")
    large = np.tile(np.repeat(samples[:, None], 8, axis=1), (math.ceil(750_000 / len(samples)), 1))[:750_000]
    soundfile.write(tmp_path / "large.wav", large, sample_rate, subtype="FLOAT")
    assert (tmp_path / "large.wav").stat().st_size > 24_000_000
    assert infer(app, tmp_path / "new", "--prompt-audio", str(tmp_path / "large.wav"), *flags) == 0
    assert list((tmp_path / "new").glob("large_*.wav"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [(("--generated-text", ""), "empty"), (("--edit-type", "emotion", "--edit-info", "happy"), "task"),
     (("--prompt-audio", "/no/such.wav"), "recording that exists")],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_written(
    app: RunningApp, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    assert infer(app, tmp_path / "new", *flags) == 1
    assert says in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("*"))
