"""The process that makes the driver's checkpoint calls: keeps the driver initialised, and has no CUDA context.

Started by `checkpoints` as ``python -m residency.workers.checkpoint_helper PARENT_PID SOCKET``. Reads a call from the
socket as a line of JSON (``call``, ``pid``, and ``timeout_ms`` for ``lock``), and answers with a line: ``result`` or
``error``. Its first line, without a call, tells whether the driver could be initialised. Ends with its parent, also
during a call.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from typing_extensions import NotRequired, TypedDict


class Request(TypedDict):
    """A call: a method of ``cuda.core.checkpoint.Process``, or ``state``."""

    call: str
    pid: int
    timeout_ms: NotRequired[int]


class Answer(TypedDict, total=False):
    """``result`` of a call, or ``error``: the text of its exception."""

    result: object
    error: str


def main() -> None:
    parent, number = map(int, sys.argv[1:])
    connection = socket.socket(fileno=number)
    threading.Thread(target=_end_with, args=(parent, connection), daemon=True).start()
    with connection.makefile("rw", encoding="utf-8") as lines:
        _answer(lines, _initialise)
        for line in lines:
            _answer(lines, partial(_call, **json.loads(line)))


def _end_with(parent: int, connection: socket.socket) -> None:
    """Ends this process when the parent has closed its end or has died; forks of it may hold its end open."""
    poll = select.poll()
    poll.register(connection, 0)  # closed is always reported
    with suppress(OSError):  # not permitted in some containers
        poll.register(os.pidfd_open(parent), select.POLLIN)
    if os.getppid() == parent:
        poll.poll()
    os._exit(0)


def _answer(lines: Any, work: Callable[[], object]) -> None:
    answer: Answer
    try:
        answer = {"result": work()}
    except Exception as error:
        answer = {"error": str(error) or type(error).__name__}
    lines.write(json.dumps(answer) + "\n")
    lines.flush()


def _initialise() -> None:
    importlib.import_module("cuda.core.checkpoint")
    from cuda.bindings import driver

    (result,) = driver.cuInit(0)  # a restore needs an initialised driver, or persistence mode
    if result:
        raise RuntimeError(f"cuInit: {getattr(result, 'name', result)}")


def _call(call: str, pid: int, **arguments: int) -> object:
    from cuda.core.checkpoint import Process

    process = Process(pid)
    return process.state if call == "state" else getattr(process, call)(**arguments)


if __name__ == "__main__":
    main()
