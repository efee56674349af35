"""Limits the number of a server's connections, and how long each may wait for its peer.

Independent of asyncio; `server` reports which connections wait. Everything except `raise_descriptor_limit`
must be called in the thread of the server's loop.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import resource
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from enum import Enum

from .cross_origin import refusal_body

logger = logging.getLogger(__name__)

MOST = 1000
"""Maximum of open connections, if there are enough descriptors."""
_SOFT_LIMIT = 4096
"""Descriptors for `MOST` connections with a file each. No higher, since child processes that close every possible
descriptor are slow, and ``select()`` fails for descriptors above 1024."""
_RESERVE = 128
"""Descriptors reserved for files, models and libraries; at most a third of the free ones."""
_KERNEL_BACKLOG = 256
"""Connections that the kernel queues until they are accepted; a longer queue means longer waits."""
_WARN_EVERY_S = 60.0
_SHARE_ENDED, _BUSY_FOR_S = 50, 0.01
_SPENT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_BUSY = json.dumps(
    refusal_body(
        "The server has too many connections: try again in a minute. / 服务器连接数已满：请一分钟后重试。",
        "server_error", code="too_many_connections",
    ),
    ensure_ascii=False,
).encode()  # fmt: skip
"""In the shape of the speech API's errors, for all paths: a connection is refused before its request is read."""
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 60\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_BUSY), _BUSY)
)


class Awaited(Enum):
    """The action of the peer that a connection waits for."""

    HEADERS = "all headers of a request"
    BODY = "more of a body"
    READING = "to read what was sent"


WITHIN_S = {Awaited.HEADERS: 20.0, Awaited.BODY: 30.0, Awaited.READING: 30.0}
"""Timeouts. Partial headers do not extend the time."""
SLOWEST_BYTES_PER_S = 500
"""Minimum rate of a body, and of reading; faster ones have no time limit."""


class Connection:
    """An accepted socket, until it is closed. ``look`` returns what it waits for; None while it is served."""

    def __init__(self, accepted: socket.socket, now: Callable[[], float]) -> None:
        self.socket, self._now, self.since_s = accepted, now, now()
        self.awaited: Awaited | None = Awaited.HEADERS
        self.look: Callable[[], Awaited | None] = lambda: self.awaited
        #: Returns the bytes of the answer that have not been given to the system.
        self.buffered_bytes: Callable[[], int] = lambda: 0
        self._unread_bytes: int | None = None

    @property
    def is_open(self) -> bool:
        return self.socket.fileno() >= 0

    def note(self, received_bytes: int = 0, *, anew: bool = False) -> None:
        """Updates what is awaited. A change, or ``anew``, restarts the timeout; received bytes of a body extend it."""
        awaited, now_s = self.look(), self._now()
        if anew or awaited is not self.awaited:
            self.awaited, self.since_s = awaited, now_s
            self._unread_bytes = self._count_unread() if awaited is Awaited.READING else None
        elif awaited is Awaited.BODY:
            self.since_s = min(now_s, self.since_s + received_bytes / SLOWEST_BYTES_PER_S)

    def is_overdue(self) -> bool:
        if self.awaited is None or self._now() - self.since_s <= WITHIN_S[self.awaited]:
            return False
        return self.awaited is not Awaited.READING or not self._reads()

    def _reads(self) -> bool:
        """Returns whether the peer has read at least at the minimum rate; if so, restarts the timeout."""
        before, now_s = self._unread_bytes, self._now()
        self._unread_bytes = unread = self._count_unread()
        if before is None or unread is None or before - unread < SLOWEST_BYTES_PER_S * (now_s - self.since_s):
            return False
        self.since_s = now_s
        return True

    def _count_unread(self) -> int | None:
        """Returns the bytes sent that the peer's system has not taken; None where the system does not tell (Linux)."""
        with suppress(OSError):
            unsent = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4))
            return int.from_bytes(unsent, sys.byteorder) + self.buffered_bytes()
        return None

    def end(self) -> None:
        """Shuts the socket down; its reader and writer then get its end and close it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Connections:
    """The open connections, at most ``most``. To admit more, ends those that have waited longest for their peers."""

    def __init__(self, most: int = MOST, now: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._now = now
        self._by_descriptor: dict[int, Connection] = {}
        self._busy_until_s = -math.inf
        self._refused, self._warned_s = 0, -math.inf

    def __len__(self) -> int:
        self._by_descriptor = {fd: each for fd, each in self._by_descriptor.items() if each.is_open}
        return len(self._by_descriptor)

    def of(self, descriptor: int) -> Connection | None:
        """Returns the connection of a descriptor; None if it was ended."""
        return self._by_descriptor.get(descriptor)

    def admit(self, accepted: socket.socket) -> bool:
        """Adds a connection; returns False if the limit is reached and no other connection can be ended."""
        if len(self._by_descriptor) >= self.most and len(self) >= self.most and not self._make_room():
            return False
        self._by_descriptor[accepted.fileno()] = Connection(accepted, self._now)
        return True

    def _make_room(self) -> bool:
        """Ends several waiting connections at once; after a failure, not retried for `_BUSY_FOR_S` (a full scan)."""
        if self._now() < self._busy_until_s:
            return False
        waiting = sorted((each for each in self._noted() if each.awaited), key=lambda each: each.since_s)
        for longest in waiting[: max(1, self.most // _SHARE_ENDED)]:
            del self._by_descriptor[longest.socket.fileno()]
            longest.end()
        if not waiting:
            self._busy_until_s = self._now() + _BUSY_FOR_S
        return bool(waiting)

    def end_overdue(self) -> None:
        """Ends connections that exceed their timeout; to be called about every second."""
        for each in self._noted():
            if each.is_overdue():
                each.end()

    def _noted(self) -> Iterable[Connection]:
        for each in list(self._by_descriptor.values()):
            if each.is_open:
                each.note()
                yield each

    def refuse(self, accepted: socket.socket, plain: bool) -> None:
        """Closes a connection, after a 503 response unless it is encrypted (not ``plain``). Logs the count at times."""
        with accepted, suppress(OSError):
            accepted.setblocking(False)
            if plain:
                with suppress(BlockingIOError):
                    accepted.recv(1 << 16)  # unread data would make the peer lose the response
                accepted.send(_REFUSAL)
        self._refused += 1
        if (now_s := self._now()) - self._warned_s >= _WARN_EVERY_S:
            logger.warning(
                "Connections were refused (%d), since %d are busy or no descriptors are left: raise LimitNOFILE or "
                "ulimit -n, or limit connections in the proxy before the app. / "
                "已拒绝 %d 个连接：请调高 LimitNOFILE 或 ulimit -n，或在前置代理中限制连接数。",
                self._refused, len(self._by_descriptor), self._refused,
            )  # fmt: skip
            self._refused, self._warned_s = 0, now_s


class Listener(socket.socket):
    """A listening socket that returns only connections which `Connections` admits.

    Reserves a spare descriptor: with none left, a connection could not be accepted for its refusal.
    """

    def __init__(self, bound: socket.socket, connections: Connections, plain: bool = True) -> None:
        # An explicit protocol, since asyncio sets TCP_NODELAY only with it.
        super().__init__(bound.family, bound.type, socket.IPPROTO_TCP, bound.detach())
        self._connections, self._plain = connections, plain
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)

    def listen(self, backlog: int = _KERNEL_BACKLOG, /) -> None:
        """Listens with at least `_KERNEL_BACKLOG`; event loops use ``backlog`` as their accept batch."""
        super().listen(max(backlog, _KERNEL_BACKLOG))

    def accept(self) -> tuple[socket.socket, object]:
        """Accepts a connection; raises BlockingIOError if there is none, or it was refused."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY)
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in _SPENT or self._spare is None:
                raise
            self._connections.refuse(self._accept_with_spare(), self._plain)
            raise BlockingIOError from None
        if not self._connections.admit(accepted):
            self._connections.refuse(accepted, self._plain)
            raise BlockingIOError
        return accepted, address

    def _accept_with_spare(self) -> socket.socket:
        assert self._spare is not None
        os.close(self._spare)
        self._spare = None
        return super().accept()[0]

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()


def listeners(host: str, port: int, connections: Connections, plain: bool = True) -> list[Listener]:
    """Returns a bound socket for each address of the host. Raises OSError if one cannot be bound."""
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as if_one_fails:
        found = []
        for family, _, _, _, address in dict.fromkeys(addresses):
            bound = socket.create_server(address, family=family)
            found.append(if_one_fails.enter_context(Listener(bound, connections, plain)))
        if_one_fails.pop_all()
    return found


def raise_descriptor_limit() -> None:
    """Raises the soft limit of descriptors to `_SOFT_LIMIT`, or the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _SOFT_LIMIT if hard == resource.RLIM_INFINITY else min(_SOFT_LIMIT, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def affordable() -> int:
    """Returns the number of connections for which descriptors are free, less a reserve; at most `MOST`."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST
    left = limit - len(os.listdir("/dev/fd"))
    return max(1, min(MOST, left - min(_RESERVE, left // 3)))
