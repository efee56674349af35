"""Threads use a cached constant, without a lease, while its engine is offloaded and restored. A separate process."""

from __future__ import annotations

import functools
import sys
import threading

import torch

from gpu_manager import GPUResourceManager, SimulatedDevice


@functools.lru_cache
def filters() -> torch.Tensor:
    return torch.ones(201 * 128 * 40)


class Engine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.register_buffer("filters", filters())


def main(cycles: int) -> None:
    manager = GPUResourceManager(SimulatedDevice(1 << 30))
    manager.register("a", Engine)
    over, wrong, used = threading.Event(), [], [0, 0]

    def use(number: int) -> None:
        while not over.is_set():
            total = float(filters().sum())
            used[number] += 1
            if total != filters().numel():
                wrong.append(total)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for cycle in range(cycles):
        with manager.lease("a"):
            pass
        manager.offload()
        if cycle % 10 == 9:
            manager.release()
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert min(used) > 0
    manager.close()
    print("whole")


if __name__ == "__main__":
    main(int(sys.argv[1]))
