"""Small engines for worker processes, and gates at which they stop."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from gpu_manager import GPUResourceManager
from residency.workers.spawner import can_fork_workers

LINUX = pytest.mark.skipif(not can_fork_workers(), reason="worker processes need Linux")


def started(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Runs a function in a thread for which a failed test does not wait."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


class Gate:
    """A place where an engine in another process stops. The engine passes it; the test awaits and opens it."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self._reached, self._opened = str(folder / f"{name}.reached"), str(folder / f"{name}.opened")
        for path in (self._reached, self._opened):
            os.mkfifo(path)

    def __call__(self, *_: Any) -> None:
        """Waits in the kernel until the gate is opened. The gate stands for one passage."""
        if os.path.exists(self._reached):
            Path(self._reached).write_text(str(os.getpid()))
            if Path(self._opened).read_bytes() == b"exit":
                os._exit(3)

    def reached(self) -> int:
        """Waits until the engine is here; returns the process ID."""
        pid = int(Path(self._reached).read_text())
        Path(self._reached).unlink()
        return pid

    def open(self, order: bytes = b"go") -> None:
        Path(self._opened).write_bytes(order)

    def free(self) -> None:
        """Opens the gate if the engine is there, after a failed test."""
        with suppress(OSError):
            os.close(os.open(self._opened, os.O_WRONLY | os.O_NONBLOCK))


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

    def modes(self) -> tuple[Any, ...]:
        """What torch computes with here, and a result of it."""
        product = self.model(torch.ones(1, 4))
        autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        return (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast,
            torch.get_autocast_dtype("cpu"), product.dtype, product.requires_grad, torch.ones(1).dtype,
        )  # fmt: skip

    def stream_of_modes(self) -> Iterator[tuple[Any, ...]]:
        yield self.modes()
        with torch.no_grad():
            yield self.modes()
            yield self.modes()

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


class Listed:
    """Moved by functions that a test registers."""

    def __init__(self) -> None:
        self.says: list[str] = []


class Staged(Engine):
    """Stops at a gate in one of its phases."""

    def __init__(self, phase: str, gate: Gate) -> None:
        super().__init__()
        self.phase, self.gate = phase, gate
        self.passes("load")
        self.mover = Mover(self.passes)

    def passes(self, phase: str) -> None:
        if phase == self.phase:
            self.gate()

    def speak(self) -> str:
        self.passes("call")
        return "spoken"

    def steps(self) -> Iterator[int]:
        yield 1
        self.passes("stream")
        yield 2


class Mover:
    """Moves itself, without memory."""

    def __init__(self, passes: Callable[[str], None]) -> None:
        self._passes = passes

    def offload_from_gpu(self) -> None:
        self._passes("offload")

    def restore_to_gpu(self) -> None:
        self._passes("restore")

    def release_from_gpu(self) -> None:
        self._passes("release")


class Family(Engine):
    """Has child processes of all kinds, and shared memory."""

    def start(self) -> dict[str, int]:
        """Returns their process IDs."""
        forked = multiprocessing.get_context("fork").Process(target=signal.pause)
        spawned = multiprocessing.get_context("spawn").Process(target=signal.pause)
        self.processes = [forked, spawned, subprocess.Popen(["sleep", "infinity"], start_new_session=True)]
        forked.start()
        spawned.start()
        daemon = subprocess.run(
            ["sh", "-c", "setsid sleep infinity >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True, check=True
        )
        pids = [process.pid for process in self.processes]
        return dict(zip(("forked", "spawned", "session"), pids, strict=True)) | {"daemon": int(daemon.stdout)}

    def share(self) -> str:
        """Returns the name of a new file in ``/dev/shm``."""
        self.shared = shared_memory.SharedMemory(create=True, size=4096)
        return self.shared.name


def build(nbytes: int = 4096) -> Engine:
    return Engine(nbytes)


def of(nbytes: int) -> Callable[[], Engine]:
    return functools.partial(build, nbytes)


#: Files in ``/dev/shm`` of browsers, of `multiprocessing.shared_memory` and of semaphores, also of other tests.
_OF_OTHERS = (".org", "psm_", "sem.")


def held() -> dict[str, Any]:
    """Returns what this process holds of the system, beside its main memory."""
    gc.collect()
    fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    return {
        "processes": sorted(process.pid for process in psutil.Process().children(recursive=True)),
        "descriptors": sorted(name.partition(":")[0] for name in fds),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("gpu-")),
        "shared memory": sorted(name for name in os.listdir("/dev/shm") if not name.startswith(_OF_OTHERS)),
    }


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def await_threads(known: Collection[threading.Thread]) -> None:
    """Waits for the end of threads of ended workers and servers, beside those that are known."""
    for thread in threading.enumerate():
        if thread.name.startswith("gpu-worker-") and thread not in known:
            thread.join(30)


def speak(manager: GPUResourceManager) -> float:
    """Calls the model ``tts``."""
    with manager.lease("tts") as engine:
        answer: float = engine()
    return answer
