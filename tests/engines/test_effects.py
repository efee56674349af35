from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.signal import welch

from residency.engines import audio, cleaning, world


def pitch(samples: np.ndarray) -> np.ndarray:
    f0 = world.analyse(samples).f0
    return f0[f0 > 0]


def snr_db(clean: np.ndarray, noisy: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(clean**2) / np.sum((noisy - clean) ** 2)))


@pytest.fixture(scope="module")
def vad() -> Any:
    return cleaning.load_vad("cpu")


@pytest.mark.parametrize("rate", [0.7, 1 / 1.2, 1.2, 1.5])
def test_speed_changes_the_length_and_not_the_pitch(speech: np.ndarray, rate: float) -> None:
    changed = world.change_speed(speech, rate)
    assert len(changed) == pytest.approx(len(speech) / rate, abs=2)
    assert np.median(pitch(changed)) == pytest.approx(np.median(pitch(speech)), rel=0.06)
    assert audio.speech_rms(changed) == pytest.approx(audio.speech_rms(speech), rel=0.25)


def test_long_speech_is_changed_in_pieces_without_a_seam(speech: np.ndarray) -> None:
    long = np.concatenate([speech, np.zeros(6000, np.float32)] * 6)
    changed = world.change_speed(long, 1.2)
    assert len(changed) == pytest.approx(len(long) / 1.2, abs=4)
    assert np.abs(np.diff(changed)).max() < 1.5 * np.abs(np.diff(long)).max()


def test_whisper_has_no_pitch_and_is_softer(speech: np.ndarray) -> None:
    whispered = world.whisper(speech)
    assert len(whispered) == len(speech)
    assert len(pitch(whispered)) < 0.1 * len(pitch(speech))
    assert 0.1 < audio.speech_rms(whispered) / audio.speech_rms(speech) < 0.7


def test_whisper_attenuates_frequencies_below_900_hz_by_9_db_an_octave() -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(8 * 24000)).astype(np.float32)
    hz, power = welch(world.whisper(noise), 24000, nperseg=2048)

    def level_db(middle: float) -> float:
        return float(10 * np.log10(power[(hz > middle / 1.2) & (hz < middle * 1.2)].mean()))

    assert level_db(450) - level_db(225) == pytest.approx(9, abs=1.5)
    assert level_db(7200) - level_db(900) == pytest.approx(3, abs=1)
    assert level_db(7200) - level_db(3600) == pytest.approx(0, abs=1)


@pytest.mark.parametrize("snr", [0, 5, 10, 20])
@pytest.mark.parametrize("colour", ["white", "pink"])
def test_denoise_raises_the_snr(speech: np.ndarray, snr: int, colour: str) -> None:
    noise = np.random.default_rng(snr).standard_normal(len(speech))
    if colour == "pink":
        noise = np.fft.irfft(np.fft.rfft(noise) / np.sqrt(np.arange(len(noise) // 2 + 1) + 20), len(noise))
    noise *= np.sqrt(np.sum(speech**2) / np.sum(noise**2)) * 10 ** (-snr / 20)
    clean = cleaning.denoise((speech + noise).astype(np.float32))
    assert snr_db(speech, clean) > snr + (0.5 if snr == 20 else 3.5)


def test_denoise_leaves_clean_speech_alone(speech: np.ndarray) -> None:
    clean = cleaning.denoise(speech)
    assert clean.shape == speech.shape
    assert clean.dtype == np.float32
    assert snr_db(speech, clean) > 20
    assert len(cleaning.denoise(speech[:100])) == 100


def test_long_pauses_are_cut_and_short_ones_kept(speech: np.ndarray, vad: Any) -> None:
    rng = np.random.default_rng(0)
    silence = (rng.standard_normal(3 * 24000) * 1e-4).astype(np.float32)
    recording = np.concatenate([silence, speech, silence, speech, silence])
    segments = cleaning.speech_segments(recording, vad, "cpu")
    cut = cleaning.cut(recording, segments)
    # hibari begins and ends with a little silence of its own.
    assert 2 * len(speech) - 24000 < len(cut) < 2 * len(speech) + 12000
    energy = np.sum(np.square(cut, dtype=np.float64))
    assert energy == pytest.approx(2 * np.sum(np.square(speech, dtype=np.float64)), rel=0.02)
    again = cleaning.cut(cut, cleaning.speech_segments(cut, vad, "cpu"))
    assert len(again) > 0.95 * len(cut)


def test_nothing_is_found_where_nobody_speaks(vad: Any) -> None:
    noise = (np.random.default_rng(0).standard_normal(48000) * 0.05).astype(np.float32)
    assert cleaning.speech_segments(noise, vad, "cpu") == []
    assert len(cleaning.cut(noise, [])) == 0


def test_detection_does_not_depend_on_the_level(speech: np.ndarray, vad: Any) -> None:
    found = [cleaning.speech_segments(speech * gain, vad, "cpu") for gain in (1.0, 0.01)]
    assert found[0]
    assert found[0] == found[1]


def test_detector_keeps_nothing_and_changes_no_thread_count(speech: np.ndarray) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vad = cleaning.load_vad("cpu")
        first = cleaning.speech_segments(speech, vad, "cpu")
        assert vad._state.numel() == 0 or not vad._state.any()
        assert vad._context.numel() == 0
        assert cleaning.speech_segments(speech, vad, "cpu") == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
