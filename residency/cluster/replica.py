"""One managed engine in a process of its own, which Ray Serve starts, watches and ends."""

from __future__ import annotations

import asyncio
import contextvars
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from ..cancellation import Cancellation, cancelled_by
from ..contracts import Engine
from ..errors import ManagerClosed, UnknownModel
from ..remote_errors import ErrorRecord, recorded


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


class Closable(Engine, Protocol):
    """A managed engine."""

    def close(self) -> None:
        """Releases it after its running calls."""


class Replica:
    """Calls a managed engine. Calls run in threads; the queue of the engine's manager orders them."""

    def __init__(self, engine: Closable) -> None:
        self._engine = engine
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

    def __del__(self) -> None:
        """Called when another model takes its place in the process."""
        threading.Thread(target=self._closed, name="close-model", daemon=True).start()

    def _closed(self) -> None:
        with suppress(UnknownModel, ManagerClosed):  # the process ends
            self._engine.close()

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
