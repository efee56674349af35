"""Small engines for worker processes, and gates at which they stop."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"), reason="worker processes need Linux"
)


class Gate:
    """A place where an engine in another process stops. The engine passes it; the test awaits and opens it."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self._reached, self._opened = str(folder / f"{name}.reached"), str(folder / f"{name}.opened")
        for path in (self._reached, self._opened):
            os.mkfifo(path)

    def __call__(self, *_: Any) -> None:
        """Waits in the kernel until the gate is opened."""
        Path(self._reached).write_bytes(b"\0")
        Path(self._opened).read_bytes()

    def reached(self) -> None:
        """Waits until the engine is here."""
        Path(self._reached).read_bytes()

    def open(self) -> None:
        Path(self._opened).write_bytes(b"\0")


@dataclass
class Answer:
    audio: torch.Tensor
    words: list[str]


class EngineError(Exception):
    """Its parameters are others than its ``args``."""

    def __init__(self, number: int, *, device: str) -> None:
        super().__init__(f"error {number} on {device}")
        self.number = number
        self.lock = threading.Lock()


class Speaker:
    """Cannot be pickled, and holds no memory of the device."""

    living: ClassVar[weakref.WeakSet[Speaker]] = weakref.WeakSet()

    def __init__(self, name: str = "Ada") -> None:
        self.lock = threading.Lock()
        self.name = name
        Speaker.living.add(self)

    def says(self, word: str) -> str:
        return f"{self.name}: {word}"


class Caches:
    """Holds memory of the device."""

    def __init__(self) -> None:
        self.keys = torch.ones(8)
        self.scale = 1.0


class Engine:
    def __init__(self, nbytes: int = 4096) -> None:
        self.weights = torch.ones(nbytes // 4)
        self.model = torch.nn.Linear(4, 4)
        self.caches = Caches()
        self.volume = 1.0
        self.speaker = Speaker()
        self.closed: list[str] = []

    def pid(self) -> int:
        return os.getpid()

    def echo(self, value: Any) -> Any:
        return value

    def audio(self, samples: int) -> tuple[torch.Tensor, int]:
        return torch.arange(samples, dtype=torch.float32)[None] * self.volume, 24_000

    def answer(self) -> Answer:
        return Answer(torch.ones(3), ["one", "two"])

    def apply(self, function: Callable[[Any], Any], thing: Any) -> Any:
        return function(thing)

    def is_own(self, thing: Any) -> bool:
        return thing is self.model or thing is self.speaker

    def new_speaker(self) -> Speaker:
        return Speaker("Bob")

    def speakers(self) -> tuple[int, Speaker]:
        return 1, Speaker("Bob")

    def living(self) -> int:
        gc.collect()
        return len(Speaker.living)

    def new_caches(self) -> list[Caches]:
        self._watched = Caches()
        made, self._watched = self._watched, weakref.ref(self._watched)
        return [made]

    def new_caches_live(self) -> bool:
        gc.collect()
        return self._watched() is not None

    def stream(self, items: int, fails_at: int = -1) -> Iterator[Any]:
        try:
            with torch.no_grad():
                for number in range(items):
                    if number == fails_at:
                        raise EngineError(number, device="cpu")
                    yield torch.full((2,), float(number)).numpy()
        finally:
            self.closed.append(f"stream of {items}, gradients {torch.is_grad_enabled()}")

    def gradients(self) -> bool:
        return torch.is_grad_enabled()

    def draw(self) -> tuple[float, float, float]:
        import numpy

        return torch.rand(1).item(), float(numpy.random.rand()), random.random()

    def draws(self, count: int) -> Iterator[tuple[float, float, float]]:
        for _ in range(count):
            yield self.draw()

    def seeded(self, seed: int) -> float:
        torch.manual_seed(seed)
        return torch.rand(1).item()

    def fails(self, how: str = "own") -> None:
        torch.rand(1)
        try:
            raise KeyError("inner")
        except KeyError as cause:
            if how == "own":
                raise EngineError(7, device="cpu") from cause
            if how == "file":
                open("/nonexistent/file")  # noqa: SIM115
            raise ValueError("outer")  # noqa: B904

    def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def exit(self, code: int) -> None:
        os._exit(code)


def build(nbytes: int = 4096) -> Engine:
    return Engine(nbytes)


def of(nbytes: int) -> Callable[[], Engine]:
    return functools.partial(build, nbytes)


def kill_quietly(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
