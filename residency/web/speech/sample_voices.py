"""Sample voices, for users without a recording. ``scripts/make_sample_voices.py`` generates their files."""

from __future__ import annotations

from dataclasses import dataclass

from .. import static

FOLDER = static.FOLDER / "samples"
TARGET_TEXT = "Hello! This sentence was never spoken by me, and still you hear it in my voice."
"""Default for an empty target text, in English, which every engine of this project supports."""


@dataclass(frozen=True)
class SampleVoice:
    """A file in `FOLDER`, its name in Chinese and English, and its spoken words.

    ``pitch`` is a multiple of the built-in engine's pitch.
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
