"""Loads an app with few descriptors with hostile connections, and measures the response times of other clients.

    python benchmarks/siege.py

Uses a real app, limited to 64 descriptors, on a simulated card. Each round repeats one kind of load as fast as
possible, while another client polls ``/healthz``: connections without data, with half a header, or half a body; floods
of made-up sessions; and clients of ``/gpu/events`` that do not read while models move. Memory is the growth of private
memory, 2 s after the end of the round and of all connections. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import psutil
from app_process import RunningApp

MOST_S, MOST_MB, MOST_LOG_BYTES = 1.0, 64, 100_000
_BOUNDED = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))\n"
_ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
_POST = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"


@dataclass
class Round:
    """Result of one kind of load; ``done``: number of repetitions; times in seconds."""

    name: str
    done: int
    descriptors: int
    grown_mb: float
    log_bytes: int
    looks: int
    failed: int
    slowest_s: float

    @property
    def held(self) -> bool:
        return (
            not self.failed
            and self.slowest_s <= MOST_S
            and self.grown_mb <= MOST_MB
            and self.log_bytes <= MOST_LOG_BYTES
        )


class Besieger:
    """Client for the functions of `SIEGES`, which are called repeatedly, with a number."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []

    def connect(self, sent: bytes) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        connection.sendall(sent)
        self._open.append(connection)
        if len(self._open) > 500:
            self._open.pop(0).close()

    def ask(self, path: str, body: bytes | None = None) -> None:
        request = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        with suppress(http.client.HTTPException):
            request.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
            request.getresponse().read(100)
        request.close()

    def leave(self) -> None:
        for connection in self._open:
            connection.close()


SIEGES: dict[str, Callable[[Besieger, int], None]] = {
    "connections that send nothing": lambda one, number: one.connect(b""),
    "half a header": lambda one, number: one.connect(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-"),
    "half a body": lambda one, number: one.connect(_POST),
    "what is no HTTP": lambda one, number: one.connect(b"\0\r\n\r\n"),
    "here/NAME": lambda one, number: one.ask(f"/gradio_api/here/{number}"),
    "here/NAME of 50 KB": lambda one, number: one.ask(f"/gradio_api/here/{number}{'x' * 50_000}"),
    "heartbeat/NAME": lambda one, number: one.connect(
        f"GET /gradio_api/heartbeat/{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    ),
    "call/gpu_status as NAME": lambda one, number: one.ask(
        "/gradio_api/call/gpu_status", b'{"session_hash": "s%d", "data": []}' % number
    ),
    "/gpu/events": lambda one, number: one.connect(b"GET /gpu/events HTTP/1.1\r\nHost: localhost\r\n\r\n"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each siege (10)")
    parser.add_argument("--descriptors", type=int, default=64, help="that the app may have (64)")
    parser.add_argument("--only", choices=SIEGES, nargs="*", default=list(SIEGES), help="these sieges")
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, {options.descriptors} descriptors, {options.seconds:g} s each",
        flush=True,
    )
    print(
        f"\n{'':32}{'done':>8}{'descriptors':>13}{'+MB':>8}{'log bytes':>12}{'looks':>8}{'failed':>8}{'slowest s':>11}"
    )
    rounds = []
    for name in options.only:
        with (
            tempfile.TemporaryDirectory() as home,
            RunningApp(Path(home), *_ARGUMENTS, prelude=_BOUNDED.format(options.descriptors)) as app,
        ):
            rounds.append(one := besiege(app, name, options.seconds))
        print(
            f"{one.name:32}{one.done:8,}{one.descriptors:13}{one.grown_mb:8.1f}{one.log_bytes:12,}{one.looks:8,}"
            f"{one.failed:8}{one.slowest_s:11.3f}",
            flush=True,
        )
    sys.exit(0 if all(_judge(rounds, options.descriptors)) else 1)


def _judge(rounds: list[Round], descriptors: int) -> list[bool]:
    goals = [
        ("slowest /healthz", max(each.slowest_s for each in rounds), MOST_S, "s"),
        ("/healthz that failed", sum(each.failed for each in rounds), 0, ""),
        ("most memory", max(each.grown_mb for each in rounds), MOST_MB, "MB"),
        ("most that was logged", max(each.log_bytes for each in rounds), MOST_LOG_BYTES, "bytes"),
        ("most descriptors", max(each.descriptors for each in rounds), descriptors - 1, ""),
    ]
    print(f"\nmust reach\n{'':32}{'reached':>16}{'wanted':>18}")
    for name, value, wanted, unit in goals:
        reached = f"{value:,.3f} {unit}" if unit == "s" else f"{value:,.0f} {unit}"
        print(f"{name:32}{reached:>16}{f'<= {wanted:,g} {unit}':>18}  {'yes' if value <= wanted else 'no'}")
    return [value <= wanted for _, value, wanted, _ in goals]


def besiege(app: RunningApp, name: str, seconds: float) -> Round:
    """Runs one kind of load against a fresh app in one thread, while others measure."""
    process, besieger = psutil.Process(app.process.pid), Besieger(app.port)
    app.get("/healthz")
    moves = name == "/gpu/events"
    if moves:
        come_and_go(app)  # excludes memory of a first load
    before, log_before = process.memory_full_info().uss, len(app.log)
    over = threading.Event()
    times_s: list[float | None] = []
    most: list[int] = []
    watchers = [
        threading.Thread(target=_look, args=(app.port, over, times_s)),
        threading.Thread(target=_count, args=(process, over, most)),
    ]
    if moves:
        watchers.append(threading.Thread(target=_move, args=(app, over)))
    for each in watchers:
        each.start()
    done, until_s = 0, time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        with suppress(OSError):  # the limit of descriptors
            SIEGES[name](besieger, done)
        done += 1
    over.set()
    for each in watchers:
        each.join()
    besieger.leave()
    if moves:
        come_and_go(app)
    time.sleep(2)
    grown = process.memory_full_info().uss - before
    seen_s = [each for each in times_s if each is not None]
    return Round(
        name, done, max(most), grown / (1 << 20), len(app.log.encode()) - log_before, len(times_s),
        len(times_s) - len(seen_s), max(seen_s, default=float("inf")),
    )  # fmt: skip


def come_and_go(app: RunningApp) -> None:
    """Loads and releases the model."""
    for call, state in (("/gpu/warm", "gpu"), ("/gpu/release", "released")):
        app.post(call, {})
        while app.model()["state"] != state:
            time.sleep(0.05)


def _look(port: int, over: threading.Event, times_s: list[float | None]) -> None:
    """Polls its health on new connections, as monitors do; appends None for a failure."""
    while not over.wait(0.05):
        began_s = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/healthz")
            ok = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            ok = False
        connection.close()
        times_s.append(time.perf_counter() - began_s if ok else None)


def _count(process: psutil.Process, over: threading.Event, most: list[int]) -> None:
    while not over.is_set():
        most.append(process.num_fds())
        over.wait(0.2)


def _move(app: RunningApp, over: threading.Event) -> None:
    """Loads and releases a model repeatedly, to cause events."""
    while not over.wait(0.1):
        for call in ("/gpu/warm", "/gpu/release"):
            with suppress(OSError, http.client.HTTPException):
                app.post(call, {})


if __name__ == "__main__":
    main()
