"""A neighbour that sleeps and wakes up: vLLM's calls, with memory of a simulated card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

from local_server import serving

from gpu_manager import SimulatedDevice


class Vllm:
    """A server with vLLM's calls for sleep, which holds memory of a card while it is awake.

    ``is_asked``: a request to sleep has arrived, and is answered once ``may_sleep``. ``fails``: to sleep and wake up.
    """

    pids = itertools.count(900_000_000)

    def __init__(self, device: SimulatedDevice, nbytes: int) -> None:
        self.device, self.nbytes, self.pid = device, nbytes, next(self.pids)
        self.running, self.asleep, self.calls, self.url = 0, False, list[str](), ""
        self.woken, self.is_asked, self.may_sleep, self.fails = Event(), Event(), Event(), False
        self.may_sleep.set()
        device.report_outside(self.pid, nbytes)

    def answer(self, path: str) -> str:
        if path == "/is_sleeping":
            return json.dumps({"is_sleeping": self.asleep})
        if path == "/metrics":
            return f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
        self.calls.append(path)
        if path == "/sleep":
            self.is_asked.set()
            self.may_sleep.wait(60)
        self.asleep = path == "/sleep"
        self.device.report_outside(self.pid, 0 if self.asleep else self.nbytes)
        if not self.asleep:
            self.woken.set()
        return ""


@contextmanager
def vllm(device: SimulatedDevice, nbytes: int) -> Iterator[Vllm]:
    server = Vllm(device, nbytes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fails = server.fails and self.command == "POST"
            answer = b"broken" if fails else server.answer(self.path.partition("?")[0]).encode()
            self.send_response(500 if fails else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    with serving(listening):
        yield server
