"""The app with ``--gpu-isolation process``: what is left of a worker process, and what of the app without one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import soundfile
from app_process import RunningApp, wait_until
from gradio_client import Client, handle_file

FLAGS = ("--enable-gpu-management", "--simulate-gpu", "48GB,context=400MB", "--gpu-isolation", "process")
CONTEXT_BYTES = 400 << 20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with RunningApp(tmp_path_factory.mktemp("isolated"), *FLAGS, "--gpu-residue", "keep") as app:
        yield app


def workers(app: RunningApp) -> list[int]:
    """The processes below the fork server, the app's only child, without the one that watches for orphans."""
    servers = psutil.Process(app.process.pid).children()
    return [each.pid for server in servers for each in server.children() if each.name() != "gpu-guard"]


def speaks(app: RunningApp, recording: str) -> bool:
    path = Client(app.url, verbose=False).predict(handle_file(recording), "Good morning.", "Hello.", api_name="/clone")
    audio, _ = soundfile.read(path)
    return len(audio) > 0


def test_after_a_release_no_worker_process_is_left(app: RunningApp, recording: str) -> None:
    assert workers(app) == []
    assert speaks(app, recording)
    (pid,) = workers(app)
    assert wait_until(lambda: app.model()["state"] == "cpu")
    seen = app.model()["worker"]
    assert (seen["pid"], seen["device_bytes"], seen["context_bytes"]) == (pid, CONTEXT_BYTES, CONTEXT_BYTES)
    assert seen["last_offload"]["way"] == "weights"
    app.post("/gpu/release", {})
    assert wait_until(lambda: app.model()["state"] == "released")
    assert workers(app) == []
    status = app.get("/gpu/status")[1]
    assert status["models"]["tts"]["worker"] is None
    assert status["device"]["free_bytes"] == 48 << 30


def test_a_worker_that_is_killed_while_it_speaks_ends_its_request_only(app: RunningApp, recording: str) -> None:
    text = "This is a sentence of a very long story that is told again and again. " * 40
    job = Client(app.url, verbose=False).submit(handle_file(recording), "Good morning.", text, api_name="/clone")
    assert wait_until(lambda: app.model()["state"] == "gpu" and app.model()["leases"] == 1)
    killed = app.model()["worker"]["pid"]
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(Exception, match=r"SIGKILL.*强制结束"):
        job.result(60)
    assert app.get("/healthz") == (200, {"status": "ok"})
    assert speaks(app, recording)
    (pid,) = workers(app)
    assert pid != killed
    assert app.model()["last_error"] is None


def test_the_speech_api_says_that_a_killed_worker_is_replaced(app: RunningApp) -> None:
    body = {"input": "This is a sentence of a very long story " * 100, "voice": "high"}
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(httpx.post, f"{app.url}/v1/audio/speech", json=body, timeout=60)
        assert wait_until(lambda: app.model()["state"] == "gpu" and app.model()["leases"] == 1)
        os.kill(app.model()["worker"]["pid"], signal.SIGKILL)
        refused = asked.result(60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_ended")
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx.post(f"{app.url}/v1/audio/speech", json={**body, "input": "Hi."}, timeout=60).status_code == 200


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_an_app_that_ends_takes_its_processes_along(tmp_path: Path, recording: str, sign: signal.Signals) -> None:
    with RunningApp(tmp_path, *FLAGS) as app:
        assert speaks(app, recording)
        family = psutil.Process(app.process.pid).children(recursive=True)
        assert len(family) >= 2
        app.stop(sign)
        assert not psutil.wait_procs(family, 30)[1]
