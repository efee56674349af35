"""Measures the similarity of the built-in engine's clones to their prompts: GE2E speaker similarity, before and after.

    pip install librosa webrtcvad && pip install --no-deps resemblyzer
    python benchmarks/voice.py PROMPT.wav [MORE.wav ...]

GE2E (L. Wan et al.: Generalized end-to-end loss for speaker verification, ICASSP 2018; resemblyzer ships its weights)
gives the cosine between two voices: 0.8 to 0.95 for recordings of one speaker, about 0.5 to 0.6 for two speakers.
"before": the engine's own voice; "prompt": one half of the prompt against the other, the upper limit of a clone.
Times are of one `clone` of a sentence.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soxr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from residency.engines import world
from residency.engines.audio import SAMPLE_RATE, read_audio
from residency.engines.builtin import BuiltinEngine
from residency.engines.cleaning import cut, speech_segments

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised at all.",
    "I would like to tell you about the weather tomorrow. It should be sunny with a light wind from the west.",
    "Please remember to bring your own lunch, because the museum cafe will be closed until Thursday.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", type=Path)
    prompts = parser.parse_args().prompts
    try:
        from resemblyzer import VoiceEncoder
    except ImportError as error:
        parser.error(f"{error}: pip install librosa webrtcvad && pip install --no-deps resemblyzer")
    logging.disable(logging.WARNING)
    encoder = VoiceEncoder("cpu", verbose=False)
    engine = BuiltinEngine(seed=1)
    print(f"{'prompt':28} {'before':>7} {'after':>7} {'prompt':>7} {'F0':>6} {'clone':>6} {'seconds':>8}")
    for path in prompts:
        recording = read_audio(str(path))
        speech = cut(recording, speech_segments(recording, engine.vad_model, engine.device))
        voice = embedding(encoder, speech)
        halves = [embedding(encoder, half) for half in np.array_split(speech, 2)]
        plain = [embedding(encoder, engine.hibari(text, seed=1)) for text in SENTENCES]
        start = time.perf_counter()
        clones = [engine.clone(str(path), "-", text)[0][0].numpy() for text in SENTENCES]
        seconds = (time.perf_counter() - start) / len(SENTENCES)
        before = np.mean([one @ voice for one in plain])
        after = np.mean([embedding(encoder, clone) @ voice for clone in clones])
        print(
            f"{path.name:28} {before:7.3f} {after:7.3f} {halves[0] @ halves[1]:7.3f} {median_f0(speech):6.0f} "
            f"{np.mean([median_f0(clone) for clone in clones]):6.0f} {seconds:8.2f}"
        )


def embedding(encoder: Any, samples: np.ndarray) -> np.ndarray:
    """Returns the normalized embedding of the voice. Equalizes the level, since GE2E depends on it."""
    wave = soxr.resample(samples, SAMPLE_RATE, 16000)
    return np.asarray(encoder.embed_utterance((wave / np.abs(wave).max() * 0.5).astype(np.float32)))


def median_f0(samples: np.ndarray) -> float:
    f0 = world.analyse(samples).f0
    return float(np.median(f0[f0 > 0]))


if __name__ == "__main__":
    main()
