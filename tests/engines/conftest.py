from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hibari import Hibari
from miniature_checkout import make_newer_checkout, make_recording, make_weights

from residency.engines.builtin import BuiltinEngine

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised at all."

Write = Callable[..., str]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Weights for a miniature checkout."""
    return make_weights(tmp_path / "models")


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    return make_recording(tmp_path / "voice.wav")


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A miniature checkout of the newer generation."""
    return make_newer_checkout(tmp_path / "newer")


@pytest.fixture(scope="session")
def hibari() -> Hibari:
    return Hibari()


@pytest.fixture(scope="session")
def speech(hibari: Hibari) -> np.ndarray:
    """Clean speech, float32 [samples], 24 kHz, about 5 s."""
    return hibari(SENTENCE, seed=0)


@pytest.fixture(scope="session")
def engine() -> BuiltinEngine:
    return BuiltinEngine()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write samples, [frames] or [frames, channels], to a file and return its path."""

    def write(samples: np.ndarray, sample_rate: int = 24000, name: str = "a.wav", subtype: str = "FLOAT") -> str:
        path = tmp_path / name
        soundfile.write(path, samples, sample_rate, subtype=subtype)
        return str(path)

    return write


@pytest.fixture
def prompt(write: Write, speech: np.ndarray) -> str:
    return write(speech, name="prompt.wav")
