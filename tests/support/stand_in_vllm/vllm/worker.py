"""Worker process of the stand-in: reads ``NAME FAULT VALUES`` lines, answers ``ok TOKENS`` or ``error``."""

from __future__ import annotations

import hashlib
import os
import sys

weights = bytearray()
cache = bytearray()


def written(nbytes: int) -> bytearray:
    """Returns memory of which every page is in use."""
    memory = bytearray(nbytes)
    memory[::4096] = b"w" * len(memory[::4096])
    return memory


def tokens(prompt: list[int]) -> list[int]:
    assert len(cache)  # asleep
    digest = hashlib.sha256(weights[::4096] + repr(prompt).encode()).digest() * 4
    return [65536 + byte for byte in digest[: 16 + digest[0] % 64]]


for line in sys.stdin:
    name, fault, *values = line.split()
    if fault == "die":
        os.kill(os.getpid(), 9)
    if fault in ("error", "full"):
        print("error", flush=True)
        continue
    answer: list[int] = []
    if name == "load":
        weights, cache = written(int(values[0])), written(int(values[1]))
    elif name == "sleep":
        cache = bytearray()
        if values[0] == "2":
            weights = bytearray()
    elif name == "wake_up":
        cache = written(48 << 20)
    elif name == "generate":
        answer = tokens([int(value) for value in values])
    print("ok", *answer, flush=True)
