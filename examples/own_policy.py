"""A custom policy: the model stays on the device during a conversation, and leaves after a single request.

    python examples/own_policy.py

`Conversation` implements ``residency.contracts.Policy``: it gets the gaps between requests and reads no clock, so that
tests need no waiting. This program advances a manual clock. (Office hours need no policy, only cron jobs:
``python -m gpu_manager configure tts --keep-warm -1`` in the morning, ``--keep-warm 0`` in the evening.) Prints::

    device: ...
       0 s  a question                     cpu   would stay    0 s
     300 s  another, long after            cpu   would stay    0 s
     310 s  one soon after that            gpu   would stay   30 s
     330 s  the conversation goes on       gpu   would stay   30 s
     360 s  30 s of silence                cpu
     600 s  a question                     cpu   would stay    0 s
    1200 s  idle for 600 s                 released
    policy: conversation
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpu_manager import GPUResourceManager, SimulatedDevice, State, find_device
from residency.clock import ManualClock


@dataclass
class Conversation:
    """Policy that stays ``pause_s`` after a request within ``pause_s`` of the previous one; else leaves at once."""

    pause_s: float = 30.0
    idle_timeout_s: float = 600.0
    name: str = "conversation"
    keep_warm_s: float = 0.0

    def windows(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, self.keep_warm_s),)  # a later window would restore the model before the next request

    def idle_ended(self, idle_s: float) -> None:
        self.keep_warm_s = self.pause_s if idle_s <= self.pause_s else 0.0

    def brought_back(self, seconds: float) -> None:
        """Ignores the cost of a restore."""

    def with_idle_timeout(self, idle_timeout_s: float) -> Conversation:
        return replace(self, idle_timeout_s=idle_timeout_s)


def main() -> int:
    device = find_device()
    if not device.separate:  # simulates a GPU if there is none
        device = SimulatedDevice(capacity_bytes=48 << 30)
    print("device:", device.name)
    clock, policy = ManualClock(), Conversation()
    begun_s = clock.now()

    with GPUResourceManager(device, clock=clock) as manager:
        manager.register("tts", lambda: torch.nn.Linear(512, 512, device=device.torch_device), policy=policy)

        def tell(what: str, more: str = "") -> None:
            state = manager.status()["models"]["tts"]["state"]
            print(f"{clock.now() - begun_s:4.0f} s  {what:<30} {state:<5} {more}".rstrip())

        def ask(what: str, after_s: float) -> None:
            clock.advance(after_s)
            with manager.lease("tts") as model:
                model(torch.ones(512, device=device.torch_device))
            tell(what, f"would stay {policy.keep_warm_s:4.0f} s")

        def nobody_asks(for_s: float, state: State, what: str) -> None:
            clock.advance(for_s)
            manager.wait_for("tts", state, timeout="10s")  # the idle monitor runs in its own thread
            tell(what)

        ask("a question", after_s=0)
        ask("another, long after", after_s=300)
        ask("one soon after that", after_s=10)
        ask("the conversation goes on", after_s=20)
        nobody_asks(30, State.HOST, "30 s of silence")
        ask("a question", after_s=240)
        nobody_asks(600, State.RELEASED, "idle for 600 s")
        print("policy:", manager.status()["models"]["tts"]["policy"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
