"""Programs on one simulated card: a service with a model, and a stranger that takes and gives memory.

Started by `benchmarks.sharing` with a role and options as JSON; they obey lines of their input, and print JSON lines.
Times are those of ``time.monotonic``, which all processes share.
"""

from __future__ import annotations

import json
import logging
import random
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_manager import DeviceOutOfMemory, GPUResourceManager, RequestTimeout, Sharing, SimulatedDevice
from residency.memory.snapshot import SnapshotFolder

GB = 1 << 30
STEP_BYTES, RETRY_S, HOLD_S, GIVE_UP_S = 2 * GB, 0.02, 0.5, 10.0
"""Of the stranger."""

_PARTS = 4
"""A model is restored in so many allocations, as a real one is in many."""


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class Weights:
    """The engine and its resident: bytes that are on the books of the card only. Moves take the times of ``options``.

    ``held_s``: seconds in which the card held them, until their last departure.
    """

    def __init__(self, card: SimulatedDevice, options: dict[str, Any]) -> None:
        self.nbytes = options["model_bytes"]
        self._card, self._options = card, options
        self._there_since_s: float | None = None
        self.held_s, self.put_back = 0.0, 0

    @property
    def device_bytes(self) -> int:
        return 0 if self._there_since_s is None else self.nbytes

    @property
    def host_bytes(self) -> int:
        return self.nbytes - self.device_bytes

    def restore(self) -> int:
        began_s, done = time.monotonic(), 0
        try:
            for _ in range(_PARTS):
                self._card.charge(self.nbytes // _PARTS)
                done += 1
                time.sleep(self._options["restore_s"] / _PARTS)
        except MemoryError:
            self._card.refund(done * (self.nbytes // _PARTS))
            self.put_back += 1
            raise
        self._there_since_s = began_s
        return int(self.nbytes)

    def offload(self) -> int:
        if self._there_since_s is not None:
            time.sleep(self._options["offload_s"])
            self._card.refund(self.nbytes)
            self.held_s += time.monotonic() - self._there_since_s
            self._there_since_s = None
        return int(self.nbytes)

    release = offload

    def save(self, store: SnapshotFolder, name: str) -> int:
        raise NotImplementedError

    def load(self, store: SnapshotFolder, name: str) -> int:
        raise NotImplementedError


class Service:
    """Serves each request in a thread of its own, as a server does."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._card = SimulatedDevice(options["capacity_bytes"], shared=options["card"])
        self._weights = Weights(self._card, options)
        self._used_s = 0.0
        folder = options["folder"]
        sharing = None if folder is None else Sharing(headroom_bytes=options["headroom_bytes"], folder=folder)
        self._manager = GPUResourceManager(
            self._card, keep_warm=options["keep_warm_s"], idle_timeout=-1, sharing=sharing,
            adopt=lambda engine, device, managed: self._weights,
        )  # fmt: skip
        self._manager.register("model", self._load, size_bytes=self._weights.nbytes)

    def _load(self) -> Weights:
        self._weights.restore()
        return self._weights

    def run(self) -> None:
        for line in sys.stdin:
            command, *arguments = line.split()
            if command == "request":
                threading.Thread(target=self._request, args=(int(arguments[0]), float(arguments[1]))).start()
            elif command == "offload":
                self._manager.offload()
                say(offloaded=True)
            elif command == "close":
                self._manager.close()
                idle_s = self._weights.held_s - self._used_s
                say(closed=True, idle_s=idle_s, put_back=self._weights.put_back)
            elif command == "books":
                say(free_bytes=self._card.memory().free_bytes, holders=dict(self._card.holders()))

    def _request(self, number: int, limit_s: float) -> None:
        began_s = None
        try:
            with self._manager.lease("model", limit_s):
                began_s = time.monotonic()
                time.sleep(self._options["service_s"])
                self._used_s += time.monotonic() - began_s
            outcome = "served"
        except RequestTimeout:
            outcome = "timed out"
        except DeviceOutOfMemory:
            outcome = "out of memory"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        say(request=number, outcome=outcome, began_s=began_s)


def strange(options: dict[str, Any]) -> None:
    """Takes memory now and then in steps, holds it, and gives it back, until its input ends."""
    card = SimulatedDevice(options["capacity_bytes"], shared=options["card"])
    gaps = random.Random(options["seed"])
    while not select.select([sys.stdin], [], [], gaps.uniform(0.8, 1.2) * options["stranger_every_s"])[0]:
        asked_s, steps = time.monotonic(), 0
        while steps < options["stranger_bytes"] // STEP_BYTES and time.monotonic() < asked_s + GIVE_UP_S:
            try:
                card.charge(STEP_BYTES)
                steps += 1
            except MemoryError:
                time.sleep(RETRY_S)
        got_all = steps == options["stranger_bytes"] // STEP_BYTES
        say(asked_s=asked_s, took_s=time.monotonic() - asked_s if got_all else None, now_s=time.monotonic())
        if got_all:
            time.sleep(HOLD_S)
        card.refund(steps * STEP_BYTES)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    logging.disable()  # each move without room would be a line
    Service(given).run() if sys.argv[1] == "service" else strange(given)
