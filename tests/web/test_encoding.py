"""Sentences become one sound, and the sound a stream of bytes in each format that players read."""

from __future__ import annotations

import gc
import importlib.util
import io
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from residency.errors import InvalidInput
from residency.web.speech.encoding import MEDIA_TYPES, PCM_RATE_HZ, Encoder, Joiner

RATE = 24_000
FADE = 480
LOSSLESS = ["wav", "pcm", "flac"]
#: Samples until the first sound, at 24 kHz and speed 1.
LATENCY = {"wav": 1, "pcm": 1, "flac": 2400, "mp3": 1920, "aac": 2160, "opus": 2880}


def tone(seconds: float = 1.0, hz: float = 440.0, rate: int = RATE) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(format: str, *sounds: object, rate: int = RATE, speed: float = 1.0, whole: int | None = None) -> bytes:
    with Encoder(format, rate, speed, whole=whole) as encoder:
        return b"".join([*(encoder.encode(each) for each in sounds), encoder.finish()])  # type: ignore[arg-type]


def decoded(format: str, data: bytes) -> tuple[NDArray[np.float64], int]:
    """The samples of a sound and their rate, as ffmpeg reads them."""
    if format == "pcm":
        return np.frombuffer(data, "<i2") / 32768, PCM_RATE_HZ
    with av.open(io.BytesIO(data), format="ogg" if format == "opus" else format) as container:
        frames = list(container.decode(audio=0))
    assert {frame.layout.nb_channels for frame in frames} == {1}
    parts = [frame.to_ndarray().reshape(-1) for frame in frames]
    scale = 32768 if parts[0].dtype.kind == "i" else 1
    return np.concatenate(parts) / scale, frames[0].sample_rate


def pitch_hz(samples: NDArray[np.float64], rate: int) -> float:
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    return float(np.abs(np.fft.rfft(middle)).argmax() * rate / len(middle))


@pytest.mark.parametrize("format", MEDIA_TYPES)
@pytest.mark.parametrize("rate", [8_000, 22_050, 24_000, 44_100, 48_000, 192_000])
def test_every_format_keeps_duration_and_pitch_at_every_rate(format: str, rate: int) -> None:
    samples, found_rate = decoded(format, encoded(format, *np.array_split(tone(rate=rate), 7), rate=rate))
    assert len(samples) / found_rate == pytest.approx(1, abs=0.2)  # mp3 and aac add whole frames
    assert pitch_hz(samples, found_rate) == pytest.approx(440, abs=3)
    if format in ("wav", "flac", "mp3", "aac") and rate <= 48_000:
        assert found_rate == rate
    if format == "pcm":
        assert len(samples) == pytest.approx(PCM_RATE_HZ, abs=2)


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_the_first_sound_comes_before_the_end(format: str) -> None:
    sound = tone()
    before = b""
    with Encoder(format, RATE) as encoder:
        before += encoder.encode(sound[: LATENCY[format]])
        if format == "mp3":  # ffmpeg reads no file of a single frame
            assert before[:2] == b"\xff\xf3"
        else:
            assert len(decoded(format, before)[0]) > 0
        later = encoder.encode(sound[LATENCY[format] :])
        assert len(later) > 0.6 * len(before + later + encoder.finish())


@pytest.mark.parametrize("format", LOSSLESS)
def test_at_speed_1_no_sample_is_changed(format: str) -> None:
    given = np.random.default_rng(1).integers(-32768, 32768, 10_000, dtype=np.int16)
    given[:2] = -32768, 32767
    for sound in (given, given / 32768, (given / 32768).astype(np.float32), (given.astype(np.int32) << 16)):
        samples, _ = decoded(format, encoded(format, *np.array_split(sound, 9)))
        assert np.array_equal(np.rint(samples * 32768), given)


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.5, 0.8, 1.25, 2, 2.5, 4])
def test_speed_changes_the_duration_and_keeps_the_pitch(speed: float) -> None:
    samples, rate = decoded("wav", encoded("wav", *np.array_split(tone(2), 5), speed=speed))
    assert len(samples) / rate == pytest.approx(2 / speed, abs=0.06)
    assert pitch_hz(samples, rate) == pytest.approx(440, abs=3)
    assert np.abs(samples).max() < 0.6


@pytest.mark.parametrize("format", MEDIA_TYPES)
@pytest.mark.parametrize("speed", [1, 2])
def test_unusual_samples_are_spoken_as_far_as_they_are_sound(format: str, speed: float) -> None:
    loud = np.float64([1e300, -7, np.inf, -np.inf, np.nan] * 200)
    sounds = [[], loud, np.float16([0.5]), [1, -1], np.zeros(0, np.int16), tone(0.3)[::2], tone(0.3)]
    samples, _ = decoded(format, encoded(format, *sounds, speed=speed))
    assert np.isfinite(samples).all()
    with Encoder(format, RATE) as encoder, pytest.raises(ValueError, match="one dimension"):
        encoder.encode(np.zeros((2, 100)))


def test_louder_samples_are_clipped_and_nan_is_silence() -> None:
    data = encoded("pcm", np.float32([2, -2, np.nan, np.inf, -np.inf, 0.5]))
    assert np.frombuffer(data, "<i2").tolist() == [32767, -32768, 0, 32767, -32768, 16384]


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_a_sound_without_samples_is_no_error(format: str) -> None:
    assert encoded(format) == encoded(format, [], [])
    for closes in range(3):
        encoder = Encoder(format, RATE, 2)
        for _ in range(closes):
            encoder.close()


@pytest.mark.parametrize("whole", [None, RATE])
def test_wav_is_read_by_players_with_and_without_its_size(whole: int | None) -> None:
    data = encoded("wav", *np.array_split(tone(), 3), whole=whole)
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert (len(samples), rate) == (RATE, RATE)
    with wave.open(io.BytesIO(data)) as sound:
        assert sound.getparams()[:3] == (1, 2, RATE)
        assert sound.readframes(sound.getnframes()) == samples.tobytes()
    sizes = int.from_bytes(data[4:8], "little"), int.from_bytes(data[40:44], "little")
    assert sizes == ((0xFFFFFFFF, 0xFFFFFFFF) if whole is None else (len(data) - 8, 2 * whole))


def test_the_size_of_a_wav_that_cannot_be_known_or_told_is_open() -> None:
    for speed, whole in ((2.0, RATE), (1.0, 1 << 32)):
        with Encoder("wav", RATE, speed, whole=whole) as encoder:
            assert encoder.encode([0.0])[40:44] == b"\xff" * 4


def test_flac_has_its_length_if_that_is_known() -> None:
    """libsndfile needs it; ffmpeg, and so browsers, do not."""
    data = encoded("flac", *np.array_split(tone(), 3), whole=RATE)
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert (len(samples), rate) == (RATE, RATE)
    assert soundfile.info(io.BytesIO(data)).subtype == "PCM_16"
    unknown = encoded("flac", tone())
    assert len(unknown) == pytest.approx(len(data), abs=100)
    assert np.array_equal(decoded("flac", unknown)[0], samples / 32768)


@pytest.mark.parametrize("format", ["MP3", "ogg", "", "wav\0"])
def test_an_unknown_format_is_refused(format: str) -> None:
    with pytest.raises(InvalidInput, match="mp3, opus, aac, flac, wav, pcm"):
        Encoder(format, RATE)


@pytest.mark.parametrize("speed", [0.24, 4.01, -1, 0, float("nan"), float("inf")])
def test_a_speed_out_of_range_is_refused(speed: float) -> None:
    with pytest.raises(InvalidInput, match=r"0\.25 to 4"):
        Encoder("wav", RATE, speed)


def test_without_pyav_wav_and_pcm_work_and_the_rest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert len(encoded("wav", tone())) == 44 + 2 * RATE
    assert len(encoded("pcm", tone())) == 2 * RATE
    assert len(encoded("pcm", tone(rate=48_000), rate=48_000)) == pytest.approx(2 * RATE, abs=4)
    for format, speed in [("mp3", 1.0), ("opus", 1.0), ("aac", 1.0), ("flac", 1.0), ("wav", 1.5)]:
        with pytest.raises(InvalidInput, match=r"package av: .*'gpu-managed-tts"):
            Encoder(format, RATE, speed)


def test_encoders_leave_no_memory_behind() -> None:
    """Also those that end early, and before the garbage collector runs."""
    sound = tone(0.1)

    def make(count: int) -> None:
        for index in range(count):
            with Encoder(list(MEDIA_TYPES)[index % 6], RATE, (1, 2, 0.4)[index % 3]) as encoder:
                encoder.encode(sound)
                if index % 2:
                    encoder.finish()

    process = psutil.Process()
    make(500)
    gc.collect()
    gc.disable()
    try:
        before, descriptors = process.memory_info().rss, process.num_fds()
        make(2000)
        assert process.memory_info().rss - before < 4 << 20
        assert process.num_fds() == descriptors
    finally:
        gc.enable()


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_encoders_in_several_threads_are_independent(format: str) -> None:
    sounds = [tone(0.3, 200 + 50 * index) for index in range(8)]
    expected = [encoded(format, *np.array_split(each, 20), speed=1.5) for each in sounds]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda each: encoded(format, *np.array_split(each, 20), speed=1.5), sounds * 3)
    for one, other in zip(found, expected * 3, strict=True):
        if format == "opus":  # whose streams have random numbers
            assert np.array_equal(decoded(format, one)[0], decoded(format, other)[0])
        else:
            assert one == other


def joined(sounds: list[NDArray[np.float32]], rate: int = RATE) -> Iterator[NDArray[np.float32]]:
    joiner = Joiner(rate)
    for each in sounds:
        yield joiner.add(each)
    yield joiner.finish()


def test_joined_sentences_overlap_by_the_fade_and_are_ready_at_once() -> None:
    sounds = [tone(0.5), tone(0.7, 300), tone(0.2, 500)]
    parts = list(joined(sounds))
    assert sum(map(len, parts)) == sum(map(len, sounds)) - 2 * FADE
    assert np.array_equal(parts[0], sounds[0][:-FADE])
    assert len(parts[-1]) == FADE
    assert np.array_equal(parts[1][FADE:], sounds[1][FADE:-FADE])


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.25, 0.5, 0.77])
def test_a_join_has_no_click(cut: float) -> None:
    first, second = tone(0.5 + cut / 440), tone(0.5, 300)[round(cut * 80) :]
    sound = np.concatenate(list(joined([first, second])))
    inside = max(np.abs(np.diff(first)).max(), np.abs(np.diff(second)).max())
    assert np.abs(np.diff(sound)).max() <= inside * 1.05
    assert np.abs(sound).max() <= 0.5


def test_equal_sentences_are_joined_without_a_change_of_level() -> None:
    level = np.full(1000, 0.25, np.float32)
    assert np.concatenate(list(joined([level, level]))) == pytest.approx(np.full(2000 - FADE, 0.25))


@given(st.lists(st.integers(0, 1200), max_size=8))
def test_pieces_of_any_length_are_joined(lengths: list[int]) -> None:
    sounds = [np.full(length, 0.5, np.float32) for length in lengths]
    sound = np.concatenate(list(joined(sounds)))
    assert sound == pytest.approx(np.full(len(sound), 0.5))
    longest = [length for length in lengths if length >= FADE]
    assert len(sound) <= sum(lengths)
    assert len(sound) >= sum(lengths) - FADE * max(0, sum(1 for length in lengths if length) - 1)
    if longest == lengths:
        assert len(sound) == sum(lengths) - FADE * max(0, len(lengths) - 1)


def test_a_joiner_takes_what_an_encoder_takes() -> None:
    joiner = Joiner(1000)
    assert joiner.add([]).dtype == joiner.finish().dtype == np.float32
    found = joiner.add(np.int16([16384] * 30))
    assert found == pytest.approx([0.5] * 10)
    assert joiner.add([np.nan] * 40 + [9.0] * 20)[20:] == pytest.approx([0.0] * 20)
    assert joiner.finish() == pytest.approx([1.0] * 20)
    with pytest.raises(ValueError, match="one dimension"):
        joiner.add(np.zeros((1, 5)))
