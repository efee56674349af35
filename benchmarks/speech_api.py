"""Measures the speech API of a running app: first bytes, many clients, slow ones, and connections that are dropped.

    python benchmarks/speech_api.py

The first bytes are those of the built-in engine, on a simulated card: a text of ten sentences and its first sentence
alone, alternately, with the model loaded. All else uses an engine that computes nothing and takes 20 ms for half a
second of sound. Connections are dropped at random moments: in the header, in the body, in the queue, while the app
speaks, and while the client reads a byte at a time. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import psutil
from app_process import RunningApp, wait_until

MOST_RATIO, MOST_DELAY, MOST_MB = 1.3, 1.5, 16
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
#: Replaces the engine's answers.
_QUICK = """
import time, torch
from residency.cancellation import checkpoint
def clone(self, recording, text, sentence):
    for _ in range(4):
        checkpoint()
        time.sleep(0.005)
    return torch.full((1, 12_000), 0.25), 24_000
gated_engine.BuiltinEngine.clone = clone
"""
CLIENTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=9, help="how many times the first bytes are measured (9)")
    add("--rounds", type=int, default=8, help=f"of {CLIENTS} clients at once (8)")
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
            goals += measure_beside_slow_client(app)
            goals += measure_drops(app, options.drops, random.Random(options.seed))
            goals += [("exit status after SIGTERM", app.stop(), 0, "")]
    print(f"\nmust reach\n{'':48}{'reached':>12}{'wanted':>14}")
    for name, value, wanted, unit in goals:
        reached, limit = f"{value:,.3g} {unit}".strip(), f"<= {wanted:,g} {unit}".strip()
        print(f"{name:48}{reached:>12}{limit:>14}  {'yes' if value <= wanted else 'no'}")
    sys.exit(0 if all(value <= wanted for _, value, wanted, _ in goals) else 1)


def request(text: str, form: str = "wav") -> bytes:
    body = json.dumps({"input": text, "voice": "high", "response_format": form}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def speak(app: RunningApp, text: str, *, only_first: bool = False) -> tuple[float, int]:
    """Returns the seconds until the end of the answer, or its first byte, and the number of bytes, 0 if it failed."""
    began_s = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=300)
    try:
        connection.request("POST", "/v1/audio/speech", request(text).partition(b"\r\n\r\n")[2])
        answer = connection.getresponse()
        data = answer.read(1 if only_first else None)
        return time.perf_counter() - began_s, len(data) if answer.status == 200 else 0
    except (OSError, http.client.HTTPException):
        return time.perf_counter() - began_s, 0
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
    speak(app, SENTENCES[0])
    whole = speak(app, " ".join(SENTENCES))[1]
    lost, rss = 0, []
    print(f"\n{f'{CLIENTS} clients at once':48}{'seconds':>12}{'lost':>12}{'RSS MB':>12}")
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(rounds):
            began_s = time.perf_counter()
            sizes = list(pool.map(lambda _: speak(app, " ".join(SENTENCES))[1], range(CLIENTS)))
            lost += sum(size != whole for size in sizes)
            rss.append(process.memory_info().rss / 1e6)
            seconds = time.perf_counter() - began_s
            print(f"{f'round {number + 1}':48}{seconds:12.1f}{lost:12}{rss[-1]:12.1f}", flush=True)
    grown = rss[-1] - rss[len(rss) // 2]
    return [("lost answers", lost, 0, ""), ("growth of memory in the second half", grown, MOST_MB, "MB")]


def measure_beside_slow_client(app: RunningApp) -> list[tuple[str, float, float, str]]:
    """Compares requests without and beside clients that read a byte per second."""
    times_s: dict[bool, list[float]] = {False: [], True: []}
    for slow in (False, True, False, True):
        over, begun = threading.Event(), threading.Barrier(8 * slow + 1)
        readers = [threading.Thread(target=_read_slowly, args=(app.port, begun, over)) for _ in range(8 * slow)]
        for each in readers:
            each.start()
        begun.wait()
        wait_until(lambda: is_quiet(app))
        times_s[slow] += [speak(app, SENTENCES[0])[0] for _ in range(20)]
        over.set()
        for each in readers:
            each.join()
    print(f"\n{'a sentence':48}{'median s':>12}{'most s':>12}")
    for slow, name in ((False, "alone"), (True, "beside 8 clients that read a byte per second")):
        print(f"{name:48}{statistics.median(times_s[slow]):12.3f}{max(times_s[slow]):12.3f}", flush=True)
    ratio = statistics.median(times_s[True]) / statistics.median(times_s[False])
    return [("a sentence beside slow clients / alone", ratio, MOST_DELAY, "")]


def _read_slowly(port: int, begun: threading.Barrier, over: threading.Event) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(request(" ".join(SENTENCES * 3)))
        connection.recv(1)
        begun.wait()
        while not over.wait(1):
            connection.recv(1)


def measure_drops(app: RunningApp, drops: int, rng: random.Random) -> list[tuple[str, float, float, str]]:
    """Drops connections, 20 at a time, and counts what is left of them."""
    process = psutil.Process(app.process.pid)

    def counted() -> tuple[int, int, int]:
        files = [path for path in app.tmp_dir.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return process.num_threads(), process.num_fds(), len(files)

    before = _settled(app, counted)
    log_before = len(app.log)
    seen: dict[str, int] = {}
    with ThreadPoolExecutor(20) as pool:
        for moment in pool.map(lambda seed: _drop(app.port, random.Random(seed)), rng.sample(range(1 << 30), drops)):
            seen[moment] = seen.get(moment, 0) + 1
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


def _settled(app: RunningApp, counted: Callable[[], tuple[int, int, int]]) -> tuple[int, int, int]:
    """Counts when nothing runs. A request lets the threads end that had no work for 10 s."""
    wait_until(lambda: is_quiet(app))
    for _ in range(2):
        time.sleep(11)
        speak(app, SENTENCES[0])
    return counted()


def _drop(port: int, rng: random.Random) -> str:
    """Connects and leaves at a random moment; returns its name."""
    moment = rng.choice(
        ["in the header", "in the body", "in the queue", "while the app speaks", "while reading slowly"]
    )
    sent = request(" ".join(SENTENCES), rng.choice(["wav", "mp3", "opus", "flac", "aac", "pcm"]))
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
    return moment


if __name__ == "__main__":
    main()
