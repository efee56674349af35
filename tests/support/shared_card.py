"""Other programs on a simulated card with a name, as real processes that do what they are told, line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20

_SERVICE = """
import json, sys
from gpu_manager import GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice

options = json.loads(sys.argv[1])
card = SimulatedDevice(options["capacity"], shared=options["card"])
card.identity = options["identity"] or card.identity

class Engine:
    def __init__(self):
        import torch
        self.weights = torch.arange(options["bytes"], dtype=torch.uint8)

manager = GPUResourceManager(card, keep_warm=options["keep_warm"], sharing=Sharing(**options["sharing"]))
manager.register("tts", Engine, size_bytes=options["bytes"])
held = []
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "take":
        lease = manager.lease("tts", *map(float, arguments))
        try:
            engine = lease.__enter__()
            held.append(lease)
            answer = int(engine.weights[-1])
        except RequestTimeout as error:
            answer = error.en
    elif command == "end":
        held.pop().__exit__(None, None, None)
        answer = True
    elif command == "grow":
        try:
            card.charge(int(arguments[0]))
            answer = True
        except MemoryError:
            answer = False
    elif command == "shrink":
        card.refund(int(arguments[0]))
        answer = True
    elif command == "offload":
        manager.offload()
        answer = True
    elif command == "status":
        answer = manager.status()
    print(json.dumps(answer), flush=True)
manager.close()
"""


class OnCard:
    """A process; each method sends one command, and returns its answer unless ``wait`` is False: then `answer` does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = int(self.answer())

    def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def do(self, *words: object) -> Any:
        self.send(*words)
        return self.answer()

    def state(self) -> str:
        return str(self.do("status")["models"]["tts"]["state"])


CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Runs a program with pids of its own, as in a container."""


@contextmanager
def service(
    card: str | None,
    capacity: int,
    nbytes: int = 40 * MB,
    keep_warm: float = 600,
    identity: str | None = None,
    contained: bool = False,
    **sharing: object,
) -> Iterator[OnCard]:
    """Starts a program of this project on the card ``card``, with one model of ``nbytes``.

    ``identity``: of the card, if another one than a simulated card has. ``contained``: in a container, where it cannot
    use a card with a name.
    """
    options = {"card": card, "capacity": capacity, "bytes": nbytes, "keep_warm": keep_warm, "sharing": sharing,
               "identity": identity}  # fmt: skip
    program = [*(CONTAINER if contained else ()), sys.executable, "-c", _SERVICE, json.dumps(options)]
    # Started by a shell that ends: it is no child of the test, whose own children are not others on the card.
    process = subprocess.Popen(
        ["sh", "-c", 'exec 3<&0; "$@" <&3 3<&- & echo $!', "sh", *program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    one = OnCard(process)
    try:
        yield one
    finally:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        process.communicate()
