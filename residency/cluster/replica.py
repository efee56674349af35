"""One managed engine in a process of its own, which Ray Serve starts, watches and ends."""

from __future__ import annotations

import asyncio
import contextvars
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from ..cancellation import Cancellation, cancelled_by
from ..contracts import Engine
from ..errors import DeviceLost
from ..remote_errors import ErrorRecord, recorded

CLOSED_WITHIN_S = 30.0
"""Maximum duration of running calls after the end of a replica has begun."""


@dataclass(frozen=True)
class Asked:
    """One call of an engine. ``recording``: content of the file that is its first argument; ``suffix``: its kind."""

    method: str
    recording: bytes
    suffix: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answered:
    """The result of a call: float32 samples, and Hz; or its error."""

    samples: NDArray[np.float32] | None = None
    sample_rate: int = 0
    error: ErrorRecord | None = None


class Manager(Protocol):
    """The manager of the engine."""

    @property
    def device_lost(self) -> DeviceLost | None: ...

    def close(self, timeout: float) -> bool: ...


class Replica:
    """Calls a managed engine. Calls run in threads; the queue of the engine's manager orders them."""

    def __init__(self, engine: Engine, manager: Manager) -> None:
        self._engine, self._manager = engine, manager
        self._threads = ThreadPoolExecutor(64, "speech")

    async def call(self, asked: Asked) -> Answered:
        """Returns the answer of the engine. If the call is cancelled, so is the engine at its next step."""
        cancellation = Cancellation()
        context = contextvars.copy_context()
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(context.run, self._answer, asked, cancellation)
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def check_health(self) -> None:
        """Raises `DeviceLost` if the device has failed: then this process is replaced by another one."""
        if lost := self._manager.device_lost:
            raise lost

    def close(self) -> None:
        """Ends the engine after its running calls, and frees its memory everywhere."""
        self._manager.close(CLOSED_WITHIN_S)

    def _answer(self, asked: Asked, cancellation: Cancellation) -> Answered:
        handle, path = tempfile.mkstemp(suffix=asked.suffix)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(asked.recording)
            with cancelled_by(cancellation):
                audio, sample_rate = getattr(self._engine, asked.method)(path, *asked.arguments)
            return Answered(np.asarray(audio, dtype=np.float32).reshape(-1), sample_rate)
        except Exception as error:
            return Answered(error=recorded(error, cloudpickle.dumps))
        finally:
            os.unlink(path)
