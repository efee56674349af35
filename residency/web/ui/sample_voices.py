"""Sample voices, for those who have no recording at hand. ``scripts/make_sample_voices.py`` makes their files."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import static

FOLDER = static.FOLDER / "samples"
TARGET_TEXT = "Hello! This sentence was never spoken by me, and still you hear it in my voice."
"""Written into an empty target text. English, which every engine of this project speaks."""


@dataclass(frozen=True)
class SampleVoice:
    """A file in `FOLDER`, its name in Chinese and English, and the words that it ``says``.

    ``pitch`` is that of the voice, as a multiple of the built-in engine's own.
    """

    file: str
    name: tuple[str, str]
    says: str
    pitch: float


VOICES = {
    "high": SampleVoice(
        "high.flac",
        ("示例：较高的声音", "Sample: a higher voice"),
        "The morning light came slowly over the hills, and the whole valley began to wake.",
        1.0,
    ),
    "low": SampleVoice(
        "low.flac",
        ("示例：较低的声音", "Sample: a lower voice"),
        "I missed the last train, so I walked home along the river under a bright full moon.",
        0.58,
    ),
}


def copied(sample: SampleVoice, folder: str | Path) -> str:
    """Copies the file of a sample into a folder of its own below ``folder``; returns the path of the copy."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return shutil.copy(FOLDER / sample.file, tempfile.mkdtemp(dir=folder))
