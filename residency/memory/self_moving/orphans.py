"""Ends worker processes when this process is killed: those of vLLM would run on, and keep their GPU memory.

A watcher process, started from this file, waits for the end of this process and of the workers. Linux only; elsewhere
without effect. It imports the standard library only, and needs some 10 MB.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

MARK = "RESIDENCY_FORK_SERVER"
"""Environment variable of workers of a manager, and of what they start: found by it, and ended, without a watcher."""


def end_with_this_process(workers: Sequence[psutil.Process]) -> None:
    """Starts a watcher for these workers; it ends with them. Pid 1 of a container needs none, nor a worker process."""
    if not workers or not hasattr(os, "pidfd_open") or os.getpid() == 1 or MARK in os.environ:
        return
    pids = [str(process.pid) for process in workers]
    try:
        # Returns at once: the watcher is no child of this process.
        subprocess.run(
            [sys.executable, "-IS", __file__, str(os.getpid()), *pids],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("If this process is killed, the processes %s must be ended by hand: %s", ", ".join(pids), error)


def _main(owner: int, *pids: int) -> None:
    if os.getppid() != owner:
        return  # the owner has ended already
    owner_fd, workers = os.pidfd_open(owner), []
    for pid in pids:
        with suppress(OSError):  # has ended
            workers.append(os.pidfd_open(pid))
    if os.fork():
        return
    os.chdir("/")
    _wait(owner_fd, workers)


def _wait(owner_fd: int, workers: list[int]) -> None:
    """Returns when all workers have ended; if the owner has, kills them."""
    poller = select.poll()
    for fd in (owner_fd, *workers):
        poller.register(fd, select.POLLIN)
    while workers:
        ended = {fd for fd, _ in poller.poll()}
        for fd in workers if owner_fd in ended else ():
            with suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        if owner_fd in ended:
            return
        for fd in ended:
            poller.unregister(fd)
            workers.remove(fd)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
