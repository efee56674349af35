"""``app.py`` as its users meet it: a process with an exit code, a log, a port and a folder for recordings."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from app_process import ROOT, ForkedApp, RunningApp, run_app, wait_until
from gated_engine import close_gate, open_gate
from gradio_client import Client, handle_file

from residency import marked_folders
from residency.errors import InvalidInput
from residency.launch import lifetime
from residency.launch.lifetime import Signals
from residency.launch.settings import Settings

SIMULATED = ("--enable-gpu-management", "--simulate-gpu", "48GB")


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with RunningApp(tmp_path_factory.mktemp("managed"), *SIMULATED) as app:
        yield app


@pytest.fixture(scope="module")
def unmanaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    with RunningApp(tmp_path_factory.mktemp("unmanaged")) as app:
        yield app


def endpoints(app: RunningApp) -> set[str]:
    return set(Client(app.url, verbose=False).view_api(return_format="dict")["named_endpoints"])


def spoken_s(path: str) -> float:
    """Seconds of sound in a WAV file that is neither broken nor silent."""
    audio, sample_rate = soundfile.read(path)
    assert sample_rate == 24000
    assert np.isfinite(audio).all()
    assert np.sqrt(np.mean(audio**2)) > 0.005
    return len(audio) / sample_rate


class TestWithoutManagement:
    def test_there_is_no_gpu_control_and_no_health_route(self, unmanaged: RunningApp) -> None:
        for path in ("/gpu/status", "/healthz", "/readyz"):
            assert unmanaged.get(path)[0] == 404
        assert unmanaged.post("/gpu/release", {})[0] in (404, 405)

    def test_there_is_no_panel_and_no_endpoint_beside_speech(self, unmanaged: RunningApp) -> None:
        assert "gpu-status" not in str(unmanaged.get("/config")[1])
        assert endpoints(unmanaged) == {"/clone", "/edit"}

    def test_there_is_no_monitor_and_no_word_of_it(self, unmanaged: RunningApp) -> None:
        assert "gpu" not in unmanaged.threads()
        assert "GPU 管理" not in unmanaged.log

    def test_it_speaks(self, unmanaged: RunningApp, recording: str) -> None:
        client = Client(unmanaged.url, verbose=False)
        path = client.predict(handle_file(recording), "Good morning.", "It works like this too.", api_name="/clone")
        assert 0.5 < spoken_s(path) < 6


class TestWithManagement:
    def test_the_log_says_so(self, managed: RunningApp) -> None:
        assert "Simulated GPU" in managed.wait_for_line("🚀 GPU 管理已启用")

    def test_health_and_status(self, managed: RunningApp) -> None:
        assert managed.get("/healthz") == managed.get("/readyz") == (200, {"status": "ok"})
        code, status = managed.get("/gpu/status")
        assert (code, status["device"]["kind"], status["device"]["total_bytes"]) == (200, "simulated", 48 << 30)
        assert status["device"]["budget_bytes"] is None
        assert status["monitor"].keys() == {"alive", "errors", "last_error"}
        assert {"policy", "next", "progress"} <= status["models"]["tts"].keys()

    def test_the_endpoints_are_these_and_no_others(self, managed: RunningApp) -> None:
        gpu = {"/gpu_status", "/gpu_offload", "/gpu_release", "/gpu_warm"}
        assert endpoints(managed) == {"/clone", "/edit"} | gpu

    def test_programs_clone_edit_and_steer(self, managed: RunningApp, recording: str) -> None:
        client = Client(managed.url, verbose=False)
        cloned = client.predict(
            prompt_audio=handle_file(recording),
            prompt_text="Good morning.",
            target_text="The weather is so nice today, we should go outside.",
            api_name="/clone",
        )
        assert managed.model()["state"] == "cpu"
        assert managed.model()["device_bytes"] == 0 < managed.model()["host_bytes"]
        assert "gpu-idle-monitor" in managed.threads()
        slower = client.predict(
            handle_file(cloned), "The weather is so nice today.", "speed", "slower", api_name="/edit"
        )
        assert spoken_s(slower) > spoken_s(cloned) > 1
        assert client.predict(model="tts", api_name="/gpu_offload")["models"]["tts"]["state"] == "cpu"
        assert client.predict(api_name="/gpu_release")["models"]["tts"]["state"] == "released"
        assert client.predict("tts", api_name="/gpu_warm")["models"]["tts"]["state"] in ("moving", "gpu")

    def test_who_waits_is_counted_and_finds_the_model_there(self, managed: RunningApp, recording: str) -> None:
        client = Client(managed.url, verbose=False)
        client.predict(handle_file(recording), "Good morning.", "Come back.", api_name="/clone")

        def moves() -> list[dict[str, object]]:
            return managed.get("/gpu/history")[1]["models"]["tts"]["moves"]

        before = len(moves())
        jobs = [
            client.submit(handle_file(recording), "Good morning.", "It is one of three.", api_name="/clone")
            for _ in range(3)
        ]
        assert wait_until(lambda: managed.model()["waiting"] == 2)
        assert all(spoken_s(job.result()) > 0.5 for job in jobs)
        assert [(move["from"], move["to"]) for move in moves()[before:]] == [("cpu", "gpu"), ("gpu", "cpu")]

    def test_http_steers_too(self, managed: RunningApp) -> None:
        code, status = managed.post("/gpu/release", {"model": "tts"})
        assert (code, status["models"]["tts"]["state"]) in ((200, "released"), (202, "moving"), (202, "gpu"))
        assert managed.post("/gpu/release", {"model": "asr"})[0] == 404

    def test_bad_input_is_a_sentence_and_moves_nothing(
        self, managed: RunningApp, recording: str, tmp_path: Path
    ) -> None:
        client = Client(managed.url, verbose=False)
        before = managed.model()["last_move"]
        with pytest.raises(Exception, match=r"Target Text is empty.*目标文本为空"):
            client.predict(handle_file(recording), "Good morning.", " ", api_name="/clone")
        with pytest.raises(Exception, match=r"'twice'.*slower"):
            client.predict(handle_file(recording), "Good morning.", "speed", "twice", api_name="/edit")
        with pytest.raises(Exception, match="asr"):
            client.predict("asr", api_name="/gpu_release")
        assert managed.model()["last_move"] == before

    def test_what_the_engine_or_the_decoder_refuses_is_a_sentence_too(
        self, managed: RunningApp, recording: str, tmp_path: Path
    ) -> None:
        client = Client(managed.url, verbose=False)
        with pytest.raises(Exception, match=r"sing.*引擎无法处理"):
            client.predict(handle_file(recording), "Good morning.", "sing", api_name="/edit")
        assert wait_until(lambda: managed.model()["state"] == "cpu")
        text = tmp_path / "text.wav"
        text.write_text("this is no audio")
        with pytest.raises(Exception, match=r"cannot be read.*无法读取"):
            client.predict(handle_file(str(text)), "Good morning.", "Hello.", api_name="/clone")


def test_a_program_that_waits_reads_what_the_model_does(tmp_path: Path, recording: str) -> None:
    for name in ("gates", "recordings"):
        (tmp_path / name).mkdir()
    close_gate(tmp_path / "gates", "load")
    with ForkedApp(tmp_path / "recordings", *SIMULATED, gates=tmp_path / "gates") as app:
        client = Client(app.url, verbose=False)
        job = client.submit(handle_file(recording), "Good morning.", "Hello.", api_name="/clone")
        assert wait_until(lambda: bool(job.status().progress_data))
        assert re.match(
            "正在移至模拟显存 / To the simulated GPU: .*(building|reading)", job.status().progress_data[0].desc
        )
        open_gate(tmp_path / "gates", "load")
        assert Path(job.result(30)).is_file()


def app_at_gate(tmp_path: Path, gate: str, *flags: str) -> ForkedApp:
    """An app whose engine stops at a gate; its folders are ``gates`` and ``recordings``."""
    gates, recordings = tmp_path / "gates", tmp_path / "recordings"
    gates.mkdir()
    recordings.mkdir()
    close_gate(gates, gate)
    return ForkedApp(recordings, *SIMULATED, *flags, "--shutdown-grace", "0", gates=gates)


class TestFlags:
    def test_budget_and_times_arrive_at_the_manager(self, tmp_path: Path) -> None:
        flags = ("--gpu-budget", "2GB", "--gpu-keep-warm", "-1", "--gpu-idle-timeout", "-1")
        with ForkedApp(tmp_path, *SIMULATED, *flags) as app:
            assert app.get("/gpu/status")[1]["device"]["budget_bytes"] == 2 << 30
            assert (app.model()["keep_warm_s"], app.model()["idle_timeout_s"]) == (-1, -1)

    def test_while_a_load_hangs_it_can_be_looked_at_and_steered_by_any_number_of_impatient_people(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "gates").mkdir()
        close_gate(tmp_path / "gates", "load")
        with ForkedApp(tmp_path / "tmp", *SIMULATED, "--shutdown-grace", "0", gates=tmp_path / "gates") as app:
            assert app.post("/gpu/warm", {})[0] == 202
            app.wait_for_line("at the gate: load")
            for _ in range(50):
                code, status = app.post("/gpu/release", {})
                assert (code, status["models"]["tts"]["pending"]) == (202, "release")
            assert app.get("/healthz")[0] == app.get("/readyz")[0] == 200
            assert app.model()["state"] == "moving"
            open_gate(tmp_path / "gates", "load")
            assert wait_until(lambda: app.model()["state"] == "released")

    def test_a_request_that_waits_too_long_is_refused_with_the_holder(self, tmp_path: Path, recording: str) -> None:
        with app_at_gate(tmp_path, "speak", "--gpu-wait-timeout", "0.2s") as app:
            client = Client(app.url, verbose=False)
            first = client.submit(handle_file(recording), "said", "to say", api_name="/clone")
            app.wait_for_line("at the gate: speak")
            with pytest.raises(Exception, match=r"tts_gpu_managed|held for .* by"):
                client.predict(handle_file(recording), "said", "to say", api_name="/clone")
            assert app.model()["holder"]["where"]
            open_gate(tmp_path / "gates", "speak")
            assert first.result(60)

    def test_a_load_that_hangs_is_given_up_and_said(self, tmp_path: Path, recording: str) -> None:
        with app_at_gate(tmp_path, "load", "--gpu-load-timeout", "0.1") as app:
            client = Client(app.url, verbose=False)
            with pytest.raises(Exception, match=r"was not loaded within 0.1 s.*未能在 0.1 秒内加载完成"):
                client.predict(handle_file(recording), "Good morning.", "Hello.", api_name="/clone")
            assert "LoadTimeout" in app.model()["last_error"]


class TestEnd:
    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_well_and_nothing_is_left(self, tmp_path: Path, sign: signal.Signals) -> None:
        with ForkedApp(tmp_path, *SIMULATED) as app:
            assert list(tmp_path.iterdir())
            assert app.stop(sign) == 0
        assert "Traceback" not in app.log
        assert not list(tmp_path.iterdir())

    def test_without_grace_a_running_request_does_not_hold_it(self, tmp_path: Path, recording: str) -> None:
        with ForkedApp(tmp_path, *SIMULATED, "--shutdown-grace", "0") as app:
            text = "This is a sentence of a very long story that is told again and again. " * 40
            Client(app.url, verbose=False).submit(handle_file(recording), "Good morning.", text, api_name="/clone")
            app.wait_for_line("released -> gpu")
            assert app.stop() == 0
        assert not list(tmp_path.iterdir())


class TestStart:
    def test_help_and_wrong_flags_load_nothing_heavy(self) -> None:
        script = (
            "import sys, app\n"
            "try: app.main(['--help'])\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'gradio', 'numpy', 'ssl', 'subprocess'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def test_the_page_can_be_imported_from_app(self) -> None:
        from app import EditxTab
        from residency.web import editx_tab

        assert EditxTab is editx_tab.EditxTab

    def test_a_port_in_use_is_said_before_anything_is_loaded(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            ended = run_app("--server-name", "127.0.0.1", "--server-port", port, "--tmp-dir", str(tmp_path))
        assert ended.returncode == 1
        assert port in ended.stderr
        assert "--server-port" in ended.stderr
        assert "无法监听" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not list(tmp_path.iterdir())

    def test_a_model_path_that_does_not_exist(self) -> None:
        ended = run_app("--model-path", "/no/such/place")
        assert ended.returncode == 2
        assert "/no/such/place" in ended.stderr

    def test_a_model_path_without_the_code_for_it(self, tmp_path: Path) -> None:
        ended = run_app("--model-path", str(tmp_path), "--server-port", "7862", "--tmp-dir", str(tmp_path / "tmp"))
        assert ended.returncode == 1
        assert "--step-audio-root" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        ended = run_app("--tmp-dir", str(tmp_path / "file"))
        assert ended.returncode == 1
        assert "--tmp-dir" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_recordings_of_a_killed_app_are_removed_and_those_of_a_running_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    for name in ("editx-dead", "editx-live", "editx-of-the-user", "somebody-elses"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "voice.wav").touch()
        if name in ("editx-dead", "editx-live"):
            (tmp_path / name / marked_folders._MARK).touch()
    with (
        marked_folders._locked(tmp_path / "editx-live"),
        lifetime.recordings_folder(str(tmp_path), Signals()) as ours,
    ):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["editx-live", "editx-of-the-user", "somebody-elses", Path(ours).name]
        )
        assert Path(ours, marked_folders._MARK).exists()
    left = ["editx-live", "editx-of-the-user", "somebody-elses"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_the_default_folder_may_be_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "gradio"
    theirs.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(Settings, "tmp_dir", str(theirs))
    monkeypatch.setattr(lifetime.os, "access", lambda path, mode: str(path) != str(theirs))
    with lifetime.recordings_folder(str(theirs), Signals()) as ours:
        assert Path(ours).parent == tmp_path / f"gradio-{os.getuid()}"
    assert not list(theirs.iterdir())


def test_apps_that_start_and_end_at_the_same_time_do_not_take_each_others_folders(tmp_path: Path) -> None:
    script = """
import sys
from residency.launch.lifetime import Signals, recordings_folder
for _ in range(100):
    with recordings_folder(sys.argv[1], Signals()) as folder:
        open(folder + "/voice.wav", "w").close()
"""
    apps = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [each.wait(60) for each in apps] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", ["a link", "open to all"])
def test_a_default_folder_that_somebody_prepared_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    prepared, target = tmp_path / "gradio", tmp_path / "target"
    target.mkdir()
    if made == "a link":
        prepared.symlink_to(target)
    else:
        prepared.mkdir()
        prepared.chmod(0o777)  # without the sticky bit, so that anybody can exchange what lies in it
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(Settings, "tmp_dir", str(prepared))
    own = tmp_path / f"gradio-{os.getuid()}"
    with lifetime.recordings_folder(str(prepared), Signals()) as ours:
        assert Path(ours).parent == own
    assert not list(target.iterdir())
    own.rmdir()
    own.symlink_to(target)
    with pytest.raises(InvalidInput, match="--tmp-dir"), lifetime.recordings_folder(str(prepared), Signals()):
        pass


def test_a_link_among_left_recordings_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / marked_folders._MARK).touch()
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "editx-link").symlink_to(elsewhere)
    with pytest.raises(OSError, match="editx-link"), marked_folders._locked(tmp_path / "recordings" / "editx-link"):
        pass
    with lifetime.recordings_folder(str(tmp_path / "recordings"), Signals()):
        assert (elsewhere / marked_folders._MARK).exists()
