"""One managed engine in a process of its own, which Ray Serve starts, watches and ends."""

from __future__ import annotations

import asyncio
import contextvars
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from ..cancellation import Cancellation, cancelled_by
from ..contracts import Engine
from ..errors import EngineUnavailable, NotReady
from ..remote_errors import ErrorRecord, recorded


@dataclass(frozen=True)
class Asked:
    """One call of an engine, without the recording that is its first argument. ``suffix``: that of the file's name."""

    method: str
    suffix: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answered:
    """The result of a call: float32 samples, and Hz; or its error.

    ``elsewhere``: the cause of the error is on this machine (a full disk, no files of the model), so that another
    replica may answer.
    """

    samples: NDArray[np.float32] | None = None
    sample_rate: int = 0
    error: ErrorRecord | None = None
    elsewhere: bool = False


def failed(error: Exception) -> Answered:
    """Returns the answer of a call that has raised an error."""
    local = isinstance(error, EngineUnavailable | ImportError | OSError) and not isinstance(error, TimeoutError)
    return Answered(error=recorded(error, cloudpickle.dumps), elsewhere=local)


@dataclass(eq=False, repr=False)
class ModelNotThere(NotReady):
    """The replicas do not have a model: they were updated since the caller has started."""

    model: str
    en = "The replicas no longer have the model {self.model!r}: look at their configuration, or restart the app here."
    zh = "副本中已没有模型 {self.model!r}：请检查其配置，或重启发出请求的应用。"


class Manager(Protocol):
    """The manager of the engine."""

    def watching(self, watch: Callable[[Any], object]) -> AbstractContextManager[None]: ...


class Replica:
    """Calls a managed engine. Calls run in threads; the queue of the engine's manager orders them.

    ``folder``: for the recordings of running calls.
    """

    def __init__(self, engine: Engine, manager: Manager, folder: str) -> None:
        self._engine, self._manager, self._folder = engine, manager, folder
        self._threads = ThreadPoolExecutor(64, "speech")

    async def call(self, asked: Asked, recording: NDArray[np.uint8]) -> Answered:
        """Returns the answer of the engine. ``recording``: content of the file.

        If the call is cancelled, it leaves the queue, or the engine ends at its next step.
        """
        cancellation = Cancellation()
        context = contextvars.copy_context()
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(context.run, self._answer, asked, recording, cancellation)
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def _answer(self, asked: Asked, recording: NDArray[np.uint8], cancellation: Cancellation) -> Answered:
        handle, path = tempfile.mkstemp(suffix=asked.suffix, dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(recording.data)
            with cancelled_by(cancellation), self._manager.watching(lambda lease: cancellation.on_cancel(lease.cancel)):
                audio, sample_rate = getattr(self._engine, asked.method)(path, *asked.arguments)
            return Answered(np.asarray(audio, dtype=np.float32).reshape(-1), sample_rate)
        except Exception as error:
            return failed(error)
        except BaseException as error:  # an engine that calls sys.exit()
            return failed(RuntimeError(f"{type(error).__name__}: {error}"))
        finally:
            os.unlink(path)
