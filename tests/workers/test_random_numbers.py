"""Random numbers in a worker are those of the same calls in one process."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from worker_engines import LINUX, Engine, EngineError

from gpu_manager import GPUResourceManager, SimulatedDevice
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX


class Drawn(Engine):
    """Its weights are drawn, and it seeds the generators, as some loaders do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        self.weights = torch.rand(8)


def seed(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


def here() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(numpy.random.rand()), random.random()


def story(isolation: Any) -> list[Any]:
    """Returns what calls and the caller draw, in one process or with a worker."""
    seed(5)
    seen: list[Any] = []
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation=isolation) as manager:
        tts = GPUManagedTTS(None, manager=manager, load=Drawn, name="tts")
        seen += [tts.draw(), here(), tts.draw(), tts.model.weight.tolist(), tts.weights.tolist()]
        tts.force_offload()
        seen += [tts.draw(), here()]
        tts.force_release()
        seen += [here(), tts.draw(), tts.weights.tolist()]
        seed(6)
        seen += [tts.draw(), tts.draw()]
        torch.manual_seed(7)
        seen += [tts.draw(), tts.seeded(8), torch.initial_seed(), here(), tts.draw()]
        with pytest.raises(EngineError):
            tts.fails()
        seen += [here(), tts.draw()]
        stream = tts.draws(3)
        seen += [next(stream), here(), next(stream), here()]
        stream.close()
        seen += [here(), torch.initial_seed()]
        other = GPUManagedTTS(None, manager=manager, load=Drawn, name="other")
        seen += [other.draw(), tts.draw(), other.draw(), here()]
    return seen


def test_a_worker_draws_the_same_numbers() -> None:
    expected = story("none")
    assert story("process") == expected
    assert len({str(entry) for entry in expected}) > 20
