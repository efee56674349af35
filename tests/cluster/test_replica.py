"""One managed engine in a replica: its errors, also strange ones, and calls that are cancelled."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cloudpickle", reason="comes with Ray: scripts/test_cluster installs it")

import cloudpickle  # type: ignore[import-untyped]

from residency.cancellation import checkpoint
from residency.cluster.replica import Answered, Asked, Replica
from residency.remote_errors import rebuilt

ASKED = Asked("clone", ".wav", ("one", "two"))
RECORDING = np.arange(4, dtype=np.uint8)


class Manager:
    def watching(self, watch: Callable[[Any], object]) -> AbstractContextManager[None]:
        return nullcontext()


class Engine:
    """``clone`` calls ``act`` with the content of the recording."""

    def __init__(self, act: Callable[[bytes], object]) -> None:
        self._act = act

    def clone(self, path: str, prompt_text: str, target_text: str) -> tuple[Any, int]:
        self._act(Path(path).read_bytes())
        return np.ones((1, 3), np.float32), 24_000

    def edit(self, *arguments: object) -> tuple[Any, int]:
        raise NotImplementedError


def replica(act: Callable[[bytes], object], folder: Path) -> Replica:
    return Replica(Engine(act), Manager(), str(folder))


def test_the_engine_gets_the_recording_as_a_file_that_is_deleted(tmp_path: Path) -> None:
    seen: list[bytes] = []
    answered = asyncio.run(replica(seen.append, tmp_path).call(ASKED, RECORDING))
    assert seen == [RECORDING.tobytes()]
    assert answered.samples is not None
    assert answered.samples.tolist() == [1, 1, 1]
    assert not list(tmp_path.iterdir())


def test_an_engine_that_exits_ends_its_call_only(tmp_path: Path) -> None:
    one = replica(lambda content: sys.exit(3), tmp_path)

    async def twice() -> list[Answered]:
        return [await one.call(ASKED, RECORDING) for _ in range(2)]

    for answered in asyncio.run(twice()):
        assert answered.error is not None
        assert "SystemExit: 3" in str(rebuilt(answered.error, cloudpickle.loads))
    assert not list(tmp_path.iterdir())


def test_a_cancelled_call_ends_the_engine_at_its_next_step(tmp_path: Path) -> None:
    begun, cancelled, stopped = threading.Event(), threading.Event(), threading.Event()

    def act(content: bytes) -> None:
        begun.set()
        assert cancelled.wait(60)
        try:
            checkpoint()
        except Exception:
            stopped.set()
            raise

    async def cancel() -> None:
        call = asyncio.ensure_future(replica(act, tmp_path).call(ASKED, RECORDING))
        await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        cancelled.set()

    asyncio.run(cancel())
    assert stopped.wait(60)
