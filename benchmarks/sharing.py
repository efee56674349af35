"""Three services and a stranger on one simulated card: waits and out-of-memory errors, with sharing and without.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --chaos --requests 1000

Real processes. Each service has a model of 40 GB on a card of 48 GB and gets Poisson arrivals; each request has a limit
of its own. A stranger, which knows nothing of this project, takes 30 GB now and then in steps of 2 GB. All variants run
at the same time with the same arrivals, each on a card of its own, so that the machine's noise is the same for all.

The times of the load are compressed 60 times (a service of 6 s takes 0.1 s; keep-warm of 600, 60 and 0 s is 10, 1 and
0 s); the intervals in which the project looks at the card are not. All printed times are as measured. Idle
card-seconds: the card holds a model, or moves it, beyond the seconds of requests. Waits are those of served requests,
except ``mean, all``: there each request that was not served counts as one that has waited for its whole limit.

``--chaos``: sharing alone; services and the stranger are killed or stopped for 1 to 12 s at random, so that some are
taken for dead. Requests of a killed service end with it; visits of the stranger during a stop of any process are not
judged.

Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks import _sharing_processes
from residency.devices.named_cards import path_of
from residency.sharing.board import Board
from residency.sharing.tickets import STALE_AFTER_S, alive

GB = 1 << 30
SERVICES, LIMIT_S = 3, 10.0
LOAD = {
    "capacity_bytes": 48 * GB, "model_bytes": 40 * GB, "headroom_bytes": 2 * GB, "stranger_bytes": 30 * GB,
    "service_s": 0.1, "restore_s": 0.03, "offload_s": 0.01, "stranger_every_s": 5.0,
}  # fmt: skip
#: Keep-warm in seconds, and whether the card is shared.
VARIANTS = {
    "sharing, keep-warm 600 s": (10, True), "alone, keep-warm 600 s": (10, False), "alone, keep-warm 60 s": (1, False),
    "alone, keep-warm 0 s": (0, False),
}  # fmt: skip


class Process:
    """A program of `_sharing_processes`; started again after `kill`. ``heard`` gets each line that it prints.

    ``ended`` gets those requests that a killed service has not answered.
    """

    def __init__(self, role: str, options: dict[str, Any], heard: Callable[[dict[str, Any]], object]) -> None:
        self.role = role
        self._options, self._heard = options, heard
        self._answers: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self.open: set[int] = set()
        self._lock = threading.RLock()
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, _sharing_processes.__file__, self.role, json.dumps(self._options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # cut off by a kill
                facts = json.loads(line)
                self.open.discard(facts.get("request"))
                self._heard(facts)
                with self._changed:
                    self._answers.update(dict.fromkeys(facts, facts))
                    self._changed.notify_all()

    def send(self, *words: object) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            print(*words, file=self._process.stdin, flush=True)

    def request(self, number: int) -> None:
        with self._lock:
            self.open.add(number)
            self.send("request", number, LIMIT_S)

    def ask(self, command: str, answer: str) -> dict[str, Any]:
        """Sends a command; returns the answer that has the key ``answer``."""
        with self._changed:
            self._answers.pop(answer, None)
            self.send(command)
            assert self._changed.wait_for(lambda: answer in self._answers, 60), f"no answer to {command}"
            return self._answers[answer]

    def kill(self) -> None:
        """Kills and restarts it."""
        with self._lock:
            self._process.kill()
            self.end()
            for number in sorted(self.open):
                self._heard({"request": number, "outcome": "killed"})
            self.open.clear()
            self._start()

    def end(self) -> None:
        """Ends its input; waits for its end and its last lines."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Result:
    """Of a variant. Waits by number of the request; ``visits``: (from, until, seconds or None) of the stranger."""

    name: str
    outcomes: dict[int, str] = field(default_factory=dict)
    waits_s: dict[int, float] = field(default_factory=dict)
    visits: list[tuple[float, float, float | None]] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)
    kills: int = 0
    idle_s: float = 0.0
    put_back: int = 0
    idle_share: float = math.nan
    left: list[str] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        return Counter(self.outcomes.values())

    def judged(self) -> list[float]:
        """Seconds until the stranger had all; infinite if it gave up."""
        return [
            math.inf if took_s is None else took_s
            for from_s, until_s, took_s in self.visits
            if not any(stop < until_s and from_s < go for stop, go in self.stops)
        ]


class Variant:
    """Runs the load on a card of its own."""

    def __init__(self, name: str, plan: argparse.Namespace, folder: Path) -> None:
        keep_warm_s, shares = VARIANTS[name]
        self.plan, self.result = plan, Result(name)
        self.card = f"sharing-benchmark-{os.getpid()}-{list(VARIANTS).index(name)}"
        self.folder = folder if shares else None
        self._sent_s: dict[int, float] = {}
        shared = None if self.folder is None else str(self.folder)
        options = {**LOAD, "card": self.card, "keep_warm_s": keep_warm_s, "folder": shared, "seed": plan.seed}
        self.services = [Process("service", options, self._heard) for _ in range(SERVICES)]
        self.stranger = Process("stranger", options, self._heard)

    def _heard(self, facts: dict[str, Any]) -> None:
        if "request" in facts:
            number, outcome = facts["request"], facts["outcome"]
            self.result.outcomes[number] = "answered twice" if number in self.result.outcomes else outcome
            if facts.get("began_s") is not None:
                self.result.waits_s[number] = facts["began_s"] - self._sent_s[number]
        elif "took_s" in facts:
            self.result.visits.append((facts["asked_s"], facts["now_s"], facts["took_s"]))

    def run(self) -> Result:
        over = threading.Event()
        chaos = threading.Thread(target=self._chaos, args=(over,)) if self.plan.chaos else None
        if chaos:
            chaos.start()
        for service in self.services:  # they have started
            service.ask("books", "free_bytes")
        began_s = time.monotonic()
        for number, (due_s, service) in enumerate(arrivals(self.plan)):
            time.sleep(max(0.0, began_s + due_s - time.monotonic()))
            self._sent_s[number] = time.monotonic()
            self.services[service].request(number)
        over.set()
        if chaos:
            chaos.join()
        self.stranger.end()
        until_s = time.monotonic() + 3 * LIMIT_S
        while any(service.open for service in self.services) and time.monotonic() < until_s:
            time.sleep(0.1)
        self._end()
        return self.result

    def _chaos(self, over: threading.Event) -> None:
        """Kills or stops one process at a time."""
        dice = random.Random(f"chaos {self.plan.seed}")
        while not over.wait(dice.uniform(1, 4)):
            victim = dice.choice([*self.services, self.stranger])
            began_s = time.monotonic()
            if dice.random() < 0.5:
                victim.kill()
                self.result.kills += 1
            else:
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(dice.uniform(1, 12))
                os.kill(victim.pid, signal.SIGCONT)
            self.result.stops.append((began_s, time.monotonic()))

    def _end(self) -> None:
        """Measures the idle cost, ends all processes, and looks at the rest."""
        for service in self.services:
            service.ask("offload", "offloaded")
        if self.folder is not None:
            self.result.idle_share = max(idle_shares([one.pid for one in self.services], self.plan.idle_seconds))
        for service in self.services:
            closed = service.ask("close", "closed")
            self.result.idle_s += closed["idle_s"]
            self.result.put_back += closed["put_back"]
        books = self.services[0].ask("books", "free_bytes")
        if books["free_bytes"] != LOAD["capacity_bytes"] or books["holders"]:
            self.result.left.append(f"{books['free_bytes'] / GB:g} GB are free, held by {books['holders']}")
        for service in self.services:
            service.end()
        path = path_of(self.card)
        self.result.left += [str(path)] if path.exists() else []
        if self.folder is not None:
            tickets = Board(self.folder, f"simulated-{self.card}").tickets()
            if self.plan.chaos:  # those of killed processes count no more after a moment
                tickets = alive(tickets, time.monotonic() + STALE_AFTER_S / 2)
            self.result.left += [f"the ticket {ticket}" for ticket in tickets]


def arrivals(plan: argparse.Namespace) -> Iterator[tuple[float, int]]:
    """Yields the seconds of each request from the beginning, and its service."""
    dice, now_s = random.Random(f"arrivals {plan.seed}"), 0.0
    for _ in range(plan.requests):
        now_s += dice.expovariate(plan.rate)
        yield now_s, dice.randrange(SERVICES)


def idle_shares(pids: Sequence[int], seconds: float) -> list[float]:
    """Returns the CPU seconds of each process for each second."""

    def used_s(pid: int) -> float:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    time.sleep(1)  # the moves away have ended
    before = [used_s(pid) for pid in pids]
    time.sleep(seconds)
    return [(used_s(pid) - earlier_s) / seconds for pid, earlier_s in zip(pids, before, strict=True)]


def share_within(values: Sequence[float], limit: float) -> float:
    return sum(value <= limit for value in values) / len(values) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def print_results(results: Sequence[Result], plan: argparse.Namespace) -> None:
    print(f"\n{'requests':26}{'served':>8}{'timed out':>11}{'out of mem':>12}{'killed':>8}{'lost':>6}{'put back':>10}"
          f"{'mean wait':>11}{'p99 wait':>10}{'mean, all':>11}{'idle card-s':>13}")  # fmt: skip
    for one in results:
        counts, waits = one.counts(), list(one.waits_s.values())
        mean_s = statistics.fmean(waits) if waits else math.nan
        all_s = (sum(waits) + LIMIT_S * (plan.requests - len(waits))) / plan.requests
        print(f"{one.name:26}{counts['served']:8,}{counts['timed out']:11,}{counts['out of memory']:12,}"
              f"{counts['killed']:8,}{lost(one, plan):6,}{one.put_back:10,}{mean_s:9.3f} s"
              f"{percentile(waits, 0.99):8.3f} s{all_s:9.3f} s{one.idle_s:11.1f} s")  # fmt: skip
    print(f"\n{'stranger, 30 GB':26}{'visits':>8}{'within 1 s':>12}{'gave up':>9}{'median':>10}{'p99':>10}{'most':>10}")
    for one in results:
        took = one.judged()
        print(f"{one.name:26}{len(took):8,}{share_within(took, 1):12.1%}{took.count(math.inf):9,}"
              + "".join(f"{percentile(took, share):8.3f} s" for share in (0.5, 0.99, 1)))  # fmt: skip
    print()


def lost(one: Result, plan: argparse.Namespace) -> int:
    """Returns how many requests ended in no way of their own."""
    counts = one.counts()
    return plan.requests - sum(counts[each] for each in ("served", "timed out", "out of memory", "killed"))


def judge(one: Result, plan: argparse.Namespace) -> bool:
    """Prints the goals, for the variant that shares."""
    within = share_within(one.judged(), 1)
    goals = [
        ("out-of-memory errors of requests", "0", f"{one.counts()['out of memory']}",
         not one.counts()["out of memory"]),
        ("lost requests", "0", f"{lost(one, plan)}", not lost(one, plan)),
        ("left behind (bytes, rows, files, tickets)", "0", f"{len(one.left)}", not one.left),
        (f"most CPU of an idle service, {plan.idle_seconds:g} s", "< 0.1 %", f"{one.idle_share:.3%}",
         one.idle_share < 0.001),
    ]  # fmt: skip
    if not plan.chaos:
        goals.append(("stranger served within 1 s", ">= 99 %", f"{within:.1%}", within >= 0.99))
    print(f"{'must reach':44}{'reached':>10}{'wanted':>10}")
    for name, wanted, reached, ok in goals:
        print(f"{name:44}{reached:>10}{wanted:>10}  {'yes' if ok else 'no'}")
    for what in (*one.left, *(set(one.outcomes.values()) - {"served", "timed out", "out of memory", "killed"})):
        print(f"  {what}")
    return all(ok for *_, ok in goals)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of each variant (2000)")
    parser.add_argument("--rate", type=float, default=2.5, help="requests per second, all services together (2.5)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals, the stranger and chaos (1)")
    parser.add_argument("--chaos", action="store_true", help="kill and stop processes; sharing alone")
    parser.add_argument("--idle-seconds", type=float, default=30, help="over which the idle cost is measured (30)")
    plan = parser.parse_args(arguments)
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, {plan.requests:,} requests, {plan.rate:g} per second, seed {plan.seed}",
        flush=True,
    )
    names = list(VARIANTS)[:1] if plan.chaos else list(VARIANTS)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(names)) as threads:
        variants = [Variant(name, plan, Path(folder)) for name in names]
        results = list(threads.map(Variant.run, variants))
    if plan.chaos:
        print(f"{results[0].kills} kills, {len(results[0].stops) - results[0].kills} stops")
    print_results(results, plan)
    return 0 if judge(results[0], plan) else 1


if __name__ == "__main__":
    sys.exit(main())
