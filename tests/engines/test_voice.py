"""The voice is the target's, the words and their timing stay the source's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from residency.engines import world


@pytest.fixture(scope="module")
def frames(speech: np.ndarray) -> world.Frames:
    return world.analyse(speech)


def other_speaker(frames: world.Frames, pitch: float, warp: float) -> world.Frames:
    """Saying the same with another pitch, another length of the vocal tract and a darker, livelier sound."""
    tilt = np.interp(np.arange(513), [0, 20, 120, 512], [0, 0, -2, -3])
    spectra = np.log(world._warped(frames.envelope, warp) + 1e-12)
    lively = np.where(frames.f0[:, None] > 0, spectra + 0.3 * (spectra - spectra[frames.f0 > 0].mean(axis=0)), spectra)
    melody = np.where(frames.f0 > 0, (np.maximum(frames.f0, 1) / 190) ** 1.4 * 190 * pitch, 0)
    return replace(frames, f0=melody, envelope=np.exp(lively + tilt))


def measured(frames: world.Frames) -> world.Voice:
    found = world.measure(world.synthesise(frames), frames)
    assert found is not None
    return found


def test_world_is_transparent(speech: np.ndarray, frames: world.Frames) -> None:
    again = world.analyse(world.synthesise(frames)[: len(speech)])
    both = (frames.f0 > 0) & (again.f0 > 0)
    assert np.median(np.abs(np.log(again.f0[both] / frames.f0[both]))) < 0.01
    assert world.synthesise(frames).dtype == np.float32


def distance_db(one: world.Frames, other: world.Frames) -> float:
    """Between the spectra of voiced frames from 200 Hz to 7 kHz, whatever their level."""
    voiced = one.f0 > 0
    spectra = [np.log(frames.envelope[voiced, 8:300] + 1e-12) for frames in (one, other)]
    difference = spectra[0] - spectra[1]
    return float(np.abs(difference - difference.mean()).mean() * 10 / np.log(10))


@pytest.mark.parametrize(("pitch", "warp"), [(0.5, 0.84), (0.7, 0.9), (1.3, 1.08)])
def test_voice_becomes_the_targets(frames: world.Frames, pitch: float, warp: float) -> None:
    same_said = other_speaker(frames, pitch, warp)
    source, target = measured(frames), measured(same_said)
    assert world._warp(source, target) == pytest.approx(warp, abs=0.03)
    converted = world.convert(frames, source, target)
    assert measured(converted).pitch == pytest.approx(target.pitch, abs=0.03)
    assert measured(converted).spread == pytest.approx(target.spread, rel=0.2)
    assert distance_db(converted, same_said) < 0.46 * distance_db(frames, same_said)


def test_own_voice_changes_nothing(frames: world.Frames) -> None:
    own = measured(frames)
    same = world.convert(frames, own, own)
    assert np.allclose(same.f0, frames.f0, rtol=1e-6)
    loud = frames.envelope > frames.envelope.max() * 1e-4
    assert np.abs(np.log(same.envelope[loud] / frames.envelope[loud])).mean() < 0.15


def test_extreme_voices_stay_within_bounds(frames: world.Frames) -> None:
    own = measured(frames)
    for sign in (-1, 1):
        strange = replace(
            own, pitch=own.pitch + sign * 3, spread=5.0, voiced=own.voiced + sign * np.linspace(-20, 20, 513)
        )
        converted = world.convert(frames, own, strange)
        voiced = converted.f0[frames.f0 > 0]
        assert voiced.min() >= world.F0_FLOOR
        assert voiced.max() <= world.F0_CEIL
        audio = world.synthesise(converted)
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() > 0.01


def test_too_little_voice_is_no_voice(speech: np.ndarray) -> None:
    noise = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.1
    assert world.measure(noise, world.analyse(noise)) is None
    blip = speech[24000 : 24000 + 3600]
    assert world.measure(blip, world.analyse(blip)) is None


def test_voice_without_unvoiced_sounds(frames: world.Frames) -> None:
    own = measured(frames)
    hummed = replace(own, unvoiced=None)
    assert np.isfinite(world.convert(frames, own, hummed).envelope).all()
