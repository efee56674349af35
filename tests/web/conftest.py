from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import write_tone

from app import EditxTab


class FakeEngine:
    """Answers tones; fails with ``error`` if there is one; remembers what it was asked."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[tuple[Any, ...]] = []

    def clone(self, *arguments: Any) -> tuple[Any, int]:
        return self._speak("clone", *arguments)

    def edit(self, *arguments: Any) -> tuple[Any, int]:
        return self._speak("edit", *arguments)

    def _speak(self, *asked: Any) -> tuple[Any, int]:
        self.asked.append(asked)
        if self.error:
            raise self.error
        return np.full((1, 2400), 0.25, np.float32), 24000


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def recording(tmp_path: Path) -> str:
    return write_tone(tmp_path / "prompt.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def tab(engine: Any, folder: Path) -> EditxTab:
    return EditxTab(Namespace(tmp_dir=str(folder)), tts_engine=engine)
