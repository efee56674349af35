"""The voice is the target's, the words and their timing stay the source's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from residency.engines import voice, world


@pytest.fixture(scope="module")
def frames(speech: np.ndarray) -> world.Frames:
    return world.analyse(speech)


def other_speaker(frames: world.Frames, pitch: float, warp: float) -> world.Frames:
    """The same speaker with another pitch and another length of the vocal tract."""
    return replace(frames, f0=frames.f0 * pitch, envelope=voice._warped(frames.envelope, warp))


def measured(frames: world.Frames) -> voice.Voice:
    found = voice.measure(world.synthesise(frames), frames)
    assert found is not None
    return found


def test_world_is_transparent(speech: np.ndarray, frames: world.Frames) -> None:
    again = world.analyse(world.synthesise(frames)[: len(speech)])
    both = (frames.f0 > 0) & (again.f0 > 0)
    assert np.median(np.abs(np.log(again.f0[both] / frames.f0[both]))) < 0.01
    assert world.synthesise(frames).dtype == np.float32


@pytest.mark.parametrize(("pitch", "warp"), [(0.5, 0.84), (0.7, 0.9), (1.3, 1.08)])
def test_voice_becomes_the_targets(frames: world.Frames, pitch: float, warp: float) -> None:
    source = measured(frames)
    target = measured(other_speaker(frames, pitch, warp))
    converted = measured(voice.convert(frames, source, target))
    assert converted.pitch == pytest.approx(target.pitch, abs=0.03)
    assert converted.spread == pytest.approx(target.spread, rel=0.2)
    band = slice(8, 300)
    before = np.abs(source.voiced - target.voiced)[band].mean()
    assert np.abs(converted.voiced - target.voiced)[band].mean() < before / 2


def test_own_voice_changes_nothing(frames: world.Frames) -> None:
    own = measured(frames)
    same = voice.convert(frames, own, own)
    assert np.allclose(same.f0, frames.f0, rtol=1e-6)
    loud = frames.envelope > frames.envelope.max() * 1e-4
    assert np.abs(np.log(same.envelope[loud] / frames.envelope[loud])).mean() < 0.15


def test_extreme_voices_stay_within_bounds(frames: world.Frames) -> None:
    own = measured(frames)
    for sign in (-1, 1):
        strange = replace(
            own, pitch=own.pitch + sign * 3, spread=5.0, voiced=own.voiced + sign * np.linspace(-20, 20, 513)
        )
        converted = voice.convert(frames, own, strange)
        voiced = converted.f0[frames.f0 > 0]
        assert voiced.min() >= world.F0_FLOOR
        assert voiced.max() <= world.F0_CEIL
        audio = world.synthesise(converted)
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() > 0.01


def test_too_little_voice_is_no_voice(speech: np.ndarray) -> None:
    noise = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.1
    assert voice.measure(noise, world.analyse(noise)) is None
    blip = speech[24000 : 24000 + 3600]
    assert voice.measure(blip, world.analyse(blip)) is None


def test_voice_without_unvoiced_sounds(frames: world.Frames) -> None:
    own = measured(frames)
    hummed = replace(own, unvoiced=None)
    assert np.isfinite(voice.convert(frames, own, hummed).envelope).all()
