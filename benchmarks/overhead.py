"""Measures the cost of a lease: of a model on the device, without and with waiting requests, and of an offloaded one.

    python benchmarks/overhead.py

Four tables, measured in one run on a simulated card, the first three interleaved with a tiny engine: enter and exit
without other requests; the same with 1 to 64 waiting threads and a listener, compared with a lock and a bare queue of
as many locks (the interpreter's cost of thread switches); `status`; and the CPU time of offload and restore of a model
with many parameters or objects. The last table lists the goals. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks._cold import Cold, measure_cold, print_cold
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.contracts import Device
from residency.memory import EngineResident
from residency.scheduling.managed_model import ManagedModel

MODEL = "tts"
WAITING = (1, 2, 4, 8, 16, 32, 64)
MOST_US = 25.0
FLAT = 1.5
STATUS_MS = 5.0
TURNS = 5
LEARN = 30

Acquire = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--leases", type=int, default=20_000, help="how many in each row with nobody else there (20000)")
    add("--handovers", type=int, default=4_000, help="how many from thread to thread, for each number of them (4000)")
    add("--rounds", type=int, default=150, help="how often the end of a lease with others waiting is timed (150)")
    add("--waiting", type=int, nargs="+", default=WAITING, help="how many threads wait (1 2 4 8 16 32 64)")
    add("--cold-share", type=float, default=1.0, help="of the parameters and objects of large engines (1)")
    add("--json", type=Path, metavar="FILE", help="write all values there, too")
    options = parser.parse_args()
    started_s = time.perf_counter()
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    alone = measure_alone(options.leases)
    print_alone(alone)
    crowds = measure_crowds(sorted(set(options.waiting)), options.handovers, options.rounds)
    print_crowds(crowds)
    looks = measure_status(max(50, options.leases // 20), max(options.waiting))
    print_status(looks)
    cold = measure_cold(options.cold_share)
    print_cold(cold)
    goals = judge(alone, crowds, looks, cold)
    print_goals(goals)
    print(f"\n{time.perf_counter() - started_s:.0f} s, load average at the end {os.getloadavg()[0]:.1f}")
    if options.json:
        parts = {"alone": alone, "waiting": crowds, "status": looks, "cold": cold, "must_reach": goals}
        result = {name: [asdict(row) for row in rows] for name, rows in parts.items()}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if not all(goal.reached for goal in goals):
        sys.exit(1)


# -- without other requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Durations, in microseconds."""

    name: str
    median: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, name: str, times_ns: Sequence[int]) -> Times:
        ordered = sorted(times_ns)
        at = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1000 for share in (0.5, 0.9, 0.99)]
        return cls(name, *at, ordered[-1] / 1000)


PINNED = "lease, keep_warm=-1"


def measure_alone(leases: int) -> list[Times]:
    lock = threading.Lock()
    with three_managers() as managers:
        rows: dict[str, Acquire] = {
            "threading.Lock": lambda: lock,
            PINNED: lambda: managers["-1"].lease(MODEL),
            "lease, keep_warm=60": lambda: managers["60"].lease(MODEL),
            "lease, keep_warm='auto'": lambda: managers["auto"].lease(MODEL),
            "lease inside a lease": lambda: managers["-1"].lease(MODEL),
        }
        times_ns: dict[str, list[int]] = {name: [] for name in rows}
        for _ in range(TURNS):
            for name, acquire in rows.items():
                outer = managers["-1"].lease(MODEL) if name == "lease inside a lease" else nullcontext()
                with outer:
                    times_ns[name] += time_each(acquire, leases // TURNS)
    return [Times.of(name, times) for name, times in times_ns.items()]


def time_each(acquire: Acquire, times: int) -> list[int]:
    clock, found = time.perf_counter_ns, []
    for _ in range(times):
        start = clock()
        with acquire():
            pass
        found.append(clock() - start)
    return found


@contextmanager
def three_managers() -> Iterator[dict[str, GPUResourceManager]]:
    managers = {keep_warm: manager_of(keep_warm) for keep_warm in ("-1", "60", "auto")}
    try:
        yield managers
    finally:
        for manager in managers.values():
            manager.close()


class SlowToReturn(EngineResident):
    """Resident with a slow restore, so that an adaptive policy keeps it on the card."""

    def __init__(self, engine: Any, device: Device, _slot: ManagedModel) -> None:
        super().__init__(engine, device)

    def restore(self) -> int:
        time.sleep(0.02)
        return super().restore()


def manager_of(keep_warm: str) -> GPUResourceManager:
    """Returns a manager with one model on the card; ``auto`` has learned frequent requests."""
    manager = GPUResourceManager(SimulatedDevice(1 << 20), adopt=SlowToReturn)
    manager.register(MODEL, lambda: torch.nn.Linear(4, 4), keep_warm=keep_warm)
    for _ in range(LEARN if keep_warm == "auto" else 1):
        with manager.lease(MODEL):
            pass
    return manager


def print_alone(rows: Sequence[Times]) -> None:
    print(f"\nentering and leaving, nobody else there\n{'':34}" + _heads("median us", "p90 us", "p99 us", "most us"))
    for row in rows:
        print(f"{row.name:34}{row.median:12.2f}{row.p90:12.2f}{row.p99:12.2f}{row.most:12.0f}")


# -- with waiting requests --------------------------------------------------------------------------------------


class Queue:
    """Minimum of a lease: threads served in order of arrival, each blocked on its own lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._gates: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
        gate.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._gates:
                self._gates.popleft().release()
            else:
                self._taken = False

    @property
    def waiting(self) -> int:
        return len(self._gates)


@dataclass(frozen=True)
class Crowd:
    """Microseconds with that number of waiting threads: exit (median), and switch to the next thread (mean)."""

    waiting: int
    leave: float
    leave_p99: float
    queue_leave: float
    handover: float
    queue_handover: float
    lock_handover: float


def measure_crowds(crowds: Sequence[int], handovers: int, rounds: int) -> list[Crowd]:
    manager = manager_of("-1")

    def waiting() -> int:
        return int(manager.status()["models"][MODEL]["waiting"])

    leaves: dict[tuple[str, int], list[int]] = {}
    passes: dict[tuple[str, int], list[float]] = {}
    with manager:
        manager.subscribe(lambda event: None)  # like each request of the page, for its queue position
        for _ in range(TURNS):
            for crowd in crowds:
                queue, lock = Queue(), threading.Lock()
                acquires: dict[str, Acquire] = {
                    "lease": lambda: manager.lease(MODEL),
                    "queue": lambda queue=queue: queue,
                    "lock": lambda lock=lock: lock,
                }
                for name, acquire in acquires.items():
                    passes.setdefault((name, crowd), []).append(time_handovers(acquire, crowd, handovers // TURNS))
                shared = rounds // TURNS
                leaves.setdefault(("lease", crowd), []).extend(
                    time_leaving(acquires["lease"], waiting, crowd, shared),
                )
                leaves.setdefault(("queue", crowd), []).extend(
                    time_leaving(acquires["queue"], lambda queue=queue: queue.waiting, crowd, shared),
                )
    return [
        Crowd(
            crowd,
            Times.of("", leaves["lease", crowd]).median,
            Times.of("", leaves["lease", crowd]).p99,
            Times.of("", leaves["queue", crowd]).median,
            *(statistics.median(passes[name, crowd]) for name in ("lease", "queue", "lock")),
        )
        for crowd in crowds
    ]


def time_handovers(acquire: Acquire, waiting: int, times: int) -> float:
    """Acquires in a loop in ``waiting`` + 1 threads; returns total microseconds per acquisition.

    All threads queue before the first acquisition, so that in a fair queue each one is a thread switch.
    """
    each = max(1, times // (waiting + 1))
    come = threading.Semaphore(0)

    def work() -> None:
        come.release()
        for _ in range(each):
            with acquire():
                pass

    with acquire():
        threads = _started(work, waiting + 1)
        for _ in threads:
            come.acquire()
        time.sleep(0.02)
        start = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    return (time.perf_counter_ns() - start) / 1000 / (each * (waiting + 1))


def time_leaving(acquire: Acquire, count: Callable[[], int], waiting: int, rounds: int) -> list[int]:
    """Measures ``__exit__`` while that number of threads wait, in nanoseconds."""
    come, gone, over = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def work() -> None:
        while True:
            come.acquire()
            if over.is_set():
                return
            with acquire():
                pass
            gone.release()

    threads, found = _started(work, waiting), []
    for _ in range(rounds):
        held = acquire()
        held.__enter__()
        come.release(waiting)
        while count() < waiting:
            time.sleep(0.0002)
        start = time.perf_counter_ns()
        held.__exit__(None, None, None)
        found.append(time.perf_counter_ns() - start)
        for _ in range(waiting):
            gone.acquire()
    over.set()
    come.release(waiting)
    for thread in threads:
        thread.join()
    return found


def _started(work: Callable[[], None], number: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


def print_crowds(rows: Sequence[Crowd]) -> None:
    first = rows[0]
    print(
        "\nwith others waiting and one listening, in microseconds (x: times the first row)\n"
        f"{'':8}{'leaving':>31}{'bare queue':>16}"
        f"{'one thread to the next':>26}{'bare queue':>16}{'Lock':>10}\n"
        f"{'waiting':8}{'median':>11}{'x':>8}{'p99':>12}{'median':>9}{'x':>7}{'mean':>18}{'x':>8}{'mean':>9}{'x':>7}"
        f"{'mean':>10}"
    )
    for row in rows:
        print(
            f"{row.waiting:<8}{row.leave:11.1f}{row.leave / first.leave:8.2f}{row.leave_p99:12.1f}"
            f"{row.queue_leave:9.1f}{row.queue_leave / first.queue_leave:7.2f}"
            f"{row.handover:18.1f}{row.handover / first.handover:8.2f}"
            f"{row.queue_handover:9.1f}{row.queue_handover / first.queue_handover:7.2f}{row.lock_handover:10.1f}"
        )


# -- status -----------------------------------------------------------------------------------------------------


def measure_status(looks: int, waiting: int) -> list[Times]:
    rows = []
    with manager_of("-1") as manager:
        rows.append(Times.of("nothing happens", time_status(manager, looks)))
        with manager.lease(MODEL):
            threads = _started(lambda: _come_and_go(manager), waiting)
            while manager.status()["models"][MODEL]["waiting"] < waiting:
                time.sleep(0.001)
            rows.append(Times.of(f"{waiting} waiting", time_status(manager, looks)))
        for thread in threads:
            thread.join()
        let_it = threading.Event()

        def load() -> torch.nn.Module:
            let_it.wait()
            return torch.nn.Linear(4, 4)

        manager.register("slow", load)
        manager.warm("slow")
        while manager.status()["models"]["slow"]["progress"] is None:
            time.sleep(0.001)
        rows.append(Times.of("a model loads", time_status(manager, looks)))
        let_it.set()
    return rows


def time_status(manager: GPUResourceManager, looks: int) -> list[int]:
    found = []
    for _ in range(looks):
        start = time.perf_counter_ns()
        manager.status()
        found.append(time.perf_counter_ns() - start)
    return found


def _come_and_go(manager: GPUResourceManager) -> None:
    with manager.lease(MODEL):
        pass


def print_status(rows: Sequence[Times]) -> None:
    print(f"\nstatus()\n{'':34}" + _heads("median us", "p90 us", "p99 us", "most us"))
    for row in rows:
        print(f"{row.name:34}{row.median:12.1f}{row.p90:12.1f}{row.p99:12.1f}{row.most:12.0f}")


# -- goals ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    name: str
    value: float
    unit: str
    wanted: float

    @property
    def reached(self) -> bool:
        return self.value <= self.wanted


def judge(
    alone: Sequence[Times], crowds: Sequence[Crowd], looks: Sequence[Times], cold: Sequence[Cold]
) -> list[Reached]:
    first, last = crowds[0], crowds[-1]
    from_to = f"{last.waiting} waiting / {first.waiting} waiting"
    goals = [Reached(f"{row.name}: median", row.median, "us", MOST_US) for row in alone if row.name != "threading.Lock"]
    goals.append(Reached(f"leaving, {from_to}", last.leave / first.leave, "", FLAT))
    growth = (last.handover / first.handover) / (last.queue_handover / first.queue_handover)
    goals.append(Reached(f"one thread to the next, {from_to}, over the queue's", growth, "", FLAT))
    goals += [Reached(f"status, {row.name}: p99", row.p99 / 1000, "ms", STATUS_MS) for row in looks]
    goals += [Reached(f"cold cycle, {row.name}", row.later, "s", row.wanted) for row in cold if row.wanted is not None]
    return goals


def print_goals(goals: Sequence[Reached]) -> None:
    print(
        f"\nmust reach (flat: with the most threads waiting at most {FLAT} times as long as with the fewest;\nfrom "
        f"thread to thread the interpreter's own price grows too, so the bare queue's growth is divided out there)"
    )
    print(f"{'':70}{'reached':>14}{'wanted':>12}")
    for goal in goals:
        reached, wanted = f"{goal.value:.2f} {goal.unit}".strip(), f"<= {goal.wanted:g} {goal.unit}".strip()
        print(f"{goal.name:70}{reached:>14}{wanted:>12}  {'yes' if goal.reached else 'no'}")


def _heads(*heads: str) -> str:
    return "".join(f"{head:>12}" for head in heads)


if __name__ == "__main__":
    main()
