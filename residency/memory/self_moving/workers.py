"""Finds and ends the worker processes of an object."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import subprocess
import time
from collections import deque
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from ..object_graph import VALUES, ObjectKind, children, kind_of

logger = logging.getLogger(__name__)

_MOST_OBJECTS = 100_000
"""Limit of the search: an object that refers to more is taken as one without worker processes."""

ENDS_WITHIN_S = 5.0
"""Time for worker processes to end after each signal."""


def workers_of(thing: Any) -> list[psutil.Process]:
    """Returns the child processes to which an object refers, and their descendants."""
    found: dict[int, psutil.Process] = {}
    for handle in _handles(thing):
        pid = handle.pid
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.ppid() == os.getpid():
                found.update((each.pid, each) for each in [process, *process.children(recursive=True)])
    return list(found.values())


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def pid_is_alive(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.Error:
        return False


def end(processes: list[psutil.Process]) -> None:
    """Ends processes that are still alive: SIGTERM, then SIGKILL; leaves no zombies. Never raises."""
    alive = [process for process in processes if is_alive(process)]
    for signal in (psutil.Process.terminate, psutil.Process.kill):
        if not alive:
            break
        for process in alive:
            with contextlib.suppress(psutil.Error):
                signal(process)
        _wait(alive)
        alive = [process for process in alive if is_alive(process)]
    if alive:
        logger.error("Worker processes do not end: %s", [process.pid for process in alive])
    _wait([process for process in processes if process not in alive], 0)


def _wait(processes: list[psutil.Process], timeout_s: float = ENDS_WITHIN_S) -> None:
    """Waits for processes to end and collects their exit codes."""
    # Children of multiprocessing through its own objects: it takes one that others waited for as still alive.
    own = {child.pid: child for child in multiprocessing.active_children()}
    until_s = time.monotonic() + timeout_s
    for process in processes:
        if child := own.get(process.pid):
            child.join(max(0.0, until_s - time.monotonic()))
    rest = [process for process in processes if process.pid not in own]
    psutil.wait_procs(rest, max(0.0, until_s - time.monotonic()))


def _handles(thing: Any) -> list[Any]:
    """Returns the process objects reachable from a thing; does not leave it through modules, classes or globals."""
    found: list[Any] = []
    seen: dict[int, Any] = {}
    todo = deque([thing])
    while todo and len(seen) < _MOST_OBJECTS:
        each = todo.popleft()
        if id(each) in seen:
            continue
        seen[id(each)] = each  # kept alive, so that its id is not reused
        if isinstance(each, (BaseProcess, subprocess.Popen, psutil.Process)):
            found.append(each)
        elif each is thing or kind_of(type(each)) in (ObjectKind.OPEN, ObjectKind.BY_NAME):
            with contextlib.suppress(Exception):  # an object that cannot be inspected
                todo.extend(child for _, _, child in children(each) if type(child) not in VALUES)
    return found
