"""Soak test: many threads, thousands of requests, models larger than the card, manual moves, and faults.

    python benchmarks/soak.py
    python benchmarks/soak.py --requests 1000 --threads 8 --seed 7

Each request has a number, and ends once: with a bit-exact answer, or with an error of its own. Exits with 1, with a
sentence for each violation. In a deadlock, prints the stacks of all threads. The seed determines requests and faults,
not the interleaving of threads.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import faulthandler
import gc
import itertools
import logging
import math
import os
import platform
import queue
import random
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks._meter import resident_bytes
from benchmarks._soak_books import Books, Deadlines, Plan, share_of, slope
from benchmarks._soak_models import KINDS, MB, EngineBroke, Faults, FaultyCard, Model, ResidentBroke, adopter
from gpu_manager import DeviceOutOfMemory, Event, GPUResourceManager, Lease, ManagerClosed

SIZES_MB = {"tts": 4.0, "asr": 2.0, "enhance": 1.0}
BUDGET_MB, CARD_MB = 6.5, 7.0
KEEP_WARM: tuple[float | str, ...] = (0, 0.02, 0.2, "auto")
IDLE_TIMEOUT = (0.02, 0.1, 0.3)
LOAD_TIMEOUT_S, HANG_S = 0.3, 0.5
STOP_EVERY = 250
GROWTH_SHARE, GROWTH_MB = 0.01, 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=int, default=10_000, help="how many (10000)")
    add("--threads", type=int, default=32, help="how many threads make them (32)")
    add("--seed", type=int, default=0, help="of what is asked for and what breaks (0)")
    add("--seconds", type=float, default=math.inf, help="begin no more requests after this time")
    add("--faults", type=float, default=1.0, help="how much breaks: 0 nothing, 1 as usual")
    add("--watchdog", type=float, default=30.0, help="seconds without an end of any request that are a deadlock (30)")
    options = parser.parse_args(arguments)
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, seed {options.seed}",
        flush=True,
    )
    tame_malloc()
    logs = CountLogs()
    root = logging.getLogger()
    root.addHandler(logs)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            soak = Soak(options, Path(folder))
            soak.run()
            soak.report(logs)
    finally:
        torch.set_num_threads(threads_before)
        root.removeHandler(logs)
    problems = soak.problems
    for problem in problems[:20]:
        print(f"FAILED: {problem}.")
    if len(problems) > 20:
        print(f"FAILED: {len(problems) - 20} more like these.")
    if not problems:
        print("Every request was answered right or with its own error; nothing was lost, doubled or left behind.")
    return 1 if problems else 0


def tame_malloc() -> None:
    """Limits glibc's cache of freed memory, so that the process size reflects the memory in use."""
    arena_max, mmap_threshold = -8, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 2)
        libc.mallopt(mmap_threshold, 64 << 10)


class CountLogs(logging.Handler):
    """Counts log records instead of printing thousands of expected ones."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.levels: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.levels[record.levelname.lower()] += 1


@dataclass(frozen=True)
class Sample:
    """Memory without requests, with all models released."""

    ended: int
    rss_bytes: int
    objects: int


class Turnstile:
    """Source of request numbers; blocks at a movable stop."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._stop = 0
        self._over = False

    def number(self) -> int | None:
        with self._changed:
            while self._next >= self._stop and not self._over:
                self._changed.wait()
            if self._over:
                return None
            self._next += 1
            return self._next - 1

    def open_until(self, stop: int) -> None:
        with self._changed:
            self._stop = stop
            self._changed.notify_all()

    def close(self) -> int:
        """Stops giving numbers; returns how many were given."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            return self._next


class Soak:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.faults = Faults(options.seed, options.faults)
        self.card = FaultyCard(int(CARD_MB * MB), self.faults)
        self.models = {
            name: Model(name, number, size_mb, self.faults, HANG_S)
            for number, (name, size_mb) in enumerate(SIZES_MB.items())
        }
        self.names = list(self.models)
        self.manager = GPUResourceManager(
            self.card, snapshot_dir=folder, budget_bytes=int(BUDGET_MB * MB), adopt=adopter(self.faults)
        )
        for (name, model), keep_warm, idle_timeout in zip(self.models.items(), KEEP_WARM, IDLE_TIMEOUT, strict=False):
            self.manager.register(
                name, model.load, keep_warm=keep_warm, idle_timeout=idle_timeout, load_timeout=LOAD_TIMEOUT_S,
                max_waiting=20 if name == "enhance" else None, size_bytes=model.size_bytes,
            )  # fmt: skip
        self.books = Books(options.requests)
        self.deadlines = Deadlines(self.manager.status, self.names)
        self.turnstile = Turnstile()
        self.samples: list[Sample] = []
        self.calm, self.looking = threading.Lock(), threading.Lock()  # held during manual moves, and during status()
        self.over = threading.Event()
        self.to_cancel: queue.SimpleQueue[tuple[int, float, Lease] | None] = queue.SimpleQueue()
        self.looks_s = array("d")
        self.steered: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seconds = 0.0

    # -- phases -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        threads_before = set(threading.enumerate())
        self.manager.subscribe(self.deadlines.hear)
        self.manager.subscribe(self._listen_badly)
        crew = [threading.Thread(target=self._make_requests, args=(i,), daemon=True, name=f"asks-{i}")
                for i in range(self.options.threads)]  # fmt: skip
        helpers = [threading.Thread(target=work, daemon=True, name=work.__name__)
                   for work in (self._steer, self._look, self._cancel)]  # fmt: skip
        for thread in (*crew, *helpers):
            thread.start()
        started_s = time.monotonic()
        last = self.options.requests
        close_at = last - min(64, last // 10)
        for stop in (*range(STOP_EVERY, close_at, STOP_EVERY), close_at):
            self.turnstile.open_until(stop)
            if not self._await_ends(stop, started_s + self.options.seconds):
                break
            self._rest()
        else:
            self.turnstile.open_until(last)
            self._await_ends(close_at + (last - close_at) // 2, math.inf)
        self._close(crew, helpers)
        self.seconds = time.monotonic() - started_s
        self._judge(threads_before)

    def _await_ends(self, number: int, until_s: float) -> bool:
        """Waits until that number of requests have ended; returns false after the time limit."""
        seen, seen_s = -1, time.monotonic()
        while self.books.progress < number:
            now_s = time.monotonic()
            if now_s >= until_s:
                return False
            if self.books.progress != seen:
                seen, seen_s = self.books.progress, now_s
            elif now_s - seen_s > self.options.watchdog:
                self._deadlock(f"no request has ended for {self.options.watchdog:g} s")
            time.sleep(0.005)
        return True

    def _deadlock(self, what: str) -> None:
        print(f"FAILED: {what}: a deadlock. {self.books.progress} requests had ended. All threads:", flush=True)
        # Without the lock, which may be part of the deadlock.
        for name, managed in self.manager._managed_models.items():
            waiting = [request.number for request in managed.leases.waiting()]
            holder = managed.leases.holder.number if managed.leases.holder else None
            print(
                f"  {name}: {managed.state.value}, holder {holder}, waiting {waiting}, "
                f"for room {managed.memory.waiting_for_room}",
                flush=True,
            )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(1)

    def _within(self, what: str, work: Callable[[], Any]) -> None:
        """Calls ``work``; reports a deadlock if it does not return in time."""
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.options.watchdog)
        if thread.is_alive():
            self._deadlock(f"{what} has not ended after {self.options.watchdog:g} s")

    def _rest(self) -> None:
        """Waits for the deadlines after the last request, releases all models, and samples memory."""
        with self.calm:
            until_s = time.monotonic() + 2 * max(IDLE_TIMEOUT) + 0.1
            while time.monotonic() < until_s and any(m["state"] != "released" for m in self._shown().values()):
                time.sleep(0.01)
            self._within("release() while nobody asks for anything", self._release_all)
            for name, shown in self._shown().items():
                if shown["state"] != "released" or shown["leases"] or shown["waiting"]:
                    self.books.fault(f"while nobody asks for anything, {name!r} is {shown}")
            self._within("a load that was given up", _join_loads)  # it discards its engine, however late
            if self.card.ledger_bytes:
                self.books.fault(f"all models are released, and {self.card.ledger_bytes} bytes are on the card")
            with self.looking:  # excludes memory of status()
                gc.collect()
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)
                self.samples.append(Sample(self.books.progress, resident_bytes(), len(gc.get_objects())))

    def _release_all(self) -> None:
        for name in self.names:
            self.deadlines.touch(name)
            for _ in range(20):  # each attempt may fail at random
                with contextlib.suppress(ResidentBroke):
                    self.manager.release(name)
                    break

    def _shown(self) -> dict[str, Any]:
        return dict(self.manager.status()["models"])

    def _close(self, crew: Sequence[threading.Thread], helpers: Sequence[threading.Thread]) -> None:
        self.books.closing = True
        self._within("close() under load", self.manager.close)
        self._await_ends(self.options.requests if self.books.progress else 0, time.monotonic() + 5)
        self.handed_out = self.turnstile.close()
        self.over.set()
        self.to_cancel.put(None)
        until_s = time.monotonic() + self.options.watchdog
        for thread in (*crew, *helpers):
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                self._deadlock(f"the thread {thread.name} does not end")

    def _judge(self, threads_before: set[threading.Thread]) -> None:
        books = self.books
        del books.ended[self.handed_out :]
        self._within("a load that was given up", _join_loads)
        until_s = time.monotonic() + 5  # ending threads
        while time.monotonic() < until_s and (set(threading.enumerate()) - threads_before or self.card.ledger_bytes):
            time.sleep(0.01)
        found = books.problems()
        if left := sorted(thread.name for thread in set(threading.enumerate()) - threads_before):
            found.append(f"threads are left after close(): {', '.join(left)}")
        if self.card.ledger_bytes or self.card.pinned_bytes:
            found.append(
                f"{self.card.ledger_bytes} bytes are on the card after close(), {self.card.pinned_bytes} pinned"
            )
        if self.card.peak_bytes > self.card.capacity_bytes:
            found.append(f"there were {self.card.peak_bytes} bytes on a card of {self.card.capacity_bytes}")
        if strangers := [p.name for p in self.folder.iterdir() if p.suffix != ".safetensors" or p.name[0] == "."]:
            found.append(f"files are left besides snapshots: {', '.join(strangers)}")
        monitor = self.manager.status()["monitor"]
        if monitor["errors"]:
            found.append(f"the idle monitor met {monitor['errors']} errors, the last {monitor['last_error']}")
        growth = self.growth
        if growth is not None and growth[0] > max(GROWTH_MB * MB, GROWTH_SHARE * self.samples[-1].rss_bytes):
            found.append(f"memory is not flat: {growth[0] / MB:.1f} MB more over the last {growth[2]:,} requests")
        if growth is not None and growth[1] > max(GROWTH_SHARE * self.samples[-1].objects, 1000):
            found.append(f"objects are not flat: {growth[1]:,.0f} more over the last {growth[2]:,} requests")
        self.problems = found

    @property
    def growth(self) -> tuple[float, float, int] | None:
        """Returns the growth (bytes, objects, number of requests) in the second half, by a line through its samples."""
        late = [sample for sample in self.samples if sample.ended >= self.options.requests // 2]
        if len(late) < 3:
            return None
        span = late[-1].ended - late[0].ended
        rss, objects = ([(s.ended, getattr(s, what)) for s in late] for what in ("rss_bytes", "objects"))
        return slope(rss) * span, slope(objects) * span, span

    # -- requests -----------------------------------------------------------------------------------------------

    def _make_requests(self, index: int) -> None:
        chance = random.Random(f"thread {index} of {self.options.seed}")
        while (number := self.turnstile.number()) is not None:
            plan = self._plan(number, random.Random(f"request {number} of {self.options.seed}"))
            try:
                self._request(plan)
            except BaseException as error:
                self.books.fault(f"the benchmark itself is broken: {error!r}")
                raise
            time.sleep(chance.expovariate(1 / 0.002))

    def _plan(self, number: int, chance: random.Random) -> Plan:
        # Each model has idle periods, so that its deadlines expire under load, too.
        resting = number // 200 % (len(self.names) + 1)
        names = [name for index, name in enumerate(self.names) if index != resting]
        some = chance.random
        return Plan(
            number,
            chance.choice(names),
            timeout_s=chance.choices([None, 0.0, chance.uniform(0, 0.005), 0.05, 30.0], [70, 3, 7, 5, 15])[0],
            cancel_after_s=chance.uniform(0, 0.02) if some() < 0.04 else None,
            breaks=some() < 0.03,
            discards=some() < 0.01,
            nested=chance.choice(names) if some() < 0.06 else None,
            holds_s=chance.uniform(0, 0.004) if some() < 0.2 else 0.0,
        )

    def _request(self, plan: Plan) -> None:
        """Makes one request and records its end, once."""
        books, model, kind = self.books, self.models[plan.model], plan.number % KINDS
        error: BaseException | None = None
        asked_s = entered_s = time.monotonic()
        try:
            for name in {plan.model, plan.nested} - {None}:
                self.deadlines.touch(str(name))
            lease = self.manager.lease(plan.model, plan.timeout_s)
            if plan.cancel_after_s is not None:
                self.to_cancel.put((plan.number, time.monotonic() + plan.cancel_after_s, lease))
            try:
                with lease as engine:
                    entered_s = time.monotonic()
                    inner = self.manager.lease(plan.nested) if plan.nested else contextlib.nullcontext()
                    with inner as nested_engine:
                        self._use(plan, lease, model, engine)
                        if plan.nested:
                            spoken = nested_engine.speak(kind)
                            if spoken != self.models[plan.nested].expected[kind]:
                                books.fault(f"request {plan.number} got a wrong answer from {plan.nested!r}")
            finally:
                if entered_s == asked_s:
                    entered_s = time.monotonic()
        except Exception as raised:
            error = raised.with_traceback(None)
        books.end(plan, error, entered_s - asked_s)

    def _use(self, plan: Plan, lease: Lease, model: Model, engine: Any) -> None:
        books = self.books
        if not model.busy.acquire(blocking=False):
            books.fault(f"request {plan.number} came into {plan.model!r} while another one was in it")
            return
        try:
            books.ran(plan.number)
            if plan.discards:
                lease.discard()
            spoken = engine.speak(plan.number % KINDS)
            if plan.holds_s:
                time.sleep(plan.holds_s)
            if spoken != model.expected[plan.number % KINDS]:
                books.fault(f"request {plan.number} got a wrong answer from {plan.model!r}")
            if plan.breaks:
                raise EngineBroke(plan.number)
        finally:
            model.busy.release()

    # -- disturbances -------------------------------------------------------------------------------------------

    def _steer(self) -> None:
        chance = random.Random(f"steering {self.options.seed}")
        acts = ("offload", "release", "warm", "configure", "make_room", "status")
        while not self.over.wait(chance.expovariate(1 / 0.02)):
            act = chance.choice(acts)
            name = chance.choice([*self.names, None])
            keep_warm, idle_timeout = chance.choice(KEEP_WARM), chance.choice(IDLE_TIMEOUT)
            with self.calm:
                if act != "status":
                    for touched in self.names if name is None or act == "make_room" else [name]:
                        self.deadlines.touch(touched)
                self.steered[act] += 1
                try:
                    if act == "configure":
                        self.manager.configure(name, keep_warm=keep_warm, idle_timeout=idle_timeout)
                    elif act == "make_room":
                        self.manager.make_room(name or self.names[0])
                    elif act == "status":
                        self.manager.status()
                    else:
                        getattr(self.manager, act)(name)
                except (ResidentBroke, DeviceOutOfMemory):
                    pass
                except Exception as error:
                    if not (self.books.closing and isinstance(error, ManagerClosed)):
                        self.books.fault(f"{act}({name!r}) raised {error!r}")

    def _look(self) -> None:
        while not self.over.wait(0.01):
            with self.looking:
                start_s = time.perf_counter()
                self.manager.status()
                self.looks_s.append(time.perf_counter() - start_s)

    def _cancel(self) -> None:
        while (entry := self.to_cancel.get()) is not None:
            number, due_s, lease = entry
            time.sleep(max(0.0, due_s - time.monotonic()))
            waits = lease.request is not None
            if lease.cancel() and waits:
                self.books.promised_cancels[number] = 1

    def _listen_badly(self, event: Event) -> None:
        if self.faults.strikes("listener raises"):
            raise RuntimeError("this listener is broken")

    # -- results ------------------------------------------------------------------------------------------------

    def report(self, logs: CountLogs) -> None:
        books = self.books
        print(
            f"{books.progress:,} requests, {self.options.threads} threads, {self.seconds:.0f} s; "
            f"models of {', '.join(f'{size:g}' for size in SIZES_MB.values())} MB, a card of {CARD_MB:g} MB, "
            f"a budget of {BUDGET_MB:g} MB\n"
        )
        rows(f"{'requests':38}{'':>10}", books.outcomes)
        rows(f"{'what was made to break':38}{'':>10}", self.faults.struck)
        rows(f"{'steered meanwhile':38}{'':>10}", self.steered)
        moves = {f"moves that {what}": self.deadlines.heard[what] for what in ("began", "done", "failed")}
        moves["events out of order, or without end"] = self.deadlines.out_of_order
        rows(f"{'moves and events':38}{'':>10}", {**moves, **{f"logged: {k}": v for k, v in logs.levels.items()}})
        print(f"{'waits':38}{'count':>10}{'median ms':>12}{'p99 ms':>12}{'longest ms':>12}")
        overshot = self.deadlines.overshot_s
        for name, values in {
            "for the model": books.waits_s,
            "beyond the request's timeout": books.late_timeouts_s,
            "offload begun after it was due": overshot["cpu"],
            "release begun after it was due": overshot["released"],
            "status()": self.looks_s,
        }.items():
            figures = "".join(f"{share_of(values, share) * 1000:12.1f}" for share in (0.5, 0.99, 1.0))
            print(f"{name:38}{sum(1 for value in values if not math.isnan(value)):10,}{figures}")
        print(f"\n{'memory, all models released':38}{'RSS MB':>10}{'objects':>12}")
        for sample in _some(self.samples):
            print(f"{f'after {sample.ended:,} requests':38}{sample.rss_bytes / MB:10.1f}{sample.objects:12,}")
        if self.growth is not None:
            nbytes, objects, span = self.growth
            print(f"{f'growth over the last {span:,}':38}{nbytes / MB:+10.1f}{objects:+12,.0f}")
        print(f"{'most on the card':38}{self.card.peak_bytes / MB:10.1f}\n", flush=True)


def _join_loads() -> None:
    """Waits for the threads of loads. Those of given-up loads may hold bytes while all models are released."""
    for thread in threading.enumerate():
        if thread.name.startswith("gpu-loading-"):
            thread.join()


def rows(head: str, counts: dict[str, int]) -> None:
    print(head.rstrip())
    for name, count in sorted(counts.items(), key=lambda row: -row[1]):
        print(f"  {name:36}{count:10,}")
    print()


def _some(samples: Sequence[Sample]) -> list[Sample]:
    """Returns about ten of them, including the last."""
    step = max(1, math.ceil(len(samples) / 10))
    return list(itertools.islice(reversed(samples), 0, None, step))[::-1]


if __name__ == "__main__":
    sys.exit(main())
