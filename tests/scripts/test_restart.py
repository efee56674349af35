"""A restart that fails: the app that ran is back, or it is said that nothing serves. Either way the script fails."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import wait_until
from script_project import Project, Service, app_line, ready_project, runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return ready_project(tmp_path_factory.mktemp("restart"))


@pytest.fixture
def service(shared: Project, tmp_path: Path) -> Iterator[Service]:
    with Service(shared, tmp_path / "run") as service:
        yield service


def test_an_app_that_ends_while_it_starts_is_followed_by_the_one_before(service: Service) -> None:
    first = service.start("--title=a b", "--gpu-idle-timeout", "15m", GPU_CONTROL_TOKEN="a secret")
    code, said = service.call(
        "restart", "--break", "--gpu-keep-warm", "9s", GPU_IDLE_TIMEOUT="1h", GPU_TTS_GPU_KEEP_WARM="7s",
        GPU_CONTROL_TOKEN="another",
    )  # fmt: skip
    assert code == 1
    assert "a mistake on purpose" in said
    assert "The restart has failed" in said
    assert said.rstrip().endswith("with its previous settings")
    assert service.call("status")[0] == 0
    seen = service.seen()
    assert (seen["argv"], seen["cwd"], seen["secrets"]) == (first["argv"], first["cwd"], first["secrets"])
    assert "a mistake on purpose" in Path(f"{service.log}.1").read_text(), "what went wrong can be read later"
    # And what counts for the next restart is what runs.
    service.localize("restart")
    assert service.seen()["argv"] == first["argv"]


def test_an_app_that_does_not_get_ready_is_followed_by_the_one_before(service: Service) -> None:
    first = service.start()
    # As in the field, the next start's code is what is broken.
    code, said = service.call("restart", "--never-ready", READY_TIMEOUT="2")
    assert (code, "not ready after 2 s" in said, "still starting" in said) == (1, True, False), said
    assert service.seen()["argv"] == first["argv"]
    assert service.call("status")[0] == 0


def test_it_is_said_when_the_one_before_does_not_start_either(service: Service) -> None:
    service.start()
    app = service.project.folder / "app.py"
    text = app.read_text()
    app.write_text("raise SystemExit('broken by an update')\n")
    try:
        code, said = service.call("restart")
    finally:
        app.write_text(text)
    assert code == 1
    assert f"nothing runs on port {service.port} now" in said
    assert service.call("status")[0] == 3
    assert "Ready" in service.localize("restart"), "its settings are still known"


def test_a_port_that_was_taken_meanwhile_is_told(service: Service) -> None:
    """Between the end of one app and the start of the next one."""
    service.start("--stubborn")
    restart = service.project.start("restart", **service.environ, STOP_TIMEOUT="20")
    assert restart.stdout
    assert any("Stopping" in line for line in restart.stdout)
    pid = service.pid
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: _takes(other, int(service.port)))
        said = restart.communicate(timeout=60)[0]
    assert restart.returncode == 1
    assert "is in use" in said
    assert f"nothing runs on port {service.port} now" in said


def _takes(server: socket.socket, port: int) -> bool:
    try:
        server.bind(("127.0.0.1", port))
        server.listen()
    except OSError:
        return False
    return True


def test_an_app_that_does_not_end_leaves_no_second_one(service: Service) -> None:
    pid = service.start("--stubborn")["pid"]
    code, said = service.call("restart", STOP_TIMEOUT="1")
    assert (code, f"{pid} still runs after 1 s" in said, "nothing runs" in said) == (1, True, True), said
    assert runs(pid)
    service.localize("stop")


class TestInATerminal:
    def test_one_that_fails_is_followed_by_the_one_before(self, service: Service) -> None:
        first = service.project.start("--serve", "--one", **service.environ)
        assert first.stdout
        assert any("Ready" in line for line in first.stdout)
        restart = service.project.start("restart", "--break", **service.environ)
        assert restart.stdout
        said = []
        for line in restart.stdout:
            said.append(line)
            if "Ready" in line:
                break
        assert first.wait(30) == 0
        assert "a mistake on purpose" in "".join(said)
        assert app_line("".join(said[said.index("a mistake on purpose\n") :]))["argv"][2:4] == ["--serve", "--one"]
        assert f"pid {service.pid}" in service.localize("status")
        service.localize("stop")
        rest = restart.communicate(timeout=30)[0]
        assert (restart.returncode, "The restart has failed" in rest) == (1, True), rest

    def test_signals_reach_the_app(self, service: Service) -> None:
        first = service.project.start("--serve", **service.environ)
        assert first.stdout
        assert any("Ready" in line for line in first.stdout)
        restart = service.project.start("restart", **service.environ)
        assert restart.stdout
        assert any("Ready" in line for line in restart.stdout)
        first.communicate()
        pid = service.pid
        restart.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM" in restart.communicate(timeout=30)[0]
        assert restart.returncode == 0
        assert not runs(pid)
