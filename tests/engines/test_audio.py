"""What people upload: any usual file is read, and what cannot be used is refused with what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr

from residency.engines import audio
from residency.errors import InvalidInput

Write = Callable[..., str]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    length = min(len(one), len(other))
    return float(np.corrcoef(one[:length], other[:length])[0, 1])


@pytest.mark.parametrize("sample_rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_any_usual_rate_comes_out_at_24_khz(write: Write, speech: np.ndarray, sample_rate: int) -> None:
    path = write(soxr.resample(speech, 24000, sample_rate), sample_rate)
    read = audio.read_audio(path)
    assert read.dtype == np.float32
    assert abs(len(read) - len(speech)) <= 24
    assert correlation(read, speech) > 0.9


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", "PCM_U8"), ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "PCM_32"), ("a.wav", "DOUBLE"),
     ("a.wav", "ULAW"), ("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("a.mp3", "MPEG_LAYER_III"),
     ("录音 of a voice é.wav", "PCM_16")],
)  # fmt: skip
def test_usual_formats_are_read(write: Write, speech: np.ndarray, name: str, subtype: str) -> None:
    assert correlation(audio.read_audio(write(speech, name=name, subtype=subtype)), speech) > 0.95


def test_channels_are_mixed_down(write: Write, speech: np.ndarray) -> None:
    stereo = np.stack([speech, np.zeros_like(speech)], axis=1)
    assert correlation(audio.read_audio(write(stereo)), speech) > 0.999


def test_channels_of_opposite_polarity_do_not_cancel(write: Write, speech: np.ndarray) -> None:
    assert correlation(audio.read_audio(write(np.stack([speech, -speech], axis=1))), speech) > 0.999


def test_offset_is_removed_and_full_scale_is_kept(write: Write, speech: np.ndarray) -> None:
    read = audio.read_audio(write(speech * 20 + 0.3))
    assert abs(read.mean()) < 1e-3
    assert 0.99 < np.abs(read).max() <= 1
    assert correlation(read, speech) > 0.999


@pytest.mark.parametrize(
    ("samples", "says"),
    [(np.zeros(0), "no audio in it"), (np.zeros(24000), "silent"), (np.full(24000, 0.5), "silent"),
     (np.full(24000, np.nan), "damaged"), (np.array([0.1, np.inf] * 9999), "damaged"), (np.ones(99), "silent"),
     (np.sin(np.arange(999)), "tenth of a second")],
)  # fmt: skip
def test_unusable_samples_are_refused(write: Write, samples: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        audio.read_audio(write(samples.astype(np.float32)))
    assert refused.value.zh


@pytest.mark.parametrize("sample_rate", [4000, 384000])
def test_rates_out_of_range_are_refused(write: Write, sample_rate: int) -> None:
    with pytest.raises(InvalidInput, match="8 to 192 kHz"):
        audio.read_audio(write(np.sin(np.arange(sample_rate, dtype=np.float32)), sample_rate))


@pytest.mark.parametrize("content", [b"", b"this is no audio", b"RIFF\x00\x00\x00\x00WAVE", b"ID3" + bytes(200)])
def test_files_that_are_no_audio_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.wav"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"notes\.wav"):
        audio.read_audio(str(path))


@pytest.mark.parametrize("path", ["", "/nowhere/at all.wav", "/tmp"])
def test_missing_files_are_refused(path: str) -> None:
    with pytest.raises(InvalidInput):
        audio.read_audio(path)


def test_very_long_recordings_are_refused(write: Write) -> None:
    hours = np.resize(np.array([0, 3000], np.int16), 8000 * 60 * audio.MAX_MINUTES + 1)
    with pytest.raises(InvalidInput, match="600 s"):
        audio.read_audio(write(hours, 8000, subtype="PCM_16"))


def test_levels_do_not_count_pauses(speech: np.ndarray) -> None:
    paused = np.concatenate([speech, np.zeros(24000 * 5, np.float32)])
    assert audio.speech_rms(paused) == pytest.approx(audio.speech_rms(speech), rel=1e-3)
    assert audio.speech_rms(audio.at_level(speech, 0.05)) == pytest.approx(0.05, rel=1e-3)
    assert np.abs(audio.at_level(speech, 10.0)).max() <= 0.951


def test_pieces_are_cut_in_the_pauses(speech: np.ndarray) -> None:
    pause = np.zeros(12000, np.float32)
    talk = np.concatenate([speech, pause] * 9)
    pieces = audio.quiet_pieces(talk, 20)
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(pieces), talk)
    assert all(np.abs(piece[-100:]).max() < 1e-2 for piece in pieces)
