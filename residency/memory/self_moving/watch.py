"""Notices when a worker process ends, while calls may wait for its answer. Linux only; elsewhere without effect."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import psutil

logger = logging.getLogger(__name__)


class Watch:
    """Calls ``ended`` with a thing, once, in a thread, when one of its worker processes ends before `stop`.

    Does not keep the thing alive, and does not collect exit codes.
    """

    def __init__(self, thing: Any, processes: Sequence[psutil.Process], ended: Callable[[Any], object]) -> None:
        self._stop_fd: int | None = None
        fds: list[int] = []
        try:
            reference = weakref.ref(thing)
            for process in processes:
                fds.append(os.pidfd_open(process.pid))
            stopped_fd, self._stop_fd = os.pipe()
        except (AttributeError, OSError, TypeError) as error:
            logger.debug("Worker processes are not watched: %s", error)
            for fd in fds:
                os.close(fd)
            return
        threading.Thread(
            target=_wait, args=(reference, fds, stopped_fd, ended), name="gpu-worker-watch", daemon=True
        ).start()

    def stop(self) -> None:
        fd, self._stop_fd = self._stop_fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.write(fd, b"x")  # closing alone does not suffice: forked processes may have the other copies
            os.close(fd)


def _wait(reference: weakref.ref[Any], fds: list[int], stopped_fd: int, ended: Callable[[Any], object]) -> None:
    try:
        poller = select.poll()
        for fd in (*fds, stopped_fd):
            poller.register(fd, select.POLLIN)
        fired = {fd for fd, _ in poller.poll()}
        thing = None if stopped_fd in fired else reference()
        if thing is not None:
            ended(thing)
    except Exception:
        logger.warning("Calls that wait for an ended worker process could not be ended", exc_info=True)
    finally:
        for fd in (*fds, stopped_fd):
            os.close(fd)
