from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from gpu_manager import GPUResourceManager
from residency.errors import TooManyListeners
from residency.observability.events import Event
from residency.web.api import event_stream


async def status() -> dict[str, str]:
    return {"all": "well"}


def said(message: str) -> tuple[str, Any]:
    """(kind, data) of a message as a browser reads it."""
    kind, data, *end = message.split("\n")
    assert end == ["", ""]
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def use(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        pass


def listeners(manager: GPUResourceManager) -> int:
    return len(manager._dispatcher.notifier.listeners._listeners)


def test_the_status_comes_first_and_then_every_move_in_order(manager: GPUResourceManager) -> None:
    async def listen() -> list[tuple[str, Any]]:
        moves = event_stream.Moves(manager)
        with moves.listen(status) as messages:
            heard = [said(await anext(messages))]
            await asyncio.to_thread(use, manager)
            while len([kind for kind, _ in heard if kind == "done"]) < 2:
                heard.append(said(await anext(messages)))
        return heard

    heard = asyncio.run(listen())
    assert heard[0] == ("status", {"all": "well"})
    for _, event in heard[1:]:
        assert asdict(TypeAdapter(Event).validate_python(event)) == event
    steps = [(kind, event["source"], event["target"]) for kind, event in heard[1:] if kind in ("began", "done")]
    assert steps == [
        ("began", "released", "gpu"),
        ("done", "released", "gpu"),
        ("began", "gpu", "cpu"),
        ("done", "gpu", "cpu"),
    ]
    assert listeners(manager) == 0, "nobody listens any more"


def test_one_who_is_too_slow_is_sent_away(manager: GPUResourceManager, monkeypatch: Any) -> None:
    monkeypatch.setattr(event_stream, "_BACKLOG", 1)

    async def listen() -> int:
        moves = event_stream.Moves(manager)
        with moves.listen(status) as messages:
            await anext(messages)
            loop, told = asyncio.get_running_loop(), asyncio.Event()
            # Called after the other listener, for each event.
            end = manager.subscribe(
                lambda event: event.target == "cpu" and event.what == "done" and loop.call_soon_threadsafe(told.set)
            )
            await asyncio.to_thread(use, manager)
            await told.wait()
            end()
            return len([message async for message in messages])

    assert asyncio.run(listen()) == 0
    assert listeners(manager) == 0


def test_somebody_who_hears_nothing_is_told_that_the_line_stands(manager: GPUResourceManager, monkeypatch: Any) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0)

    async def listen() -> str:
        moves = event_stream.Moves(manager)
        with moves.listen(status) as messages:
            await anext(messages)
            return await anext(messages)

    assert asyncio.run(listen()).startswith(": ")


def test_one_more_than_may_listen_is_refused_until_one_leaves(manager: GPUResourceManager) -> None:
    async def come_and_go() -> None:
        moves = event_stream.Moves(manager, most=2)
        with moves.listen(status):
            with moves.listen(status), pytest.raises(TooManyListeners), moves.listen(status):
                pass
            with moves.listen(status):
                assert listeners(manager) == 1, "one subscription serves all"
        assert listeners(manager) == 0

    asyncio.run(come_and_go())


def test_all_listeners_read_the_same_message(manager: GPUResourceManager) -> None:
    """What one costs does not grow with what is told."""

    async def listen() -> list[str]:
        moves = event_stream.Moves(manager)
        with ExitStack() as until_done:
            everybody = [until_done.enter_context(moves.listen(status)) for _ in range(3)]
            for each in everybody:
                await anext(each)
            await asyncio.to_thread(use, manager)
            return [await anext(each) for each in everybody]

    first, *others = asyncio.run(listen())
    assert all(other is first for other in others)


def test_progress_is_left_out_for_who_is_behind(manager: GPUResourceManager, monkeypatch: Any) -> None:
    monkeypatch.setattr(event_stream, "_BACKLOG", 3)
    monkeypatch.setattr(event_stream, "asdict", vars)

    async def listen() -> list[str]:
        moves = event_stream.Moves(manager)
        with moves.listen(status) as messages:
            await anext(messages)
            for what in ("began", "progress", "progress", "progress", "done"):
                moves._send(SimpleNamespace(what=what))
            return [said(await anext(messages))[0] for _ in range(4)]

    assert asyncio.run(listen()) == ["began", "progress", "progress", "done"]
