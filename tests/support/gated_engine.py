"""An engine for ``app.py`` in another process. It stops where a test has put a gate, in a call that nothing interrupts.

A gate is a named pipe: who reads from it waits in the kernel until the test opens it for writing.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import soundfile
import torch

from residency.cancellation import checkpoint
from residency.errors import InvalidInput
from residency.progress import current

FOLDER = Path()
"""Where the gates are. In the app set by `serving`, before anything here is used."""


def close_gate(folder: Path, name: str) -> None:
    """For the test: from now on the engine stops there."""
    os.mkfifo(folder / name)


def open_gate(folder: Path, name: str) -> None:
    """For the test: let the engine go on that has arrived there."""
    gate = os.open(folder / name, os.O_WRONLY)
    (folder / name).unlink()  # before anybody goes on: the next to come must not stop here again
    os.close(gate)


class BuiltinEngine:
    def __init__(self, device: str = "cpu") -> None:
        atexit.register(print, "the interpreter ends", flush=True)
        if (FOLDER / "broken").exists():
            raise InvalidInput("No weights: give a folder", "没有权重：请指定目录")
        progress = current()
        progress.enter("reading", 4 << 30)
        progress.advance(1 << 30)
        _pass("load")
        if (FOLDER / "broken").exists():
            raise RuntimeError("broken")
        self.weights = torch.ones(1 << 18)

    def clone(self, *arguments: Any) -> tuple[torch.Tensor, int]:
        _pass("speak")
        checkpoint()
        print("spoken:", *arguments[1:3], *arguments[:1], flush=True)
        return torch.full((1, 24000), 0.25), 24000

    def edit(self, *arguments: Any) -> tuple[torch.Tensor, int]:
        _pass("edit")
        return self.clone()


DEFAULT_MODEL = "gated"


class Recognizer:
    """Hears how long a recording is."""

    def __init__(self) -> None:
        self.weights = torch.ones(1 << 16)

    @classmethod
    def load(cls, model: str, device: str) -> Recognizer:
        return cls()

    def __call__(self, path: str) -> str:
        _pass("hear")
        frames = soundfile.info(path).frames
        if frames < 100:
            raise InvalidInput("too short", "太短")
        print(f"heard: {frames}", flush=True)
        return f"{frames} samples"


def supported_edit_types() -> dict[str, list[str]]:
    return {"clone": [], "vad": []}


def _pass(name: str) -> None:
    if (FOLDER / "native").exists():
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # a signal may come before the first time has got there
            with suppress(KeyboardInterrupt):
                print("in native code", flush=True)
                for _ in range(2):  # the second time for ever; no signal ends it
                    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    gate = FOLDER / name
    if gate.exists():
        print(f"at the gate: {name}", flush=True)
        with suppress(FileNotFoundError), open(gate) as pipe:  # or opened this very moment
            pipe.read()
