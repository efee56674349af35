"""Weights of a given size, and their use, for tests of cards that processes share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from gpu_manager import GPUResourceManager


class Weights:
    def __init__(self, nbytes: int) -> None:
        self.weights = torch.arange(nbytes, dtype=torch.uint8)


def use(manager: GPUResourceManager, name: str = "tts") -> None:
    with manager.lease(name):
        pass


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        os.sched_yield()
