"""Dockerfile, compose file and systemd unit agree with the app and with the start script."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from reverse_proxies import make_certificate
from script_project import OTHERS, ROOT, SETTINGS

from residency.launch.docker import IMAGE_USER, build_command
from residency.launch.options import read

UNIT = ROOT / "examples" / "gpu-managed-tts.service"
COMPOSE: Any = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def run_app(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "app.py", *arguments], capture_output=True, text=True, check=False)


def test_the_image_has_every_file_that_the_app_imports_and_no_more_is_sent_to_the_builder() -> None:
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)).split()
    ours = [*ROOT.glob("*.py"), ROOT / "residency", ROOT / "requirements.txt", ROOT / "pyproject.toml"]
    assert all(any(fnmatch.fnmatch(path.name, pattern.removeprefix("./")) for pattern in copied) for path in ours)
    sent = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all(pattern.removeprefix("./").split("/")[0] in sent for pattern in copied)


def test_the_image_runs_as_a_user_without_rights_and_can_be_asked_for_its_health() -> None:
    assert re.search(r"^USER app$", DOCKERFILE, re.MULTILINE)
    user = re.search(r"useradd --uid (\d+)", DOCKERFILE)
    assert user
    assert int(user[1]) == IMAGE_USER
    assert "HEALTHCHECK" in DOCKERFILE
    command = re.search(r"^CMD (.*)", DOCKERFILE, re.MULTILINE)
    assert command
    assert not run_app(*yaml.safe_load(command[1]), "--help").returncode


@pytest.mark.parametrize("tls", [False, True])
def test_the_health_check_asks_the_app_whatever_proxy_the_container_was_given(tls: bool, tmp_path: Path) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    check = re.search(r"^HEALTHCHECK .*\\\n *CMD (.*)$", DOCKERFILE, re.MULTILINE)
    assert check
    _, *command = yaml.safe_load(check[1])
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*make_certificate(tmp_path / "certificate", "localhost"))
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"HEALTH_URL": f"http://127.0.0.1:{server.server_port}/healthz", "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *command], env=os.environ | environ, capture_output=True, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    again = subprocess.run([sys.executable, *command], env=os.environ | environ, capture_output=True, check=False)
    assert again.returncode != 0, "nobody is there any more"


def test_what_the_build_is_told_reaches_the_install() -> None:
    taken = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    words = build_command(read([], "launch", {}), "digest")
    assert taken == {word.partition("=")[0] for option, word in pairwise(words) if option == "--build-arg"}
    assert taken == set(COMPOSE["services"]["cpu"]["build"]["args"])
    # Without a default, or pip would be given an index without a name.
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} <= set(re.findall(r"^ARG (\w+)$", DOCKERFILE, re.MULTILINE))


def test_compose_asks_for_health_where_the_app_listens() -> None:
    assert "//${HEALTH_HOST:-${GPU_TTS_HOST:-127.0.0.1}}:" in COMPOSE["services"]["cpu"]["environment"]["HEALTH_URL"]


def test_what_a_hub_sends_outlives_the_container() -> None:
    assert "hub:/hub" in COMPOSE["services"]["cpu"]["volumes"]
    assert set(re.findall(r"(\w+)=/hub/", DOCKERFILE)) == {"HF_HOME", "MODELSCOPE_CACHE"}


def test_stored_voices_outlive_the_container() -> None:
    made = COMPOSE["services"]["cpu"]
    assert made["environment"]["GPU_TTS_VOICES_DIR"] == "/voices"
    assert "${GPU_TTS_VOICES_DIR:-voices}:/voices" in made["volumes"]
    assert "GPU_TTS_VOICES_DIR=/voices" in DOCKERFILE


def test_clients_in_compose_ask_the_app_with_its_key() -> None:
    app, webui, wyoming = (COMPOSE["services"][name] for name in ("cpu", "open-webui", "home-assistant"))
    key = "${GPU_TTS_API_KEYS:-none}"
    assert app["environment"]["GPU_TTS_API_KEYS"] == "${GPU_TTS_API_KEYS:-}"
    assert webui["environment"]["AUDIO_TTS_OPENAI_API_KEY"] == wyoming["environment"]["TTS_OPENAI_KEY"] == key
    url = webui["environment"]["AUDIO_TTS_OPENAI_API_BASE_URL"]
    assert url == wyoming["environment"]["TTS_OPENAI_URL"] == "http://127.0.0.1:${GPU_TTS_PORT:-${PORT:-7860}}/v1"
    assert webui["network_mode"] == wyoming["network_mode"] == app["network_mode"]


@pytest.mark.parametrize("service", ["open-webui", "home-assistant"])
def test_clients_in_compose_have_few_rights_and_bounds_and_are_asked_for_their_health(service: str) -> None:
    app, client = COMPOSE["services"]["cpu"], COMPOSE["services"][service]
    for name in ("cap_drop", "security_opt", "network_mode", "restart", "init"):
        assert client[name] == app[name]
    assert client["pids_limit"] <= app["pids_limit"]
    assert re.fullmatch(r"\d+[mg]", client["mem_limit"])
    assert client["healthcheck"]["test"][0] == "CMD"
    port = {"open-webui": client["environment"].get("PORT"), "home-assistant": "10300"}[service]
    assert re.search(rf"127\.0\.0\.1\W+{port}\b", client["healthcheck"]["test"][-1])


@pytest.mark.parametrize("service", ["cpu", "gpu"])
def test_compose_gives_as_few_rights_as_the_script_does(service: str) -> None:
    made = COMPOSE["services"][service]
    assert made["cap_drop"] == ["ALL"]
    assert made["security_opt"] == ["no-new-privileges:true"]
    assert made["network_mode"] == "host"
    read_only = [volume for volume in made["volumes"] if "MODEL_PATH" in volume or "STEP_AUDIO_ROOT" in volume]
    assert len(read_only) == 2
    assert all(volume.endswith(":ro") for volume in read_only)


def test_the_unit_and_compose_bound_what_the_app_may_take() -> None:
    unit = dict(re.findall(r"^#?(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE))
    assert unit["SystemCallFilter"].startswith("@system-service")
    assert unit["SystemCallErrorNumber"] == "EPERM", "an end by signal would say nothing"
    assert {"MemoryMax", "UMask", "RestrictAddressFamilies"} <= unit.keys()
    assert not {"PrivateDevices", "ProtectClock", "DevicePolicy", "MemoryDenyWriteExecute"} & unit.keys(), "no GPU then"
    for service in (COMPOSE["services"][name] for name in ("cpu", "gpu")):
        assert str(service["pids_limit"]) == unit["TasksMax"]
        nofile = service["ulimits"]["nofile"]
        assert f"{nofile['soft']}:{nofile['hard']}" == unit["LimitNOFILE"]


def test_compose_takes_the_settings_of_the_script() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    known = SETTINGS | OTHERS | {"HEALTH_HOST"}
    named = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert {name for name in named if name not in known and name.removeprefix("GPU_TTS_") not in known} == set()
    assert not named & {"HOST", "CONTAINER_NAME"}, "others set these"
    prefixed = {name for name in named if name.startswith("GPU_TTS_")}
    assert {name.removeprefix("GPU_TTS_") for name in prefixed} >= named & SETTINGS - {"TORCH_INDEX_URL"}


@pytest.mark.parametrize(
    "set_", [{}, {"MODEL_PATH": "somewhere", "GPU_SNAPSHOT_DIR": "elsewhere"}], ids=["none", "both"]
)
def test_what_compose_runs_is_understood_by_the_app(set_: dict[str, str], tmp_path: Path) -> None:
    shell, flag, script, name = COMPOSE["services"]["cpu"]["entrypoint"]
    # Compose makes $ of $$; nothing is interpolated there.
    script = script.replace("$$", "$").replace("exec python /app/app.py", "printf '%s\\n'")
    environ = {name: value for name, value in os.environ.items() if name not in SETTINGS} | set_
    said = subprocess.run([shell, flag, script, name, "--a"], env=environ, capture_output=True, text=True, check=True)
    expected = ["--a"]
    expected += ["--model-path", "/models"] if "MODEL_PATH" in set_ else []
    expected += ["--gpu-snapshot-dir", "/snapshots"] if "GPU_SNAPSHOT_DIR" in set_ else []
    assert said.stdout.split() == expected
    for argument in COMPOSE["services"]["cpu"]["command"]:
        default = re.sub(r"\$\{\w+:-(?:\$\{\w+:-)?([^}]*)\}+", r"\1", argument)
        assert not run_app(default, "--help").returncode


def test_the_unit_starts_the_script_with_its_settings() -> None:
    text = UNIT.read_text(encoding="utf-8")
    start = re.search(r"^ExecStart=/opt/gpu-managed-tts/(\S+)", text, re.MULTILINE)
    assert start
    assert os.access(ROOT / start[1], os.X_OK)
    named = {
        name for line in re.findall(r"^Environment=(.*)", text, re.MULTILINE) for name in re.findall(r"(\w+)=", line)
    }
    assert named - {"HOME"} <= {f"GPU_TTS_{name}" for name in SETTINGS}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/gpu-managed-tts/", f"{ROOT}/"))
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert UNIT.stem not in said.stderr, said.stderr
