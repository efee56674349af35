"""A response whose thread outlives its client, on a system without further threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import CapacityLimiter
from fakes import Gate

from residency.cancellation import current
from residency.web.api.streamed import Streamed, Write


class Left(Exception):
    """The client has left."""


def cannot_start(*arguments: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_further_thread_the_request_is_cancelled_and_its_disk_space_is_free_again(tmp_path: Path) -> None:
    gate, reserved, cancelled = Gate(), list[str](), list[bool]()

    @contextmanager
    def room() -> Iterator[Callable[[float], object]]:
        reserved.append("here")
        yield lambda size: None
        reserved.clear()

    def work(write: Write) -> None:
        write(b"begun")
        gate.pass_through()
        cancellation = current()
        assert cancellation is not None
        cancelled.append(cancellation.cancelled)

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        answer = Streamed(work, "audio/wav", tmp_path, room, ExitStack(), CapacityLimiter(1))

        async def send(message: Any) -> None:
            gate.wait_for_arrival()
            loop.run_in_executor = cannot_start  # type: ignore[method-assign, assignment]
            raise Left

        with pytest.raises(Left):
            await answer({"type": "http", "path": "/"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert reserved == ["here"], "its thread still writes"
        gate.open()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
        while reserved and not cancelled:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert cancelled == [True]
    assert reserved == []
