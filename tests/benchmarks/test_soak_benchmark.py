"""A short soak passes, and one notices what it is there to notice."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks._soak_books import Books, Plan, slope
from benchmarks._soak_models import EngineBroke, FaultyCard, LoaderBroke
from benchmarks.soak import Soak
from gpu_manager import DeviceOutOfMemory, ManagerClosed, RequestCancelled, RequestTimeout

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = ["--requests", "80", "--threads", "8", "--seed", "1"]

SABOTAGE = """
import sys
sys.path.insert(0, ".")
from benchmarks import soak
from benchmarks._soak_models import KINDS, Model, Voice

class Sick(Voice):
    def speak(self, kind):
        {speaks}

Model.load = lambda self: Sick(self._weights)
sys.exit(soak.main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_a_short_soak_passes() -> None:
    done = run("benchmarks/soak.py", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "answered right" in done.stdout


def test_a_wrong_answer_makes_it_fail() -> None:
    done = run("-c", SABOTAGE.format(speaks="return super().speak((kind + 1) % KINDS)"), *SHORT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "got a wrong answer" in done.stdout


def test_a_deadlock_is_reported_with_all_stacks_and_does_not_hang() -> None:
    done = run("-c", SABOTAGE.format(speaks="__import__('threading').Event().wait()"), *SHORT, "--watchdog", "1.5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a deadlock" in done.stdout
    assert "holder" in done.stdout
    assert "in speak" in done.stderr


class GivenUpLoad(threading.Thread):
    """Load that discards its engine once something waits for the end of the thread."""

    def __init__(self, card: FaultyCard) -> None:
        super().__init__(name="gpu-loading-tts", daemon=True)
        self.card, self.awaited = card, threading.Event()

    def run(self) -> None:
        self.awaited.wait()
        self.card.refund(1000)

    def join(self, timeout: float | None = None) -> None:
        self.awaited.set()
        super().join(timeout)


@pytest.mark.parametrize("given_up", [True, False])
def test_bytes_of_a_released_model_are_a_leak_only_once_no_load_runs(tmp_path: Path, given_up: bool) -> None:
    soak = Soak(argparse.Namespace(requests=1, threads=1, seed=0, faults=0.0, watchdog=30.0), tmp_path)
    with soak.manager:
        soak.card.charge(1000)
        if given_up:
            GivenUpLoad(soak.card).start()
        soak._rest()
    leak = "all models are released, and 1000 bytes are on the card"
    assert soak.books.wrong == ([] if given_up else [leak])


def test_lost_doubled_and_crossed_requests_are_noticed() -> None:
    books = Books(4)
    for number in (0, 1, 1):
        books.ran(number)
        books.end(Plan(number, "tts"), None, 0.0)
    books.end(Plan(2, "tts"), None, 0.0)
    found = "\n".join(books.problems())
    assert "1 requests were lost, the first is 3" in found
    assert "1 requests ended more than once, the first is 1" in found
    assert "request 2 (answered right) was in an engine 0 times" in found
    assert "request 0" not in found


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (Plan(0, "tts"), RequestTimeout("tts", 1.0, 1, "loading")),
        (Plan(0, "tts", timeout_s=1.0), RequestTimeout("asr", 1.0, 1, "loading")),
        (Plan(0, "tts"), RequestCancelled("tts")),
        (Plan(0, "tts", breaks=True), EngineBroke(7)),
        (Plan(0, "tts"), LoaderBroke("asr")),
        (Plan(0, "tts"), ManagerClosed()),
        (Plan(0, "tts"), KeyError("what")),
    ],
)
def test_an_error_that_belongs_to_another_request_is_noticed(plan: Plan, error: Exception) -> None:
    books = Books(1)
    books.end(plan, error, 0.0)
    assert "not its own" in books.problems()[0]


def test_an_error_of_its_own_is_an_end() -> None:
    books = Books(3)
    books.end(Plan(0, "tts", timeout_s=1.0), RequestTimeout("tts", 1.0, 1, "loading"), 1.0)
    books.end(Plan(1, "tts"), DeviceOutOfMemory(2, 1, "card"), 1.0)
    books.ran(2)
    books.end(Plan(2, "tts", breaks=True), EngineBroke(2), 1.0)
    assert books.problems() == []


def test_a_model_that_got_away_after_a_promise_to_cancel_is_noticed() -> None:
    books = Books(1)
    books.ran(0)
    books.end(Plan(0, "tts", cancel_after_s=0.0), None, 0.0)
    books.promised_cancels[0] = 1
    assert "after cancel() had said True" in books.problems()[0]


def test_one_outlier_is_no_slope() -> None:
    assert slope([(0, 5), (1, 5), (2, 99), (3, 5), (4, 5)]) == 0
    assert slope([(0, 0), (1, 2), (2, 4)]) == 2
