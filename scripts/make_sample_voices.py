#!/usr/bin/env python3
"""Makes the sample voices of the page with the built-in engine: ``python scripts/make_sample_voices.py``.

Writes one FLAC file (mono, 16 bits, 24 kHz) for each entry of `residency.web.speech.sample_voices.VOICES`; reproducible
with the same package versions. The speech is by hibari (Apache-2.0), without recordings of persons.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from residency.engines import world
from residency.engines.audio import SAMPLE_RATE, Samples, at_level
from residency.engines.builtin import BuiltinEngine
from residency.web.speech.sample_voices import FOLDER, VOICES, SampleVoice

_RMS = 0.08


def speak(engine: BuiltinEngine, sample: SampleVoice) -> Samples:
    """Synthesizes the text of a sample in the engine's voice with its pitch, from which the vocal tract follows."""
    plain = engine.hibari(sample.says, seed=1)
    frames = world.analyse(plain)
    own = world.measure(plain, frames)
    assert own is not None, "the words are voiced speech"
    target = dataclasses.replace(own, pitch=own.pitch + math.log(sample.pitch))
    spoken = world.synthesise(world.convert(frames, own, target))[: len(plain)]
    return at_level(np.asarray(spoken), _RMS)


def main() -> None:
    engine = BuiltinEngine()
    FOLDER.mkdir(exist_ok=True)
    for sample in VOICES.values():
        samples = speak(engine, sample)
        soundfile.write(FOLDER / sample.file, samples, SAMPLE_RATE, subtype="PCM_16")
        print(f"{sample.file}: {len(samples) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    main()
