"""One fork server for the managers of a test run: its start takes two seconds, that of a worker milliseconds."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, ClassVar

from residency.workers.spawner import Child, Spawner


class SharedSpawner(Spawner):
    """Workers of one manager, from the fork server of the process; they end with the manager."""

    _of_process: ClassVar[dict[int, Spawner]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[Child] = []

    def start(self) -> Any:
        if self._closed:
            return super().start()  # raises
        return self._of_process.setdefault(os.getpid(), Spawner()).start()

    def spawn(self, connection: socket.socket, on_end: Callable[[], object]) -> Child:
        child = super().spawn(connection, on_end)
        self._workers.append(child)
        return child

    def close(self) -> None:
        if os.getpid() != self._owner_pid:
            return
        self._closed = True
        for child in self._workers:
            child.kill()
        for child in self._workers:
            child.has_ended.wait(60)

    @classmethod
    def end(cls) -> None:
        if own := cls._of_process.pop(os.getpid(), None):
            own.close()
