"""A replacement for `threading` with all switches decided by a seed, to find and replay races.

    scheduler = Scheduler.varied(seed)
    monkeypatch.setattr(gpu_manager, "threading", scheduler)
    scheduler.run(reader, writer)

Real threads, of which exactly one runs at a time; at every operation on a lock or thread, and at every
`Scheduler.step`, the seed selects the next one. Time is virtual. As in CHESS (Musuvathi et al., OSDI 2008), loom and
shuttle (AWS Labs); ``changes`` is PCT (Burckhardt et al., ASPLOS 2010). Only operations through the scheduler can
interleave: between two of them a thread runs alone.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import random
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from scheduled import OWN, Abandoned, Lock, RLock, Thread

PATIENCE = 500
"""Points in a row until a PCT thread becomes the last: otherwise a polling thread would starve the awaited one."""


class Deadlock(AssertionError):
    """The threads do not end: none can run, the steps are used up, or one waits for something outside the scheduler."""


class Scheduler:
    """A stand-in for the module `threading`; the same seed and options give the same run, step for step.

    At each point, with ``switch_probability``, a random thread of those that can run is selected; otherwise the same
    one continues. With ``changes`` instead, the thread with the highest random priority runs, and at that many of the
    first ``length`` points the running one becomes the last. With ``jump_probability`` per point, time advances to the
    next deadline although some thread could still run. ``invariant`` is called at every point, and must not wait for a
    lock.
    """

    TIMEOUT_MAX = threading.TIMEOUT_MAX
    local = threading.local

    def __init__(self, seed=0, *, switch_probability=1.0, changes=0, length=500, jump_probability=0.02, stall_s=30.0):
        self.seed, self.steps = seed, 0
        self.trace: list[tuple[str, str, str]] = []
        self.invariant: Callable[[], object] | None = None
        self._options = f"{seed=}, {switch_probability=}, {changes=}, {length=}, {jump_probability=}"
        self._switch_probability, self._jump_probability, self._stall_s = switch_probability, jump_probability, stall_s
        self._changes, self._length, self._at_stretch = changes, length, 0
        self._lowest = itertools.count(-1 - changes, -1)
        self._random = random.Random(seed)
        self._now_s = 1000.0
        self._counts = Counter[str]()
        self._threads: list[Any] = []
        self._ready: list[Any] = []
        self._sleepers: dict[Any, float] = {}
        self._over = threading.Semaphore(0)
        self._verdict: str | BaseException = ""
        self._stopping = self._looking = False
        for kind in (Lock, RLock, Thread):
            setattr(self, kind.__name__, type(kind.__name__, (kind,), {"_scheduler": self}))
        self._main = self._running = self.Thread(name="MainThread")  # the caller outside of runs
        self._main._started = self._main._alive = True

    @classmethod
    def varied(cls, seed: int, **options: Any) -> Scheduler:
        """Chooses a strategy by seed: switches everywhere, rare switches, PCT with one to four changes."""
        strategy = ({}, {"switch_probability": 0.1}, {"changes": 1 + seed // 3 % 4})[seed % 3]
        return cls(seed, **{**strategy, **options})

    # -- what tests and fakes call -------------------------------------------------------------------------------

    def run(self, *functions: Callable[[], Any], steps=100_000, invariant: Callable[[], object] | None = None) -> list:
        """Runs functions and the threads they start until all but daemons have ended; returns their results.

        An error in any thread ends the run and is raised here. Threads started before the run take part.
        """
        if self._running is not self._main:
            raise RuntimeError("run() within run()")
        self.invariant = invariant or self.invariant
        results: list[Any] = [None] * len(functions)
        for index, function in enumerate(functions):
            name = getattr(function, "__name__", f"function-{index}")
            self.Thread(target=_keep, args=(results, index, function), name=name, daemon=False).start()
        if not self._ready:
            return results
        points = self._random.sample(range(1, self._length + 1), self._changes)
        self._lowered = {self.steps + point: -1 - rank for rank, point in enumerate(points)}
        self._limit, self._verdict, report = self.steps + steps, "", ""
        with _undisturbed():
            try:
                for thread in self._threads:
                    thread._open()
                self._hand_to(self._next(None))
                self._wait_until_over()
                report = self._report() if self._verdict else ""
            finally:
                self._abandon()
        verdict, self._verdict = self._verdict, ""
        if isinstance(verdict, str):
            if verdict:
                raise Deadlock(f"{verdict}\n{report}")
            return results
        if isinstance(verdict, AssertionError):
            verdict.args = (f"{verdict}\n{report}",)
        elif hasattr(verdict, "add_note"):
            verdict.add_note(report)
        else:  # Python 3.10
            print(report, file=sys.stderr)
        raise verdict

    def step(self, label: str = "") -> None:
        """Marks a point where other threads may run; called by fakes in long operations."""
        self._point("step", label)
        if self._stopping:
            raise Abandoned

    def now(self) -> float:
        return self._now_s

    def clock(self) -> Clock:
        return Clock(self)

    def current_thread(self) -> Any:
        return self._here()

    # -- who runs ------------------------------------------------------------------------------------------------

    def _here(self):
        thread = self._running
        if thread._os_ident != threading.get_ident() and thread is not self._main and not self._stopping:
            raise RuntimeError("called from a thread that the scheduler did not start, while it runs others")
        return thread

    def _point(self, operation: str, label: str) -> None:
        thread = self._here()
        if not (self._looking or self._stopping or thread is self._main):
            self._record(thread, operation, label)
            self._switch(thread, self._next(thread))

    def _block(self, queue: list, operation: str, what: Any, deadline_s: float = math.inf) -> bool:
        """Waits in a queue until woken; returns False at the deadline."""
        thread, label = self._here(), "" if what is None else what._label
        if self._stopping:
            raise Abandoned
        if self._looking:
            raise RuntimeError(f"the invariant waits: {operation} {label}")
        if thread is self._main:
            if deadline_s == math.inf:
                raise Deadlock(f"outside of run() nobody can end this: {operation} {label}")
            self._pass(deadline_s)
            return False
        queue.append(thread)
        try:
            self._record(thread, operation, label)
            thread._woken = False
            if deadline_s > self._now_s:
                thread._waits = (operation, what)
                self._ready.remove(thread)
                if deadline_s < math.inf:
                    self._sleepers[thread] = deadline_s
            self._switch(thread, self._next(None if thread._waits else thread))
            return thread._woken
        finally:
            if thread in queue:
                queue.remove(thread)

    def _wake(self, queue: list) -> None:
        for thread in queue:
            if thread._waits:
                thread._woken = True
                self._resume(thread)
        queue.clear()

    def _resume(self, thread) -> None:
        thread._waits = None
        self._sleepers.pop(thread, None)
        self._ready.append(thread)

    def _pass(self, until_s: float) -> None:
        self._now_s = max(self._now_s, until_s)
        for thread in [thread for thread, deadline_s in self._sleepers.items() if deadline_s <= self._now_s]:
            self._resume(thread)

    def _deadline(self, timeout: float | None) -> float:
        if timeout is None:
            return math.inf
        if timeout > self.TIMEOUT_MAX:
            raise OverflowError("timeout value is too large")
        return self._now_s if timeout <= 0 else max(self._now_s + timeout, math.nextafter(self._now_s, math.inf))

    def _record(self, thread, operation: str, label: str) -> None:
        self.steps += 1
        self.trace.append((thread._label, operation, label))
        if self.invariant is not None:
            self._looking = True
            try:
                self.invariant()
            except BaseException as error:
                self._verdict = error
            self._looking = False
        if self._verdict or self.steps >= self._limit:
            self._verdict = self._verdict or "The steps ran out."
            self._switch(thread, None)

    def _next(self, thread):
        """Returns the thread to run next; ``thread`` is the running one, if it can continue."""
        ready = self._ready
        if self._sleepers and (not ready or self._random.random() < self._jump_probability):
            self._pass(min(self._sleepers.values()))
        if len(ready) < 2:
            return ready[0] if ready else None
        if not self._changes:
            stays = thread and self._switch_probability < 1 and self._random.random() >= self._switch_probability
            return thread if stays else ready[int(self._random.random() * len(ready))]
        if thread and self.steps in self._lowered:
            thread._priority = self._lowered[self.steps]
        elif thread and self._at_stretch > PATIENCE:
            thread._priority = next(self._lowest)
        chosen = max(ready, key=lambda other: other._priority)
        self._at_stretch = self._at_stretch + 1 if chosen is thread else 0
        return chosen

    def _switch(self, thread, chosen) -> None:
        if chosen is not thread:
            self._hand_to(chosen)
            thread._baton.acquire()
            if self._stopping:
                raise Abandoned

    def _hand_to(self, chosen) -> None:
        if chosen is None:
            self._verdict = self._verdict or "Nobody can run, and no deadline is to come."
            self._over.release()
        else:
            self._running = chosen
            chosen._baton.release()

    def _ended(self, thread) -> None:
        thread._alive = False
        if not self._stopping:
            self._ready.remove(thread)
            self._wake(thread._queue)
            if self._verdict or all(other.daemon for other in self._threads if other._alive):
                self._over.release()
            else:
                self._hand_to(self._next(None))

    # -- the end -------------------------------------------------------------------------------------------------

    def _wait_until_over(self) -> None:
        seen = -1
        while not self._over.acquire(timeout=self._stall_s):
            if self.steps == seen:
                self._verdict = f"No scheduling point for {self._stall_s} real seconds: {self._running._label} stalls."
                return
            seen = self.steps

    def _abandon(self) -> None:
        """Unwinds all remaining threads one after the other, with locks that are always free."""
        self._stopping = True
        last = self._running
        for thread in sorted(self._threads, key=lambda thread: thread is last):
            if thread._alive:
                self._running = thread
                with contextlib.suppress(RuntimeError):  # not waiting: stalled or interrupted
                    thread._baton.release()
            thread._os_thread.join(self._stall_s)
        self._threads, self._ready, self._sleepers, self._over = [], [], {}, threading.Semaphore(0)
        self._running, self._stopping = self._main, False

    def _report(self) -> str:
        frames = sys._current_frames()
        lines = [f"Scheduler({self._options}), step {self.steps}, time {self._now_s}"]
        for thread in (thread for thread in self._threads if thread._alive):
            operation, what = thread._waits or ("can run", None)
            owner = getattr(what, "_owner", None)
            waits = f"{operation} {what._label if what else ''}" + (f", held by {owner._label}" if owner else "")
            lines.append(f"  {thread._label}{' (daemon)' if thread.daemon else ''}: {waits}")
            lines += _where(frames.get(thread._os_ident))
        return "\n".join([*lines, "Last steps:", *(f"  {' '.join(step)}" for step in self.trace[-40:])])


class Clock:
    """Virtual time as a clock of the manager."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self.now = scheduler, scheduler.now

    def wait(self, event: Any, timeout_s: float = math.inf) -> None:
        event.acquire(timeout=-1 if timeout_s == math.inf else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))


def _keep(results: list, index: int, function: Callable[[], Any]) -> None:
    results[index] = function()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restricts the run to one core, where switches are several times faster, and disables garbage collection."""
    collecting = gc.isenabled()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    gc.disable()
    try:
        if cores:
            os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        if collecting:
            gc.enable()


def _where(frame: Any) -> list[str]:
    """Returns the innermost lines of a thread outside of this file and of `threading`."""
    own = {*OWN, __file__, threading.__file__}
    calls = [(each.f_code, line) for each, line in traceback.walk_stack(frame) if each.f_code.co_filename not in own]
    return [f"      {os.path.basename(code.co_filename)}:{line} {code.co_name}" for code, line in calls[:6]]
