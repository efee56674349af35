"""Two models that do not fit together share a budget; the least recently used one makes room.

    python examples/two_models_one_budget.py
    python examples/two_models_one_budget.py --budget 100MB --requests 20

Both may stay for ten minutes after a request (``keep_warm``), so that one leaves only to make room for the other.
Threads request both at once; all requests succeed. Uses the GPU, or a simulated one if there is none.
Prints each completed move (their number varies), then the results::

    device: ...; tts 33,554,432 B and asr 16,777,216 B share 41,943,040 B
    ...: released -> gpu
    ...: gpu -> cpu
    ...: released -> gpu
    ...
    12 of 12 requests answered right
    made room for the other model: ... times
    most on the device at once: 33,554,432 B
    closed: tts released, asr released
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpu_manager import Event, GPUResourceManager, SimulatedDevice, find_device
from residency.launch.values import size_bytes

SIZES = {"tts": 32 << 20, "asr": 16 << 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=size_bytes, default=size_bytes("40MB"), help="for both together (40MB)")
    parser.add_argument("--requests", type=int, default=12, help="how many are made, by four threads (12)")
    arguments = parser.parse_args()

    device = find_device()
    if not device.separate:  # simulates a GPU if there is none
        device = SimulatedDevice(capacity_bytes=48 << 30)
    both = " and ".join(f"{name} {nbytes:,} B" for name, nbytes in SIZES.items())
    print(f"device: {device.name}; {both} share {arguments.budget:,} B")

    evictions: list[str] = []
    most_bytes: list[int] = []

    def tell(event: Event) -> None:
        if event.what == "done":
            print(f"{event.model}: {event.source} -> {event.target}")
            if (event.source, event.target) == ("gpu", "cpu"):  # not the release at close
                evictions.append(event.model)

    def request(number: int) -> bool:
        name = ("tts", "asr")[number % 2]
        with manager.lease(name) as weights:
            most_bytes.append(sum(model["device_bytes"] for model in manager.status()["models"].values()))
            return float(weights.sum(dtype=torch.float64)) == len(weights) * (len(weights) - 1) / 2

    with GPUResourceManager(device, keep_warm="10m", budget_bytes=arguments.budget) as manager:
        manager.subscribe(tell)
        for name, nbytes in SIZES.items():
            load = partial(torch.arange, nbytes // 4, dtype=torch.float32, device=device.torch_device)
            # With size_bytes, room is made for the first load, too; otherwise the size is unknown until then.
            manager.register(name, load, size_bytes=nbytes)
        with ThreadPoolExecutor(4) as threads:
            right = sum(threads.map(request, range(arguments.requests)))
    print(f"{right} of {arguments.requests} requests answered right")
    print(f"made room for the other model: {len(evictions)} times")
    print(f"most on the device at once: {max(most_bytes):,} B")
    print("closed:", ", ".join(f"{name} {model['state']}" for name, model in manager.status()["models"].items()))
    return 0 if right == arguments.requests and max(most_bytes) <= arguments.budget else 1


if __name__ == "__main__":
    sys.exit(main())
