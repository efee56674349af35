"""Neighbours that do not load again by themselves get their memory back, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from card_use import Weights, until
from recorded_server import Reply, recorded
from sleeping_server import Vllm, vllm

from gpu_manager import GPUResourceManager, Sharing, SimulatedDevice
from residency.contracts import Memory
from residency.errors import NeighborUnreachable
from residency.sharing import asking as asking_module
from residency.sharing.asking import Asking

MB = 1 << 20


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(100 * MB)


def asking(device: SimulatedDevice, server: Vllm) -> Asking:
    return Asking((f"vllm={server.url}",), device, set)


def give_back(neighbors: Asking) -> None:
    thread = neighbors.give_back()
    assert thread is not None
    thread.join()


def test_nothing_is_due_before_a_neighbour_was_asked(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        assert (neighbors.give_back(), neighbors.owes, neighbors.owed_bytes()) == (None, False, 0)


def test_a_server_that_its_owner_put_to_sleep_is_not_woken_up(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        server.asleep = True
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        neighbors.close()
        assert server.calls == []


def test_what_neighbours_have_given_up_is_counted(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        assert neighbors.owed_bytes() == 80 * MB  # it does not say so: by the free memory
        give_back(neighbors)
        assert neighbors.owed_bytes() == 0


def test_what_a_neighbour_says_that_it_gives_up_is_counted(device: SimulatedDevice) -> None:
    replies: Any = {
        "GET /sdapi/v1/progress?skip_current_image=true": Reply({"state": {"job": "", "job_count": 0}}),
        "GET /sdapi/v1/memory": Reply({"cuda": {"reserved": {"current": 7 << 30}}}),
        "POST /sdapi/v1/unload-checkpoint": Reply({}),
    }
    with recorded(replies) as server:
        neighbors = Asking((f"sdwebui={server.url}",), device, set)
        neighbors.ask_one(server.url)
        assert neighbors.owed_bytes() == 7 << 30


def test_without_a_thread_it_is_tried_again_soon(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert neighbors.give_back() is None
        assert neighbors.owes
        assert neighbors.give_back() is not None
        assert server.woken.wait(60)


def test_a_give_back_that_fails_is_logged_once_and_repeated(
    device: SimulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        server.fails = True
        for _ in range(3):
            give_back(neighbors)
        assert len([record for record in caplog.records if "answered 500" in record.getMessage()]) == 1
        assert "answered 500" in (neighbors.status()[0]["answer"] or "")
        assert neighbors.owed_bytes() == 80 * MB
        server.fails = False
        assert neighbors.owes
        assert neighbors.give_back() is not None
        assert server.woken.wait(60)
        until(lambda: not neighbors.owes)


def test_a_server_that_has_ended_needs_nothing_back(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
    give_back(neighbors)
    assert not neighbors.owes


def test_a_server_that_refuses_is_said_to_refuse(device: SimulatedDevice, caplog: pytest.LogCaptureFixture) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        server.fails = True
        give_back(neighbors)
        assert f"vllm at {server.url} refused: POST /wake_up answered 500" in caplog.text


def test_one_thread_waits_for_a_server_that_does_not_answer(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server, ThreadPoolExecutor() as threads:
        neighbors = asking(device, server)
        server.may_sleep.clear()
        asks = threads.submit(neighbors.ask_one, server.url)
        assert server.is_asked.wait(60)
        thread = neighbors.give_back()
        assert neighbors.give_back() is thread
        assert neighbors.owes
        waiting = [each for each in threading.enumerate() if each.name == "gpu-neighbors"]
        server.may_sleep.set()
        asks.result()
        assert waiting == [thread]


def test_the_end_waits_for_a_neighbour_that_has_not_answered_yet(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_module, "CLOSED_WITHIN_S", 0.0)
    with vllm(device, 80 * MB) as server, ThreadPoolExecutor() as threads:
        manager = GPUResourceManager(device, sharing=Sharing(neighbors=(f"vllm={server.url}",)))
        server.may_sleep.clear()
        asks = threads.submit(manager.ask_neighbor, server.url)
        assert server.is_asked.wait(60)
        ends = threads.submit(manager.close, 60)
        until(lambda: manager.closed)
        server.may_sleep.set()
        ends.result()
        assert server.calls == ["/sleep", "/wake_up"]
        asks.result()


def test_a_neighbour_that_did_not_get_its_memory_back_is_named(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking_module, "CLOSED_WITHIN_S", 0.0)
    with vllm(device, 80 * MB) as server, ThreadPoolExecutor() as threads:
        neighbors = asking(device, server)
        server.may_sleep.clear()
        asks = threads.submit(neighbors.ask_one, server.url)
        assert server.is_asked.wait(60)
        neighbors.close()
        assert f"vllm at {server.url} has not got its memory back" in caplog.text
        server.may_sleep.set()
        asks.result()
        assert server.woken.wait(60)


def test_nothing_is_asked_after_the_end(device: SimulatedDevice) -> None:
    """A request that was on its way then would leave a server asleep."""
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.close()
        neighbors.ask_one(server.url)
        assert server.calls == []
    with pytest.raises(NeighborUnreachable):
        neighbors.ask_one(server.url)


def test_a_request_that_has_given_up_meanwhile_puts_no_neighbour_to_sleep(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        wanted, ended, answer = Event(), Event(), server.answer

        def gives_up(path: str) -> str:
            wanted.clear()
            return answer(path)

        wanted.set()
        server.answer = gives_up  # type: ignore[method-assign]
        neighbors = asking(device, server)
        neighbors.ask(60 * MB, wanted.is_set, ended.set)
        assert ended.wait(60)
        assert (server.calls, neighbors.owes) == ([], False)


def test_the_watch_learns_that_neighbours_were_asked(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors, owed, ended = asking(device, server), list[bool](), Event()

        def notes() -> None:
            owed.append(neighbors.owes)
            ended.set()

        neighbors.ask(60 * MB, lambda: True, notes)
        assert ended.wait(60)
        assert owed == [True]


def test_neighbours_are_not_woken_onto_memory_that_a_request_has_claimed_meanwhile(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_module, "FREED_WITHIN_S", 0.0)
    with vllm(device, 20 * MB) as first, vllm(device, 60 * MB) as second:
        wakes, may_wake, answer = Event(), Event(), first.answer

        def slow(path: str) -> str:
            if path == "/wake_up":
                wakes.set()
                may_wake.wait(60)
            return answer(path)

        first.answer = slow  # type: ignore[method-assign]
        sharing = Sharing(neighbors=(f"vllm={first.url}", f"vllm={second.url}"))
        with GPUResourceManager(device, keep_warm=0, sharing=sharing) as manager:
            manager.register("tts", lambda: Weights(90 * MB), size_bytes=90 * MB)
            with manager.lease("tts"):
                pass
            assert wakes.wait(60)
            with manager.lease("tts"):
                assert manager._share is not None
                gives_back = manager._share.asking._gives_back
                assert gives_back is not None
                may_wake.set()
                gives_back.join()
                assert second.asleep
            assert second.woken.wait(60)


def test_the_end_wakes_neighbours_whoever_needs_memory(device: SimulatedDevice) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        thread = neighbors.give_back(lambda: False)
        assert thread is not None
        thread.join()
        assert server.asleep
        neighbors.close()
        assert not server.asleep


def test_the_end_tries_again_while_time_is_left(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "REPEAT_AFTER_S", 0.0)
    with vllm(device, 80 * MB) as server:
        neighbors, answer = asking(device, server), server.answer
        neighbors.ask_one(server.url)
        tries = itertools.count()

        def recovers(path: str) -> str:
            server.fails = next(tries) < 4
            return answer(path)

        server.answer = recovers  # type: ignore[method-assign]
        neighbors.close(60)
        assert not neighbors.owes


def test_the_end_without_a_limit_comes(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "CLOSED_AT_MOST_S", 0.0)
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        server.fails = True
        neighbors.close(math.inf)
        assert server.asleep


def test_a_forked_child_leaves_neighbours_to_its_parent(
    device: SimulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors = asking(device, server)
        neighbors.ask_one(server.url)
        parent, neighbors._owner_pid = neighbors._owner_pid, -1
        with neighbors._lock:  # held by a thread that the child does not have
            neighbors.close()
        assert "has not got its memory back" not in caplog.text
        neighbors._owner_pid = parent
        neighbors.close()
        assert not server.asleep


def test_memory_that_a_driver_reports_late_is_counted(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    with vllm(device, 80 * MB) as server:
        neighbors, memory, looks = asking(device, server), device.memory, itertools.count()

        def late() -> Memory:
            found = memory()
            return replace(found, free_bytes=20 * MB) if not server.asleep or next(looks) < 3 else found

        monkeypatch.setattr(device, "memory", late)
        neighbors.ask_one(server.url)
        assert neighbors.owed_bytes() == 80 * MB
        neighbors.close()


def test_memory_that_another_neighbour_gives_up_meanwhile_is_not_counted(device: SimulatedDevice) -> None:
    with vllm(device, 30 * MB) as first, vllm(device, 50 * MB) as second, ThreadPoolExecutor() as threads:
        neighbors = Asking((f"vllm={first.url}", f"vllm={second.url}"), device, set)
        looked, answer = Event(), second.answer

        def notes(path: str) -> str:
            looked.set()
            return answer(path)

        second.answer = notes  # type: ignore[method-assign]
        first.may_sleep.clear()
        asks = [threads.submit(neighbors.ask_one, first.url)]
        assert first.is_asked.wait(60)
        asks.append(threads.submit(neighbors.ask_one, second.url))
        assert looked.wait(60)
        until(lambda: neighbors.status()[1]["in_use"] is False)
        first.may_sleep.set()
        for each in asks:
            each.result()
        assert neighbors._owed[second.url] == 50 * MB
        neighbors.close()
