"""Requests are spoken in their order of arrival, whatever their checks take."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from app_process import wait_until
from fakes import Gate as Gates
from local_server import Served as Server
from raw_http import begun
from served_tones import HERE, Served

from residency.errors import InvalidInput
from residency.web.api import turns
from residency.web.api.turns import Turns
from tts_gpu_managed import ask

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


def speech(served: Served, text: str, voice: str | None, address: str = "127.0.0.1", **fields: str) -> int:
    body = {"input": text, "voice": voice, "response_format": "pcm", **fields}
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


@pytest.mark.parametrize("managed", [True, False])
def test_one_whose_words_are_recognized_is_spoken_first(tmp_path: Path, recording: str, managed: bool) -> None:
    gate = Gates()

    def recognize(path: str) -> str:
        gate.pass_through()
        return "the words"

    served: Served = Served(
        tmp_path, managed=managed,
        recognize=(lambda path: ask(served.manager, "asr", lambda asr: asr(path))) if managed else recognize,
    )  # fmt: skip
    served.manager.register("asr", lambda: recognize)
    audio = base64.b64encode(Path(recording).read_bytes()).decode()
    with served.manager, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(speech, served, "First.", None, ref_audio=audio)]
        gate.wait_for_arrival()
        asked.append(threads.submit(speech, served, "Second.", None, ref_audio=audio))
        assert wait_until(lambda: [turn._recognizes for turn in served.calls.turns.waiting] == [True] * 2), (
            "it does not wait for the end of the recognition to enter the same queue"
        )
        asked.append(threads.submit(speech, served, "Third.", "low"))
        assert wait_until(lambda: waits(served, 1) or spoken(served))
        gate.open()
        assert [each.result(60) for each in asked] == [200] * 3
    assert spoken(served) == ["First.", "Second.", "Third."]
    assert served.calls.turns.waiting == []


def test_the_wait_for_earlier_requests_counts(served: Served) -> None:
    now_s = [100.0]
    served.calls.turns = Turns(lambda: now_s[0])
    gate = Gate(served)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(speech, served, "First.", "high")
        assert gate.reached.wait(60)
        body = {"input": "Second.", "voice": "low"}
        second = threads.submit(lambda: served.client(HERE).post("/v1/audio/speech", json=body))
        assert wait_until(lambda: waits(served, 1))
        now_s[0] += 1.5
        gate.opened.set()
        assert first.result(60) == 200
        timing = second.result(60).headers["server-timing"]
    found = re.match(r'wait;dur=([0-9.]+);desc="(.*?)", queue;dur=([0-9.]+)', timing)
    assert found is not None
    assert found[2].startswith("waited 1.5 s for earlier requests of the same address; ")
    assert min(float(found[1]), float(found[3])) >= 1500


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
