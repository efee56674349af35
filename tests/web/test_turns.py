"""Requests are spoken in their order of arrival, whatever their checks take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from app_process import wait_until
from local_server import Served as Server
from raw_http import begun
from served_tones import Served

from residency.errors import InvalidInput
from residency.web.api import turns
from residency.web.api.turns import Turns

pytestmark = pytest.mark.in_process("the tests' engine has gates, which a worker process does not have")


@pytest.fixture(params=[True, False], ids=["managed", "not managed"])
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(tmp_path, managed=request.param)
    yield served
    served.manager.close()


@pytest.fixture
def server(served: Served) -> Iterator[Server]:
    server = Server(served.app)
    yield server
    server.close()


class Gate:
    """Holds back the check of the voice named ``high``, and fails it if told to."""

    def __init__(self, served: Served) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.error: Exception | None = None
        get = served.voices.get

        def held_back(name: str) -> Any:
            if name == "high":
                self.reached.set()
                assert self.opened.wait(60)
                if self.error:
                    raise self.error
            return get(name)

        served.voices.get = held_back  # type: ignore[method-assign]


def speech(served: Served, text: str, voice: str, address: str = "127.0.0.1") -> int:
    body = {"input": text, "voice": voice, "response_format": "pcm"}
    return int(served.client((address, 4000)).post("/v1/audio/speech", json=body).status_code)


def spoken(served: Served) -> list[str]:
    return [text for *_, text in served.tones.asked]


def waits(served: Served, count: int) -> bool:
    """Returns whether so many requests have been checked, and wait for an earlier one."""
    return len(served.calls.turns.changed._waiters) == count  # type: ignore[attr-defined]


def test_one_that_is_checked_slowly_is_spoken_first(served: Served) -> None:
    gate = Gate(served)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(speech, served, "First.", "high")
        assert gate.reached.wait(60)
        others = []
        for number, text in enumerate(("Second.", "Third.")):
            others.append(threads.submit(speech, served, text, "low"))
            assert wait_until(lambda number=number: waits(served, number + 1) or spoken(served))
        gate.opened.set()
        assert [each.result(60) for each in (first, *others)] == [200] * 3
    assert spoken(served) == ["First.", "Second.", "Third."]
    assert served.calls.turns.waiting == []


def test_requests_of_other_addresses_do_not_wait_for_its_check(served: Served) -> None:
    gate = Gate(served)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(speech, served, "First.", "high")
        assert gate.reached.wait(60)
        assert speech(served, "Of another.", "low", "192.0.2.7") == 200
        gate.opened.set()
        assert first.result(60) == 200
    assert spoken(served) == ["Of another.", "First."]


def test_one_that_is_refused_gives_up_its_place(served: Served) -> None:
    gate = Gate(served)
    gate.error = InvalidInput("No such voice", "没有该声音", "voice")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(speech, served, "First.", "high")
        assert gate.reached.wait(60)
        second = threads.submit(speech, served, "Second.", "low")
        assert wait_until(lambda: waits(served, 1) or spoken(served))
        gate.opened.set()
        assert (first.result(60), second.result(60)) == (400, 200)
    assert spoken(served) == ["Second."]
    assert served.calls.turns.waiting == []


def test_one_that_leaves_while_it_waits_for_its_turn(served: Served, server: Server) -> None:
    gate = Gate(served)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(speech, served, "First.", "high")
        assert gate.reached.wait(60)
        leaves = begun(server.port, "/v1/audio/speech", b'{"input": "Second.", "voice": "low"}')
        assert wait_until(lambda: waits(served, 1) or spoken(served))
        leaves.close()
        assert wait_until(lambda: len(served.calls.turns.waiting) == 1)
        gate.opened.set()
        assert first.result(60) == 200
    assert spoken(served) == ["First."]


def test_one_whose_body_does_not_come_delays_no_other_for_long(
    served: Served, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_BODY_WITHIN_S", 0.01)
    with begun(server.port, "/v1/audio/speech", b'{"input": ', length=1000):
        assert wait_until(lambda: len(served.calls.turns.waiting) == 1)
        assert speech(served, "Second.", "low") == 200
    assert wait_until(lambda: not served.calls.turns.waiting)


def test_how_long_a_body_is_waited_for() -> None:
    now_s = [100.0]
    places = Turns(lambda: now_s[0])
    with places.taken("a") as first, places.taken("a") as second, places.taken("b") as of_another:
        assert first._left_s() <= 0
        of_another.wait()
        assert second._left_s() == turns._BODY_WITHIN_S
        now_s[0] += turns._BODY_WITHIN_S
        second.wait()
        first.received()
        assert second._left_s() == float("inf"), "its checks are the server's own work"
        of_another.wait()
        first.end()
        second.wait()
    assert places.waiting == []
