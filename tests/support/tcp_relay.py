"""The network between a browser and the app, which a test can interrupt."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Network:
    """Forwards connections to a port of this machine, until the block ends."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._cut = False
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._door.close()
        self.cut()

    def cut(self) -> None:
        """Breaks all connections and accepts no more."""
        with self._lock:
            self._cut = True
            ends, self._ends = self._ends, []
        for end in ends:
            _hang_up(end)

    def mend(self) -> None:
        with self._lock:
            self._cut = False

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                inner = self._door.accept()[0]
                with self._lock:
                    if self._cut:
                        inner.close()
                        continue
                    outer = socket.create_connection(("127.0.0.1", self._to))
                    self._ends += [inner, outer]
                for way in ((inner, outer), (outer, inner)):
                    threading.Thread(target=_pass_on, args=way, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    _hang_up(source)
    _hang_up(target)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
