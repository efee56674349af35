from __future__ import annotations

import threading
from typing import Any

import pytest

from benchmarks import speech_api


class Connection:
    """Has any number of bytes, and remembers how many were read at a time."""

    def __init__(self, rest: list[bytes]) -> None:
        self.reads: list[int] = []
        self.is_over = False
        self._rest = rest

    def recv(self, most: int) -> bytes:
        if self.is_over:
            return self._rest.pop(0)
        self.reads.append(most)
        return b"x" * most

    def setsockopt(self, *option: int) -> None:
        self.is_over = True

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return


class After(threading.Event):
    """Is set after so many waits, and remembers their seconds."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self._left, self.waited_s = waits, 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        self.waited_s += timeout or 0
        return self._left < 0


@pytest.mark.parametrize(("rate", "each"), [(1, 1), (300, 75), (800, 200)])
def test_a_slow_client_reads_no_more_than_its_rate_until_the_end(rate: int, each: int) -> None:
    connection: Any = Connection([b"head\r\n\r\n", b"audio", b""])
    over = After(20)
    read = speech_api._read(connection, rate, over)
    assert connection.reads == [each] * 20
    assert over.waited_s > 0
    assert read == b"audio"
