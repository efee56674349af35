"""Measures the speech API of a running app: first bytes, many clients, slow ones, and connections that are dropped.

    python benchmarks/speech_api.py

The first bytes are those of the built-in engine, on a simulated card: a text of ten sentences and its first sentence
alone, alternately, with the model loaded. All else uses an engine that computes nothing and takes 20 ms for half a
second of sound. Slow clients read at a fixed rate with a small receive buffer, below and above the app's limit, while
another client is served. Connections are dropped at random moments: in the header, in the body, in the queue, while the
app speaks, and while the client reads a byte at a time; they send a text, a text with `ref_audio`, or a form with a
recording. The growth of memory is the slope of a line through the rounds after a fifth of them. Exits with 1 if a goal
is missed.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import http.client
import json
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import psutil
from app_process import RunningApp, wait_until

MOST_RATIO, MOST_DELAY, MOST_MB_PER_ROUND = 1.3, 1.5, 0.2
SENTENCES = (
    "Good morning, and welcome to the weather report.",
    "It will be cloudy in the north, with a little rain.",
    "The south can expect some sun in the afternoon.",
    "Temperatures will reach eighteen degrees at the coast.",
    "In the mountains it will be much colder than that.",
    "The wind comes from the west, and is rather weak.",
    "Tonight the sky will be clear almost everywhere.",
    "Tomorrow will bring more clouds from the sea.",
    "Towards the weekend it will become warmer again.",
    "That was the weather, and now we have some music.",
)
ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-keep-warm", "3600", "--max-requests", "100")
#: Replaces the engine's answers, and starts all threads of the event loop's pool at its first use: it only grows.
_QUICK = """
import asyncio, os, threading, time, torch
from residency.cancellation import checkpoint
def clone(self, *arguments):
    for _ in range(4):
        checkpoint()
        time.sleep(0.005)
    return torch.full((1, 2_400_000 if "long time" in "".join(arguments[2:]) else 12_000), 0.25), 24_000
gated_engine.BuiltinEngine.clone = clone
def run(self, executor, *arguments, run=asyncio.BaseEventLoop.run_in_executor):
    if executor is None and self._default_executor is None:
        all_started = threading.Barrier(min(32, os.cpu_count() + 4))
        for _ in range(all_started.parties):
            run(self, None, all_started.wait)
    return run(self, executor, *arguments)
asyncio.BaseEventLoop.run_in_executor = run
from residency.web.speech.recordings import Recordings
def note(self, reserved_bytes):
    self.__dict__["reserved_bytes"] = reserved_bytes
    (gated_engine.FOLDER / "reserved").write_text(f"{reserved_bytes:.0f}")
Recordings._reserved_bytes = property(lambda self: self.__dict__["reserved_bytes"], note)
"""
LONG = "Please speak this for a long time."
"""A text of 100 s: its 4.8 MB are more than the system takes for a client that does not read."""
LEAST, RATES = 500, (800, 1600, 3200, 1, 20, 300)
"""Bytes per second that a client has to read, and those that the slow ones read. The system counts what a client has
read in pieces of its receive buffer, so that one of 600 may seem slower than it is."""
SLOW_FOR_S, OTHERS = 75, 60
CLIENTS = 64
KINDS = ("a text", "a text with ref_audio", "a form")
RECORDING = (Path(__file__).parent.parent / "residency/web/static/samples/low.flac").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=9, help="how many times the first bytes are measured (9)")
    add("--rounds", type=int, default=50, help=f"of {CLIENTS} clients at once (50)")
    add("--drops", type=int, default=1000, help="connections that are dropped (1000)")
    add("--seed", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, seed {options.seed}\n",
        flush=True,
    )
    goals: list[tuple[str, float, float, str]] = []
    with tempfile.TemporaryDirectory() as home, RunningApp(Path(home, "tmp"), *ARGUMENTS) as app:
        goals += measure_first_bytes(app, options.pairs)
    with tempfile.TemporaryDirectory() as home:
        gates = Path(home, "gates")
        gates.mkdir()
        with RunningApp(Path(home, "tmp"), *ARGUMENTS, gates=gates, prelude=_QUICK) as app:
            goals += measure_crowd(app, options.rounds)
            goals += measure_beside_slow_clients(app, gates / "reserved")
            goals += measure_drops(app, options.drops, random.Random(options.seed))
            goals += [("exit status after SIGTERM", app.stop(), 0, "")]
    print(f"\nmust reach\n{'':48}{'reached':>12}{'wanted':>14}")
    for name, value, wanted, unit in goals:
        reached, limit = f"{value:,.3g} {unit}".strip(), f"<= {wanted:,g} {unit}".strip()
        print(f"{name:48}{reached:>12}{limit:>14}  {'yes' if value <= wanted else 'no'}")
    sys.exit(0 if all(value <= wanted for _, value, wanted, _ in goals) else 1)


def request(text: str, form: str = "wav", **fields: str) -> bytes:
    body = json.dumps({"input": text, "voice": "high", "response_format": form, **fields}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def edit_request(form: str) -> bytes:
    """Returns a form with a recording."""
    fields = {"text": "Hello.", "task": "vad", "response_format": form}
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts += [b'name="file"; filename="a.flac"\r\n\r\n' + RECORDING]
    body = b"".join(b"--x\r\nContent-Disposition: form-data; %s\r\n" % part for part in parts) + b"--x--\r\n"
    head = "POST /v1/audio/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def speak(app: RunningApp, text: str, *, only_first: bool = False) -> tuple[float, bytes]:
    """Returns the seconds until the end of the answer, or its first byte, and the bytes, none if it failed."""
    began_s = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=300)
    try:
        connection.request("POST", "/v1/audio/speech", request(text).partition(b"\r\n\r\n")[2])
        answer = connection.getresponse()
        data = answer.read(1 if only_first else None)
        return time.perf_counter() - began_s, data if answer.status == 200 else b""
    except (OSError, http.client.HTTPException):
        return time.perf_counter() - began_s, b""
    finally:
        connection.close()


def is_quiet(app: RunningApp) -> bool:
    model = app.model()
    return not model["leases"] and not model["waiting"]


def measure_first_bytes(app: RunningApp, pairs: int) -> list[tuple[str, float, float, str]]:
    speak(app, SENTENCES[0])
    alone_s, first_s = [], []
    for _ in range(pairs):
        alone_s.append(speak(app, SENTENCES[0])[0])
        first_s.append(speak(app, " ".join(SENTENCES), only_first=True)[0])
        wait_until(lambda: is_quiet(app))
    print(f"{'built-in engine':48}{'median s':>12}{'most s':>12}")
    print(f"{'a sentence, whole':48}{statistics.median(alone_s):12.3f}{max(alone_s):12.3f}")
    print(f"{'ten sentences, first byte':48}{statistics.median(first_s):12.3f}{max(first_s):12.3f}", flush=True)
    ratio = statistics.median(first_s) / statistics.median(alone_s)
    return [("first byte of ten sentences / one sentence", ratio, MOST_RATIO, "")]


def measure_crowd(app: RunningApp, rounds: int) -> list[tuple[str, float, float, str]]:
    """Lets all clients speak at once, repeatedly."""
    process = psutil.Process(app.process.pid)
    text = " ".join(SENTENCES[:3])
    speak(app, SENTENCES[0])
    whole = speak(app, text)[1]
    lost, rss = 0, []
    print(f"\n{f'{CLIENTS} clients at once':48}{'seconds':>12}{'lost':>12}{'RSS MB':>12}")
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(rounds):
            began_s = time.perf_counter()
            lost += sum(pool.map(lambda _: speak(app, text)[1] != whole, range(CLIENTS)))
            rss.append(process.memory_info().rss / 1e6)
            seconds = time.perf_counter() - began_s
            if number % 5 == 0 or number == rounds - 1:
                print(f"{f'round {number + 1}':48}{seconds:12.1f}{lost:12}{rss[-1]:12.1f}", flush=True)
    warm = rss[rounds // 5 :]
    slope = statistics.linear_regression(range(len(warm)), warm).slope
    return [("lost or different answers", lost, 0, ""), ("growth of memory per round", slope, MOST_MB_PER_ROUND, "MB")]


def measure_beside_slow_clients(app: RunningApp, reserved: Path) -> list[tuple[str, float, float, str]]:
    """Compares requests without and beside clients that read slowly for so long that the app could end them twice.

    ``reserved``: the file with the bytes of ``--max-disk`` that are reserved for audio that is not sent yet.
    """
    process = psutil.Process(app.process.pid)
    whole = speak(app, LONG)[1]
    assert whole

    def counted() -> tuple[int, ...]:
        return process.num_threads(), process.num_fds(), int(reserved.read_text())

    before = _settled(app, counted)
    alone_s = [speak(app, SENTENCES[0])[0] for _ in range(OTHERS)]
    over, connections = threading.Event(), [_slow_connection(app.port) for _ in RATES]
    with ThreadPoolExecutor(len(RATES)) as pool:
        readers = [pool.submit(_read, *each, over) for each in zip(connections, RATES, strict=True)]
        began_s = time.monotonic()
        wait_until(lambda: is_quiet(app))
        during, beside_s = counted(), list[float]()
        lasted_s = dict.fromkeys([connection.getsockname()[1] for connection in connections], 0.0)
        for number in range(OTHERS):
            time.sleep(max(0, began_s + SLOW_FOR_S - time.monotonic()) / (OTHERS - number))
            beside_s.append(speak(app, SENTENCES[0])[0])
            for peer in (each.raddr for each in process.net_connections() if each.raddr):
                if peer.port in lasted_s:
                    lasted_s[peer.port] = time.monotonic() - began_s
        over.set()
        complete = [reader.result() == whole for reader in readers]
    after, model = _settled(app, counted), app.model()
    ended = [max(lasted_s.values()) - each > 5 for each in lasted_s.values()]
    print(f"\n{f'clients that read for {SLOW_FOR_S} s, then all else':48}{'all bytes':>12}{'ended after s':>16}")
    for rate, got_all, is_ended, each_s in zip(RATES, complete, ended, lasted_s.values(), strict=True):
        print(
            f"{f'{rate} bytes per second':48}{'yes' if got_all else 'no':>12}{f'{each_s:.0f}' if is_ended else '-':>16}"
        )
    print(f"\n{'a sentence':48}{'median s':>12}{'most s':>12}")
    for name, times_s in (("alone", alone_s), (f"beside {len(RATES)} clients that read slowly", beside_s)):
        print(f"{name:48}{statistics.median(times_s):12.3f}{max(times_s):12.3f}")
    for name, counts in (("before", before), ("during", during), ("after", after)):
        print(f"{f'threads, descriptors, reserved bytes {name}':48}{', '.join(map(str, counts)):>24}", flush=True)
    found = list(zip(RATES, complete, ended, strict=True))
    ratio = statistics.median(beside_s) / statistics.median(alone_s)
    return [
        ("a sentence beside slow clients / alone", ratio, MOST_DELAY, ""),
        ("clients above the limit without all bytes", sum(not all_ for rate, all_, _ in found if rate > LEAST), 0, ""),
        ("clients below the limit, not cut off", sum(not cut for rate, _, cut in found if rate < LEAST), 0, ""),
        ("clients below the limit with all bytes", sum(all_ for rate, all_, _ in found if rate < LEAST), 0, ""),
        ("reserved bytes for slow clients are missing", during[2] <= before[2], 0, ""),
        ("leases and waiting requests that they left", model["leases"] + model["waiting"], 0, ""),
        ("threads that they left", max(0, after[0] - before[0]), 0, ""),
        ("descriptors that they left", max(0, after[1] - before[1]), 0, ""),
        ("reserved bytes that they left", after[2] - before[2], 0, ""),
    ]


def _slow_connection(port: int) -> socket.socket:
    """Sends a request for a long text, with a small receive buffer, and waits for the beginning of the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before the connection has a window
    connection.connect(("127.0.0.1", port))
    connection.sendall(request(LONG).replace(b"HTTP/1.1", b"HTTP/1.0"))  # its body ends with the connection
    connection.recv(1, socket.MSG_PEEK)
    return connection


def _read(connection: socket.socket, bytes_per_s: int, over: threading.Event) -> bytes:
    """Reads at this rate until ``over``, then all else; returns the audio."""
    every_s = max(0.25, 1 / bytes_per_s)
    read, began_s = b"", time.monotonic()
    with connection, suppress(ConnectionError):
        while not over.wait(max(0, began_s + len(read) / bytes_per_s - time.monotonic())):
            if not (piece := connection.recv(round(bytes_per_s * every_s))):
                break
            read += piece
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while piece := connection.recv(1 << 16):
            read += piece
    return read.partition(b"\r\n\r\n")[2]


def measure_drops(app: RunningApp, drops: int, rng: random.Random) -> list[tuple[str, float, float, str]]:
    """Drops connections, 20 at a time, and counts what is left of them."""
    process = psutil.Process(app.process.pid)

    def counted() -> tuple[int, ...]:
        files = [path for path in app.tmp_dir.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return process.num_threads(), process.num_fds(), len(files)

    before = _settled(app, counted)
    log_before = len(app.log)
    seen: Counter[str] = Counter()
    with ThreadPoolExecutor(20) as pool:
        for kind, moment in pool.map(
            lambda seed: _drop(app.port, random.Random(seed)), rng.sample(range(1 << 30), drops)
        ):
            seen.update([kind, moment])
    after, model = _settled(app, counted), app.model()
    print(f"\n{f'{drops} dropped connections':48}{'number':>12}")
    for moment, number in sorted(seen.items()):
        print(f"{moment:48}{number:12}")
    print(f"{'threads, descriptors, files before':48}{', '.join(map(str, before)):>12}")
    print(f"{'threads, descriptors, files after':48}{', '.join(map(str, after)):>12}", flush=True)
    errors = app.log[log_before:].count("Traceback")
    return [
        ("leases and waiting requests that are left", model["leases"] + model["waiting"], 0, ""),
        ("threads that are left", max(0, after[0] - before[0]), 0, ""),
        ("descriptors that are left", max(0, after[1] - before[1]), 0, ""),
        ("files that are left", after[2] - before[2], 0, ""),
        ("errors in the log", errors, 0, ""),
        ("a request afterwards fails", not speak(app, SENTENCES[0])[1], 0, ""),
    ]


def _settled(app: RunningApp, counted: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Counts when nothing runs. A request lets the threads end that had no work for 10 s."""
    wait_until(lambda: is_quiet(app))
    for _ in range(2):
        time.sleep(11)
        speak(app, SENTENCES[0])
    time.sleep(1)  # the file of the last answer is closed
    return counted()


def _drop(port: int, rng: random.Random) -> tuple[str, str]:
    """Connects and leaves at a random moment; returns the kind of the request and the moment."""
    moment = rng.choice(
        ["in the header", "in the body", "in the queue", "while the app speaks", "while reading slowly"]
    )
    form, kind = rng.choice(["wav", "mp3", "opus", "flac", "aac", "pcm"]), rng.choice(KINDS)
    if kind == "a form":
        sent = edit_request(form)
    else:
        recording = {"ref_audio": base64.b64encode(RECORDING).decode(), "ref_text": "Hello."}
        sent = request(" ".join(SENTENCES), form, **(recording if kind == "a text with ref_audio" else {}))
    head = sent.index(b"\r\n\r\n") + 4
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        if moment == "in the header":
            connection.sendall(sent[: rng.randrange(head)])
        elif moment == "in the body":
            connection.sendall(sent[: rng.randrange(head, len(sent))])
        else:
            connection.sendall(sent)
        if moment == "in the queue":
            time.sleep(rng.random() / 5)
        elif moment == "while the app speaks":
            connection.recv(rng.randrange(1, 20_000))
        elif moment == "while reading slowly":
            for _ in range(rng.randrange(1, 50)):
                connection.recv(1)
                time.sleep(0.02)
        if rng.random() < 0.5:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return kind, moment


if __name__ == "__main__":
    main()
