"""The end of ``app.py``, as those see it who wait for an answer, ask for one, or press Ctrl-C again."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import soundfile
from app_process import ForkedApp, RunningApp, wait_until
from gated_engine import close_gate, open_gate
from gradio_client import Client, handle_file
from gradio_client.client import Job
from recordings import write_tone

from residency.memory.self_moving.workers import is_alive

MANAGED = ("--enable-gpu-management", "--simulate-gpu", "48GB")
BARE = ()
REFUSED = r"shutting down.*正在关闭"
both_modes = pytest.mark.parametrize("mode", [MANAGED, BARE], ids=["managed", "bare"])


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    return tmp_path / "gates"


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """What the app is given as ``--tmp-dir``."""
    (tmp_path / "recordings").mkdir()
    return tmp_path / "recordings"


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    return write_tone(tmp_path / "prompt.wav")


class Visit:
    """One program that asks an app for speech; each has its own connection."""

    pool = ThreadPoolExecutor(8)

    def __init__(self, app: RunningApp, prompt: str) -> None:
        self.client = Client(app.url, verbose=False)
        self.prompt = prompt

    def ask(self) -> Visit:
        self.answer = self.pool.submit(
            self.client.predict, handle_file(self.prompt), "said", "to say", api_name="/clone"
        )
        return self

    def spoken_s(self) -> float:
        """Seconds of the recording that was answered, and that has arrived here."""
        audio, sample_rate = soundfile.read(self.answer.result(60))
        return len(audio) / sample_rate


def waits(app: RunningApp, job: Job) -> bool:
    """Whether a request waits for another's end: in the manager's queue, or without one in that of the page."""
    return app.model()["waiting"] == 1 if app.managed else "you are next" in str(job.status().progress_data)


def assert_nothing_left(app: RunningApp, recordings: Path) -> None:
    assert not list(recordings.iterdir())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", app.port))
    assert "Traceback" not in app.log


@pytest.mark.parametrize(("start", "mode"), [(RunningApp, MANAGED), (ForkedApp, BARE)], ids=["managed", "bare"])
def test_a_running_request_is_answered_and_others_are_refused(
    recordings: Path, gates: Path, prompt: str, start: type[RunningApp], mode: tuple[str, ...]
) -> None:
    with start(recordings, *mode, "--shutdown-grace", "60", gates=gates) as app:
        running, late = Visit(app, prompt), Visit(app, prompt)
        close_gate(gates, "speak")
        running.ask()
        app.wait_for_line("at the gate: speak")
        app.process.send_signal(signal.SIGTERM)
        app.wait_for_line("正在关闭")
        # Refused while the other still runs, and not behind it in a queue.
        with pytest.raises(Exception, match=REFUSED):
            late.ask().answer.result(30)
        if mode is MANAGED:
            assert app.get("/readyz")[0] == 503
            assert app.get("/healthz")[0] == 200
        assert not running.answer.done()
        open_gate(gates, "speak")
        assert running.spoken_s() == 1
        assert app.process.wait(30) == 0
    assert "直接退出" not in app.log
    assert "the interpreter ends" in app.log
    assert_nothing_left(app, recordings)


@both_modes
def test_a_request_in_the_queue_is_refused_when_the_end_begins(
    recordings: Path, gates: Path, prompt: str, mode: tuple[str, ...]
) -> None:
    with ForkedApp(recordings, *mode, "--shutdown-grace", "60", gates=gates) as app:
        running, waiting = Visit(app, prompt), Visit(app, prompt)
        close_gate(gates, "speak")
        running.ask()
        app.wait_for_line("at the gate: speak")
        job = waiting.client.submit(handle_file(prompt), "said", "to say", api_name="/clone")
        assert wait_until(lambda: waits(app, job))
        app.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match=REFUSED):
            job.result(30)
        open_gate(gates, "speak")
        assert running.spoken_s() == 1
        assert app.process.wait(30) == 0
    assert_nothing_left(app, recordings)


@both_modes
@pytest.mark.parametrize("grace", ["0", "0.2"])
def test_when_the_grace_is_over_it_leaves_without_the_request(
    recordings: Path, gates: Path, prompt: str, grace: str, mode: tuple[str, ...]
) -> None:
    with ForkedApp(recordings, *mode, "--shutdown-grace", grace, gates=gates) as app:
        close_gate(gates, "speak")
        running = Visit(app, prompt).ask()
        app.wait_for_line("at the gate: speak")
        assert app.stop() == 0
        assert app.wait_for_line("exiting without waiting. / 仍有请求在运行")
        assert running.answer.exception(30)
    # Not around a thread in native code.
    assert "the interpreter ends" not in app.log
    assert_nothing_left(app, recordings)


@both_modes
def test_who_waits_is_told_even_where_nothing_is_waited_for(
    recordings: Path, gates: Path, prompt: str, mode: tuple[str, ...]
) -> None:
    with ForkedApp(recordings, *mode, "--shutdown-grace", "0", gates=gates) as app:
        running, waiting = Visit(app, prompt), Visit(app, prompt)
        close_gate(gates, "speak")
        running.ask()
        app.wait_for_line("at the gate: speak")
        job = waiting.client.submit(handle_file(prompt), "said", "to say", api_name="/clone")
        assert wait_until(lambda: waits(app, job))
        app.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match=REFUSED):
            job.result(30)
        assert app.process.wait(30) == 0
    assert_nothing_left(app, recordings)


def test_a_terminal_that_is_closed_ends_it_as_other_signals_do(recordings: Path, gates: Path, prompt: str) -> None:
    with ForkedApp(recordings, *MANAGED, gates=gates) as app:
        assert Visit(app, prompt).ask().spoken_s() == 1
        assert app.stop(signal.SIGHUP) == 0
    assert "cpu -> released" in app.log
    assert_nothing_left(app, recordings)


def test_without_grace_an_idle_model_is_still_released(recordings: Path, gates: Path, prompt: str) -> None:
    with ForkedApp(recordings, *MANAGED, "--shutdown-grace", "0", gates=gates) as app:
        assert Visit(app, prompt).ask().spoken_s() == 1
        assert app.stop() == 0
    assert "cpu -> released" in app.log
    assert "直接退出" not in app.log
    assert_nothing_left(app, recordings)


@both_modes
@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_quits_at_once(
    recordings: Path, gates: Path, prompt: str, first: str, second: str, mode: tuple[str, ...]
) -> None:
    with ForkedApp(recordings, *mode, "--shutdown-grace", "-1", gates=gates) as app:
        close_gate(gates, "speak")
        Visit(app, prompt).ask()
        app.wait_for_line("at the gate: speak")
        app.process.send_signal(getattr(signal, first))
        app.wait_for_line("正在关闭")
        number = getattr(signal, second)
        app.process.send_signal(number)
        assert app.process.wait(5) == 128 + number
    assert_nothing_left(app, recordings)


def test_a_second_signal_quits_an_app_whose_main_thread_is_in_native_code(recordings: Path, gates: Path) -> None:
    (gates / "native").touch()
    # A child as of a library that loads; unmanaged: the app loads before it serves.
    child = "import subprocess as s; print('child', s.Popen(['sleep', '1000'], stdout=-3, stderr=-3).pid, flush=True)\n"
    app = RunningApp(recordings, gates=gates, prelude=child)
    try:
        app.wait_for_line("in native code", 120)
        loading = psutil.Process(int(app.wait_for_line("child").split()[1]))
        app.process.send_signal(signal.SIGTERM)
        app.process.send_signal(signal.SIGINT)
        # Whichever the system delivers first, the other is the second.
        assert app.process.wait(5) in (130, 143)
        assert wait_until(lambda: not is_alive(loading))
    finally:
        app.__exit__()
    assert_nothing_left(app, recordings)


def test_a_load_for_nobody_is_not_waited_for(recordings: Path, gates: Path, prompt: str) -> None:
    with ForkedApp(recordings, *MANAGED, "--shutdown-grace", "0", gates=gates) as app:
        close_gate(gates, "load")
        asked = Visit(app, prompt).ask()
        assert wait_until(lambda: app.model()["waiting"] == 1)
        app.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match=REFUSED):
            asked.answer.result(30)
        assert app.process.wait(30) == 0
        assert app.wait_for_line("模型仍在搬移")
    assert_nothing_left(app, recordings)


def test_an_app_that_nobody_uses_ends_at_once(recordings: Path, gates: Path) -> None:
    with ForkedApp(recordings, *MANAGED, gates=gates) as app:
        assert app.stop() == 0
    assert "正在关闭" not in app.log
    assert_nothing_left(app, recordings)


@pytest.fixture(autouse=True, scope="module")
def _end_of_the_visits() -> Iterator[None]:
    yield
    Visit.pool.shutdown(wait=False, cancel_futures=True)
