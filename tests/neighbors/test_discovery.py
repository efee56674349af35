"""Finding servers by the processes that use the card: real processes with real ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from residency.neighbors import Held, discovery, find, neighbor
from residency.neighbors.llama_swap import LlamaSwap

SERVER = """
import http.server, json, socket, subprocess, sys

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in HOST else socket.AF_INET

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/api/ps" and ANSWERS
        body = json.dumps({"models": [{"name": "tiny", "size_vram": 5}]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = Server((HOST, 0), Handler)
# Two that compute, and end with us.
runners = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
print(server.server_port, *(runner.pid for runner in runners), flush=True)
server.serve_forever()
"""


@contextmanager
def running(path: Path, answers: bool = True, host: str = "0.0.0.0") -> Iterator[tuple[int, int, int, int]]:
    """Yields the pid of a server, its port, and the pids of its two children."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(SERVER.replace("ANSWERS", str(answers)).replace("HOST", repr(host)))
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, first, second = map(int, process.stdout.readline().split())
        try:
            yield process.pid, port, first, second
        finally:
            process.kill()


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[tuple[int, int, int, int]]:
    with running(tmp_path / "ollama" / "serve.py") as found:
        yield found


def test_a_server_is_found_by_the_port_of_a_process_or_its_parent(ollama: tuple[int, int, int, int]) -> None:
    pid, port, runner, _ = ollama
    found = find([runner, pid, runner], own_pids=())
    server = neighbor("ollama", f"http://127.0.0.1:{port}")
    assert found == [(runner, server), (pid, server)]
    assert found[0][1].held() == Held(False, 5, ("tiny",))


@pytest.mark.parametrize(("host", "reached"), [("127.0.0.1", "127.0.0.1"), ("::", "localhost")])
def test_a_server_is_asked_at_the_address_on_which_it_listens(tmp_path: Path, host: str, reached: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    with running(tmp_path / "ollama" / "serve.py", host=host) as (pid, port, *_):
        assert find([pid], own_pids=()) == [(pid, neighbor("ollama", f"http://{reached}:{port}"))]


def test_own_processes_and_their_children_are_left_out(ollama: tuple[int, int, int, int]) -> None:
    pid, _, runner, _ = ollama
    assert find([pid, runner], own_pids=[pid]) == []
    assert find([pid, runner], own_pids=[os.getpid()]) == []


def test_a_server_that_has_started_an_own_process_is_left_out(ollama: tuple[int, int, int, int]) -> None:
    """As llama-swap, which ends all that it has started."""
    pid, _, runner, own = ollama
    assert find([pid, runner], own_pids=[own]) == []
    assert find([pid, runner], own_pids=[]) != []


def test_a_command_line_of_no_known_kind_gets_no_request(tmp_path: Path) -> None:
    with running(tmp_path / "other" / "serve.py") as (pid, _, runner, _):
        assert find([pid, runner], own_pids=()) == []


def test_a_server_that_answers_otherwise_is_not_taken_for_the_kind(tmp_path: Path) -> None:
    with running(tmp_path / "ollama" / "serve.py", answers=False) as (pid, _, runner, _):
        assert find([pid, runner], own_pids=()) == []


def test_processes_that_ended_are_left_out(ollama: tuple[int, int, int, int]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert [pid for pid, _ in find([ended.pid, ollama[0]], own_pids=())] == [ollama[0]]


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", True), ("[::ffff:127.0.0.1]", True), ("192.0.2.1", False)],
)
def test_a_broker_has_started_this_app_only_on_this_machine(
    host: str, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_parents", lambda _: [psutil.Process()])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://{host}:{listening.getsockname()[1]}"
        assert discovery.started_us(url, LlamaSwap.command) is is_here


@pytest.mark.parametrize(("command", "may_have"), [("/opt/llama-swap --config c.yaml", True), ("/sbin/init", False)])
def test_a_broker_of_another_user_may_have_started_this_app(
    command: str, may_have: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parent:
        def net_connections(self, kind: str) -> None:
            raise psutil.AccessDenied

        def cmdline(self) -> list[str]:
            return command.split()

    monkeypatch.setattr(discovery, "_parents", lambda _: [Parent()])
    assert discovery.started_us("http://127.0.0.1:8080", LlamaSwap.command) is may_have
