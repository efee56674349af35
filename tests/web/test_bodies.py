from __future__ import annotations

import asyncio
from typing import Any

import pytest

from residency.web.server.bodies import small_bodies_first


def asked(length: int, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What an app receives of a request."""
    coming, received = iter(messages), list[dict[str, Any]]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            received.append(message)
        received.append(message)

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(message: Any) -> None:
        raise AssertionError("nothing is answered")

    scope = {"type": "http", "headers": [(b"content-length", str(length).encode())]}
    asyncio.run(small_bodies_first(app)(scope, receive, send))  # type: ignore[arg-type]
    return received


def piece(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_a_small_body_comes_whole() -> None:
    assert asked(4, piece(b"ab", True), piece(b"cd", False), GONE) == [piece(b"abcd", False), GONE]


def test_of_one_that_is_given_up_the_app_hears_nothing() -> None:
    assert asked(4, piece(b"ab", True), GONE) == []


@pytest.mark.parametrize("length", [0, 1 << 20])
def test_others_come_as_they_are_sent(length: int) -> None:
    assert asked(length, piece(b"ab", True), GONE) == [piece(b"ab", True), GONE]
