from __future__ import annotations

import errno
import json
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from residency.web.server import connections as module
from residency.web.server.connections import (
    WITHIN_S,
    Awaited,
    Connection,
    Connections,
    Listener,
    affordable,
    listeners,
)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def until_done() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def a_socket(until_done: ExitStack) -> socket.socket:
    ours, theirs = socket.socketpair()
    until_done.callback(theirs.close)
    return until_done.enter_context(ours)


def is_ended(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False


def admitted(some: Connections, until_done: ExitStack) -> Connection:
    one = a_socket(until_done)
    assert some.admit(one)
    connection = some.of(one.fileno())
    assert connection
    return connection


def test_for_one_too_many_the_one_that_has_waited_longest_goes(clock: Clock, until_done: ExitStack) -> None:
    some = Connections(3, clock)
    served, first, second = (admitted(some, until_done) for _ in range(3))
    served.look = lambda: None
    clock.now_s = 1
    second.look = lambda: Awaited.BODY
    second.note()
    admitted(some, until_done)
    assert [is_ended(each.socket) for each in (served, first, second)] == [False, True, False]
    assert len(some) == 3


def test_where_all_are_served_a_further_one_is_refused(clock: Clock, until_done: ExitStack) -> None:
    some = Connections(2, clock)
    both = [admitted(some, until_done) for _ in range(2)]
    for each in both:
        each.look = lambda: None
    assert not some.admit(a_socket(until_done))
    both[0].socket.close()
    assert some.admit(a_socket(until_done))


@pytest.mark.parametrize("awaited", Awaited)
def test_who_is_waited_for_too_long_is_ended(clock: Clock, until_done: ExitStack, awaited: Awaited) -> None:
    some = Connections(9, clock)
    one = admitted(some, until_done)
    one.look = lambda: awaited
    one.note()
    clock.now_s = WITHIN_S[awaited]
    some.end_overdue()
    assert not is_ended(one.socket)
    clock.now_s += 1
    some.end_overdue()
    assert is_ended(one.socket)


def test_who_is_served_may_take_as_long_as_it_takes(clock: Clock, until_done: ExitStack) -> None:
    some = Connections(9, clock)
    one = admitted(some, until_done)
    one.look = lambda: None
    clock.now_s = 1e6
    some.end_overdue()
    assert not is_ended(one.socket)


@pytest.mark.parametrize(("bytes_per_s", "ends"), [(1, True), (499, True), (501, False), (1e6, False)])
def test_a_body_may_be_slow_and_may_not_trickle(
    clock: Clock, until_done: ExitStack, bytes_per_s: int, ends: bool
) -> None:
    some = Connections(9, clock)
    one = admitted(some, until_done)
    one.look = lambda: Awaited.BODY
    for second in range(16_000):  # near to the end of which the fastest of those that trickle is found out
        clock.now_s = second
        one.note(int(bytes_per_s))
        some.end_overdue()
    assert is_ended(one.socket) is ends


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell what was read")
def test_an_answer_may_be_read_slowly_and_may_not_be_left(clock: Clock, until_done: ExitStack) -> None:
    listener = until_done.enter_context(socket.create_server(("127.0.0.1", 0)))
    peer = until_done.enter_context(socket.create_connection(listener.getsockname()))
    accepted = until_done.enter_context(listener.accept()[0])
    accepted.setblocking(False)
    with suppress(BlockingIOError):
        while True:  # until the buffers of both sides are full
            accepted.send(bytes(1 << 20))
    some = Connections(9, clock)
    assert some.admit(accepted)
    one = some.of(accepted.fileno())
    assert one is not None
    one.look, kept = lambda: Awaited.READING, [1 << 24]
    one.buffered_bytes = lambda: kept[0]
    one.note()
    for _ in range(5):  # what the peer reads is replaced from the server's own buffer
        kept[0] -= 20_000
        clock.now_s += WITHIN_S[Awaited.READING] + 1
        some.end_overdue()
        assert not is_ended(accepted)
    kept[0] -= 10_000
    clock.now_s += WITHIN_S[Awaited.READING] + 1
    some.end_overdue()
    assert is_ended(accepted)
    assert peer.recv(1)


def test_who_goes_on_after_an_answer_has_all_the_time_again(clock: Clock, until_done: ExitStack) -> None:
    some = Connections(9, clock)
    one = admitted(some, until_done)
    for _ in range(10):
        clock.now_s += WITHIN_S[Awaited.HEADERS]
        one.note(anew=True)
        some.end_overdue()
    assert not is_ended(one.socket)


class TestListener:
    @pytest.fixture
    def some(self, clock: Clock) -> Connections:
        return Connections(2, clock)

    @pytest.fixture
    def door(self, some: Connections, until_done: ExitStack) -> Listener:
        (door,) = listeners("127.0.0.1", 0, some)
        until_done.enter_context(door).listen()
        door.setblocking(False)
        return door

    def come(self, door: Listener, until_done: ExitStack) -> socket.socket:
        return until_done.enter_context(socket.create_connection(door.getsockname(), timeout=30))

    def test_who_is_refused_reads_why(self, door: Listener, some: Connections, until_done: ExitStack) -> None:
        for _ in range(2):
            self.come(door, until_done)
            one = until_done.enter_context(door.accept()[0])
            connection = some.of(one.fileno())
            assert connection
            connection.look = lambda: None
        late = self.come(door, until_done)
        late.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        with pytest.raises(BlockingIOError):
            door.accept()
        answer = b"".join(iter(lambda: late.recv(1000), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 503 ")
        assert {"content-type: application/json", "retry-after: 60"} <= set(head.lower().split("\r\n"))
        said = json.loads(body)["error"]
        assert (said["type"], said["param"], said["code"]) == ("server_error", None, "too_many_connections")
        assert "try again" in said["message"]
        assert " / " in said["message"]
        assert "重试" in said["message"]

    def test_without_a_descriptor_connections_are_refused_and_not_left_waiting(
        self, door: Listener, until_done: ExitStack, caplog: pytest.LogCaptureFixture
    ) -> None:
        late = [self.come(door, until_done) for _ in range(20)]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(door.fileno(), late[-1].fileno()) + 1, limit[1]))
        until_done.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        with ExitStack() as full:
            with suppress(OSError):
                while True:
                    full.enter_context(socket.socket())
            for each in late:
                with pytest.raises(BlockingIOError):
                    door.accept()
                assert each.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert len(caplog.records) == 1
        assert "LimitNOFILE" in caplog.text

    def test_event_loops_see_that_it_is_tcp_and_send_without_delay(self, door: Listener, until_done: ExitStack) -> None:
        self.come(door, until_done)
        assert until_done.enter_context(door.accept()[0]).proto == socket.IPPROTO_TCP

    def test_other_failures_are_the_loops(self, door: Listener) -> None:
        door.close()
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            door.accept()


def test_all_addresses_of_a_host_are_listened_on_or_none(until_done: ExitStack) -> None:
    taken = until_done.enter_context(socket.create_server(("127.0.0.1", 0)))
    with pytest.raises(OSError, match="in use"):
        listeners("127.0.0.1", taken.getsockname()[1], Connections())
    for listener in listeners("", 0, Connections()):
        until_done.enter_context(listener)


@pytest.mark.parametrize(("limit", "least", "most"), [(1 << 16, 1000, 1000), (1024, 800, 900)])
def test_files_find_descriptors_beside_the_connections(
    limit: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(module.os, "listdir", lambda path: [""] * 50)
    assert least <= affordable() <= most
