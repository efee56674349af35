"""What the start script has started, found again from another terminal: stop, status, restart, logs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from app_process import wait_until
from script_project import (
    OTHERS,
    SCRIPT,
    SETTINGS,
    Project,
    Service,
    environment_like_ours,
    free_port,
    ready_project,
    runs,
    write_record,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return ready_project(tmp_path_factory.mktemp("service"))


@pytest.fixture
def service(shared: Project, tmp_path: Path) -> Iterator[Service]:
    with Service(shared, tmp_path / "run, 运行") as service:
        yield service


def test_links_that_others_have_put_into_the_run_dir_are_not_written_through(service: Service, tmp_path: Path) -> None:
    service.run_dir.mkdir()
    target = tmp_path / "precious"
    target.write_text("precious")
    for kind in ("log", "pid", "run", "run.new", "try"):
        (service.run_dir / f"{service.port}.{kind}").symlink_to(target)
    service.start()
    assert target.read_text() == "precious"
    assert not service.log.is_symlink()
    assert service.pid
    service.localize("stop")
    assert target.read_text() == "precious"


def test_from_start_to_stop(service: Service) -> None:
    seen = service.start()
    assert service.pid == seen["pid"], "the file has the app's own pid, for whoever wants to send it a signal"
    assert seen["argv"][2] == "--serve"
    assert f"ASKED status --url http://127.0.0.1:{service.port}" in service.localize("status")
    assert "APP" in service.localize("logs")
    assert "Stopped" in service.localize("stop")
    assert not runs(seen["pid"])
    assert "stopped by SIGTERM" in service.log.read_text()
    assert sorted(file.name for file in service.run_dir.iterdir()) == [f"{service.port}.log"]
    code, output = service.call("status")
    assert (code, "No app of this script" in output) == (3, True)
    assert "No app of this script" in service.localize("stop")


@pytest.mark.parametrize("no_proxy", [{}, {"NO_PROXY": "a.example"}], ids=["none", "another"])
def test_a_proxy_in_the_environment_is_never_asked_for_this_machine(service: Service, no_proxy: dict[str, str]) -> None:
    dead = "http://127.0.0.1:9"
    environ = {"http_proxy": dead, "HTTP_PROXY": dead, "ALL_PROXY": dead, **no_proxy}
    assert "Ready" in service.localize("--detach", "--serve", **environ)
    assert "BY A PROXY ['192.0.2.1']" in service.localize("status", **environ)
    assert service.seen()["proxies"] == {"http_proxy": dead, "HTTP_PROXY": dead, "ALL_PROXY": dead}, "others need them"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_an_app_with_tls_is_ready(service: Service, tmp_path: Path) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=tts.example"
    subprocess.run([*make.split(), "-out", cert, "-keyout", key], capture_output=True, check=True)
    said = service.localize("--detach", "--serve", "--ssl-certfile", cert, "--ssl-keyfile", key, READY_TIMEOUT="60")
    assert f"Ready: https://127.0.0.1:{service.port}" in said
    assert f"ASKED status --url https://127.0.0.1:{service.port}" in service.localize("status")


def test_the_address_log_and_ways_to_stop_are_said(service: Service) -> None:
    output = service.localize("--detach", "--serve")
    assert f"http://127.0.0.1:{service.port}" in output
    assert str(service.log) in output
    line = next(line for line in output.splitlines() if "Stop:" in line).partition("Stop: ")[2]
    assert subprocess.run(["bash", "-c", line], capture_output=True, cwd="/", check=True)
    assert not runs(service.seen()["pid"]), "what is said can be typed anywhere"


def test_it_is_not_started_twice(service: Service) -> None:
    pid = service.start()["pid"]
    code, output = service.call("--detach", "--serve")
    assert code == 1
    assert f"already runs on port {service.port} (pid {pid})" in output
    assert runs(pid)


def test_of_two_starts_at_once_one_wins_and_is_found(service: Service) -> None:
    starts = [service.project.start("--detach", "--serve", **service.environ) for _ in range(2)]
    said = [start.communicate(timeout=60)[0] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 1], said
    assert sum("already runs" in words for words in said) == 1, said
    assert f"pid {service.pid}" in service.localize("status")
    service.localize("stop")


def test_a_restart_remembers_the_start_and_takes_other_settings(service: Service, tmp_path: Path) -> None:
    first = service.start(
        *("--gpu-idle-timeout", "15m", "--title=a b"),
        GPU_KEEP_WARM="30s",
        GPU_TTS_GPU_ISOLATION="process",
        GPU_TTS_GPU_RESIDUE="keep",
        GPU_CONTROL_TOKEN="a secret",
        GRADIO_AUTH="me:x",
    )
    assert "Ready" in service.localize("restart", "--gpu-idle-timeout", "1h", "--more")
    seen = service.seen()
    assert seen["pid"] != first["pid"]
    assert not runs(first["pid"])
    assert seen["cwd"] == first["cwd"]
    assert seen["secrets"] == {"GPU_CONTROL_TOKEN": "a secret", "GRADIO_AUTH": "me:x"}
    assert seen["argv"][2:5] == ["--serve", "--title=a b", "--more"]
    kept = ["--gpu-idle-timeout", "1h", "--gpu-keep-warm", "30s", "--gpu-isolation", "process", "--gpu-residue", "keep"]
    assert seen["argv"][-8:] == kept
    service.localize("restart", GPU_CONTROL_TOKEN="another")
    assert service.seen()["secrets"]["GPU_CONTROL_TOKEN"] == "another"
    assert service.seen()["argv"] == seen["argv"]
    assert Path(f"{service.log}.1").exists(), "the log before the last restart"


def test_a_restart_remembers_the_address_of_the_proxy(service: Service) -> None:
    address = {"GPU_TTS_ROOT_PATH": "/tts", "GRADIO_ROOT_PATH": "/old", "GPU_TTS_ALLOWED_HOSTS": "tts.example.com"}
    service.start(**address)
    service.localize("restart", GPU_TTS_ROOT_PATH="/speech")
    assert service.seen()["address"] == {**address, "GPU_TTS_ROOT_PATH": "/speech"}


def test_a_restart_chooses_the_gpu_anew_unless_it_was_said(service: Service) -> None:
    gpus = 'echo "0, {}, 580.1, NVIDIA A"; echo "1, {}, 580.1, NVIDIA B"'
    service.project.nvidia_smi(gpus.format(100, 200))
    try:
        assert service.start()["cuda"]["CUDA_VISIBLE_DEVICES"] == "1"
        service.project.nvidia_smi(gpus.format(300, 200))
        service.localize("restart")
        assert service.seen()["cuda"]["CUDA_VISIBLE_DEVICES"] == "0"
        service.localize("restart", "--gpu-id", "1")
        assert service.seen()["cuda"]["CUDA_VISIBLE_DEVICES"] == "1"
        service.localize("restart")
        assert service.seen()["cuda"]["CUDA_VISIBLE_DEVICES"] == "1"
    finally:
        (service.project.bin / "nvidia-smi").unlink()


def test_folders_of_a_restart_are_meant_from_where_it_is_called(service: Service, tmp_path: Path) -> None:
    service.start()
    (tmp_path / "checkout").mkdir()
    (tmp_path / "models").mkdir()
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "GPU_ID": "none", "STEP_AUDIO_ROOT": "checkout"}
    done = subprocess.run(
        [service.project.folder / SCRIPT.name, "restart", "--model-path", "models", "--gpu-snapshot-dir=~/snapshots"],
        env=environ | service.environ, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert service.seen()["argv"][-6:] == [
        *("--gpu-snapshot-dir", f"{tmp_path}/snapshots", "--model-path", f"{tmp_path}/models"),
        *("--step-audio-root", f"{tmp_path}/checkout"),
    ]


def test_a_restart_that_cannot_be_leaves_what_runs_alone(service: Service, tmp_path: Path) -> None:
    pid = service.start()["pid"]
    no_environment, new_environment = tmp_path / "diary", tmp_path / "without a disk"
    no_environment.mkdir()
    (no_environment / "today.txt").touch()
    service.project.program("df", 'echo "disk 9 9 0 0% /"')
    service.project.nvidia_smi('echo "0, 100, 580.1, NVIDIA A"')
    for wrong in (
        ["--gpu-idle-timeout", "soon"],
        ["--model-path", "/no/such/model"],
        ["--step-audio-root", "/nowhere"],
        ["--gpu-id", "7"],
        ["--host", "192.0.2.1"],
        ["--venv-dir", str(no_environment)],
        ["--venv-dir", str(new_environment)],
    ):
        code, output = service.call("restart", *wrong)
        assert (code, wrong[1] in output) == (1, True), output
        assert runs(pid), output
    for program in ("df", "nvidia-smi"):
        (service.project.bin / program).unlink()
    service.project.requirements.write_text("new-since-the-start==1.0\n")
    try:
        assert "new-since-the-start" in service.call("restart")[1]
    finally:
        service.project.requirements.write_text("")
    assert f"pid {pid}" in service.localize("status")


def test_after_a_stop_nothing_is_remembered(service: Service) -> None:
    service.start("--title=a b", GPU_CONTROL_TOKEN="a secret")
    service.localize("stop")
    assert "No previous start is recorded" in service.localize("restart", "--detach", "--serve")
    assert service.seen()["secrets"]["GPU_CONTROL_TOKEN"] is None


def test_a_restart_of_nothing_is_a_start(service: Service) -> None:
    assert "Ready" in service.localize("restart", "--detach", "--serve")


def test_an_app_that_ends_while_it_starts(service: Service) -> None:
    code, output = service.call("--detach", "--break")
    assert code == 1
    assert "a mistake on purpose" in output, "the end of its log"
    assert str(service.log) in output
    assert service.call("status")[0] == 3


@pytest.mark.skipif(not shutil.which("ss") and not shutil.which("lsof"), reason="needs to know who listens")
def test_an_app_that_lost_its_port_while_it_started_is_not_ready(service: Service) -> None:
    """Somebody else answers there."""

    class Somebody(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(ProcessLookupError):
                os.kill(service.pid, signal.SIGTERM)

        def log_message(self, *arguments: object) -> None:
            pass

    start = service.project.start("--detach", "--until-sigterm", **service.environ)
    assert start.stdout
    assert any(line.startswith("Starting") for line in start.stdout)
    with HTTPServer(("127.0.0.1", int(service.port)), Somebody) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        said = start.communicate(timeout=60)[0]
        other.shutdown()
    assert (start.returncode, "ended during its start" in said, "Ready" in said) == (1, True, False), said


def test_an_app_that_is_not_ready_in_time_goes_on(service: Service) -> None:
    code, output = service.call("--detach", "--serve", "--never-ready", READY_TIMEOUT="1")
    assert code == 1
    assert "not ready after 1 s" in output
    assert runs(service.pid)
    assert "The app is not ready" in service.localize("status")
    service.localize("stop")


def test_an_app_that_does_not_end_in_time_is_ended_by_a_second_stop(service: Service) -> None:
    pid = service.start("--stubborn")["pid"]
    code, output = service.call("stop", STOP_TIMEOUT="1")
    assert (code, f"{pid} still runs after 1 s" in output, f"If it hangs: kill -9 {pid}" in output) == (1, True, True)
    assert runs(pid)
    service.localize("stop")
    assert not runs(pid)


def test_another_process_with_the_same_number_is_left_alone(service: Service) -> None:
    service.start()
    service.localize("stop")
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        write_record(service.run_dir, service.port, innocent.pid)
        assert "No app of this script" in service.localize("stop")
        assert service.call("status")[0] == 3
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_one_in_a_terminal_is_stopped_from_another_one(service: Service) -> None:
    process = service.project.start("--serve", **service.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if "Ready" in line:
            break
    assert f"pid {process.pid}" in service.localize("status")
    service.log.write_text("of an earlier one in the background\n")
    code, output = service.call("logs")
    assert (code, "terminal" in output, "earlier" in output) == (1, True, False)
    service.localize("stop")
    assert process.wait(30) == 0
    assert "stopped by SIGTERM" in process.stdout.read()


def test_two_apps_do_not_mix(service: Service, shared: Project) -> None:
    other = Service(shared, service.run_dir)
    service.start("--one")
    other.start("--two")
    service.localize("stop")
    assert runs(other.pid)
    assert "--two" in other.localize("logs")
    other.localize("stop")


def test_secrets_are_for_the_owner_only(service: Service) -> None:
    service.start("--control-token", "a secret")
    assert all(file.stat().st_mode & 0o077 == 0 for file in service.run_dir.iterdir())


def test_logs_follow_what_comes(service: Service) -> None:
    service.start()
    follower = service.project.start("logs", "--follow", **service.environ)
    assert follower.stdout is not None
    assert "APP" in follower.stdout.readline()
    service.localize("stop")
    assert "SIGTERM came" in follower.stdout.readline()
    follower.kill()
    follower.communicate()


@pytest.mark.parametrize("action", ["stop", "status", "logs"])
def test_what_is_no_setting_is_refused_where_nothing_is_started(service: Service, action: str) -> None:
    code, output = service.call(action, "--simulate-gpu", "48GB")
    assert (code, f"{action} does not know --simulate-gpu" in output) == (1, True)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs this project's packages in a virtual environment")
def test_the_real_app_starts_answers_starts_again_and_stops(tmp_path: Path) -> None:
    recordings, port = tmp_path / "recordings", str(free_port())
    environ = {name: value for name, value in os.environ.items() if name not in SETTINGS | OTHERS}
    environ |= {
        "VENV_DIR": str(environment_like_ours(tmp_path / "venv")),
        "RUN_DIR": str(tmp_path / "run"),
        "PORT": port,
    }

    def script(*arguments: str) -> str:
        command = [str(SCRIPT), *arguments]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        said = script("--detach", "--simulate-gpu", "48GB", "--tmp-dir", str(recordings), "--gpu-keep-warm", "7s")
        assert f"Ready: http://127.0.0.1:{port}" in said
        first = int((tmp_path / "run" / f"{port}.pid").read_text())
        assert "Simulated GPU" in script("status")
        assert "released" in script("status")
        script("restart")
        assert not runs(first)
        assert "Simulated GPU" in script("status")
        assert "GPU 管理已启用" in script("logs")
    finally:
        script("stop")
    assert not list(recordings.iterdir())
    log = (tmp_path / "run" / f"{port}.log").read_text()
    assert "Traceback" not in log
    assert wait_until(lambda: not list((tmp_path / "run").glob("*.pid")))


OTHER_TYPES = b'{"pid": 1, "born": "1", "log": null, "folder": "/", "arguments": null, "settings": %s}'


@pytest.mark.parametrize(
    "written",
    [
        *(b"", b"word", b"\0" * 9, b"5", b'{"pid": 1}', b'{"pid": 1, "born": "cut', b"[" * 100_000),
        *(OTHER_TYPES % settings for settings in (b"{}", b'["PORT"]')),
        None,
    ],
    ids=lambda written: repr(written)[:40],
)
def test_a_damaged_record_is_told_and_counts_as_none(service: Service, written: bytes | None) -> None:
    record = service.run_dir / f"{service.port}.run"
    service.run_dir.mkdir()
    if written is None:
        record.mkdir()
    else:
        record.write_bytes(written)
    code, said = service.call("status")
    assert (code, said.count(f"{record} is damaged")) == (3, 1), said
    assert f"{record} is damaged" in service.localize("--detach", "--serve")
    assert "damaged" not in service.localize("stop")
    assert not record.exists()


def test_a_restart_that_cannot_write_leaves_what_runs(service: Service, tmp_path: Path) -> None:
    pid = service.start()["pid"]
    (tmp_path / "file").touch()
    code, said = service.call("restart", "--tmp-dir", str(tmp_path / "file" / "below"))
    assert (code, "TMP_DIR" in said) == (1, True), said
    full = ["bash", "-c", 'ulimit -f 0; exec "$0" restart', service.project.folder / SCRIPT.name]
    done = subprocess.run(full, env=os.environ | service.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert f"RUN_DIR '{service.run_dir}' (variable RUN_DIR) cannot be written" in done.stderr
    assert runs(pid)
    assert "Ready" in service.localize("restart")
    assert not list(service.run_dir.glob("*.try"))


@pytest.mark.parametrize("damage", ["gone", "no interpreter", "no packages"])
def test_what_runs_is_found_and_stopped_without_its_environment(service: Service, tmp_path: Path, damage: str) -> None:
    venv = tmp_path / "venv"
    shutil.copytree(service.project.folder / ".venv", venv, symlinks=True)
    pid = service.start(VENV_DIR=str(venv))["pid"]
    if damage == "gone":
        shutil.rmtree(venv)
    elif damage == "no interpreter":
        for python in venv.glob("bin/python*"):
            python.unlink()
            python.symlink_to(tmp_path / "an interpreter that was removed")
    else:
        shutil.rmtree(venv / "lib")
    assert f"ASKED status --url http://127.0.0.1:{service.port}" in service.localize("status", VENV_DIR=str(venv))
    assert "APP" in service.localize("logs")
    assert "Stopped" in service.localize("stop", VENV_DIR=str(venv))
    assert not runs(pid)
