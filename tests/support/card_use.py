"""Weights of a given size, and their use, for tests of cards that processes share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from gpu_manager import GPUResourceManager
from residency.sharing.board import Board


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


def looks(board: Board, count: int) -> None:
    """Waits until this process has looked at the card so many times more."""
    seen: set[float] = set()

    def look() -> bool:
        mine = [each for each in board.tickets() if each.marks_presence and each.pid == os.getpid()]
        seen.update(each.beat_s for each in mine)
        return len(seen) > count + 1

    until(look)
