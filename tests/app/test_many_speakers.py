"""Many clients of the speech API at once, and many that leave: small versions of ``benchmarks/speech_api.py``."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from app_process import ForkedApp, RunningApp, wait_until
from gated_engine import close_gate, open_gate
from raw_http import Answer, ask

#: Threads end as soon as they have no work, instead of 10 s later.
_NO_IDLE_THREADS = """
from anyio._backends import _asyncio
_asyncio.WorkerThread.MAX_IDLE_TIME = 0
"""
BODY = json.dumps({"input": "Good morning. How are you today?", "voice": "high", "response_format": "wav"}).encode()
REQUEST = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
CLIENTS, DROPS = 16, 50


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB")
    with ForkedApp(tmp_path_factory.mktemp("tmp"), *arguments, gates=gates, prelude=_NO_IDLE_THREADS) as app:
        assert speak(app).status == 200
        yield app


def speak(app: RunningApp) -> Answer:
    return ask(app.port, "/v1/audio/speech", method="POST", body=BODY, version="1.0")  # not in chunks


def under_way(app: RunningApp) -> int:
    model = app.model()
    return int(model["leases"] + model["waiting"])


def threads(app: RunningApp) -> int:
    app.forget_log()
    under_way(app)
    return app.threads().count("AnyIO worker thread")


def held(app: RunningApp) -> tuple[int, list[Path]]:
    """Returns the number of descriptors, and files, once at most two threads for requests are left, which may idle."""
    assert wait_until(lambda: threads(app) <= 2)
    files = [path for path in app.tmp_dir.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return psutil.Process(app.process.pid).num_fds(), files


def drop(connection: socket.socket) -> None:
    """Closes a connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_none_of_many_clients_at_once_is_lost(app: RunningApp, gates: Path) -> None:
    alone = speak(app).text
    close_gate(gates, "speak")
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(speak, app) for _ in range(CLIENTS)]
        assert wait_until(lambda: under_way(app) == CLIENTS)
        open_gate(gates, "speak")
        assert [(answer.result().status, answer.result().text) for answer in answers] == [(200, alone)] * CLIENTS


def test_dropped_connections_leave_nothing(app: RunningApp, gates: Path) -> None:
    before = held(app)
    header = REQUEST.index(b"\r\n\r\n")
    with ExitStack() as until_done:
        connections = [
            until_done.enter_context(socket.create_connection(("127.0.0.1", app.port), timeout=60))
            for _ in range(DROPS)
        ]
        in_header, in_body, in_queue, while_spoken = (connections[kind::4] for kind in range(4))
        close_gate(gates, "speak")
        for connection in connections:
            cut = header // 2 if connection in in_header else -9 if connection in in_body else None
            connection.sendall(REQUEST[:cut])
        assert wait_until(lambda: under_way(app) == len(in_queue + while_spoken))
        for connection in in_header + in_body + in_queue:
            drop(connection)
        assert wait_until(lambda: under_way(app) <= len(while_spoken) + 1), "one of them may be at the gate"
        open_gate(gates, "speak")
        for connection in while_spoken:
            assert connection.recv(1)
            drop(connection)
    assert wait_until(lambda: under_way(app) == 0)
    assert wait_until(lambda: held(app) == before), (held(app), before)
    assert speak(app).status == 200
