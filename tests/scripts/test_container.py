"""The start script with ``--docker``, against a docker that answers as the real one does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from reverse_proxies import make_certificate
from script_project import ROOT, Caller, Project, free_port, write_record

NAME = "step-audio-gpu-managed"
KEPT = f"{NAME}-before-gpu-management"
OLD = {"labels": {}, "status": "running", "restart": "on-failure", "retries": 3, "image": "theirs", "command": []}


class Machine(Caller):
    """A machine with a docker, on which the start script is called."""

    def __init__(self, folder: Path) -> None:
        self.port, self.docker = str(free_port()), folder / "docker"
        super().__init__(
            Project(folder / "a project", folder / "bin"),
            {"FAKE_DOCKER": str(self.docker), "PORT": self.port},
        )
        shutil.copy(ROOT / "Dockerfile", self.project.folder)
        (self.project.folder / "pyproject.toml").touch()
        self.docker.mkdir()
        fake = Path(__file__).with_name("fake_docker.py")
        self.project.program("docker", f'exec "{sys.executable}" -S "{fake}" "$@"')

    @property
    def state(self) -> dict[str, Any]:
        file = self.docker / "state.json"
        return json.loads(file.read_text()) if file.exists() else {"containers": {}, "images": {}}

    def set(self, **facts: Any) -> None:
        (self.docker / "state.json").write_text(json.dumps(self.state | facts))

    @property
    def containers(self) -> dict[str, Any]:
        return self.state["containers"]

    def calls(self, verb: str) -> list[list[str]]:
        file = self.docker / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == verb]

    def refuse(self, *arguments: str, **environ: str) -> str:
        before = self.containers
        code, output = self.call(*arguments, **environ)
        assert code == 1, output
        assert "❌" in output
        assert self.containers == before, "what is refused changes nothing"
        return output

    def start(self, *arguments: str, **environ: str) -> str:
        return self.localize("--docker", "--detach", *arguments, **environ)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for made in machine.containers.values():
        with suppress(KeyError, ProcessLookupError):
            os.kill(made["pid"], signal.SIGKILL)


def value_of(option: str, call: list[str]) -> str:
    return call[call.index(option) + 1]


def pairs(option: str, call: list[str]) -> list[str]:
    return [call[index + 1] for index, word in enumerate(call) if word == option]


def test_from_start_to_stop(machine: Machine) -> None:
    said = machine.start("--simulate-gpu", "48GB")
    assert f"Ready: http://127.0.0.1:{machine.port}" in said
    assert "stop --docker" in said
    assert machine.containers[NAME]["command"] == [
        *("--enable-gpu-management", "--simulate-gpu", "48GB", "--server-name", "127.0.0.1", "--server-port"),
        *(machine.port, "--gpu-idle-timeout", "600", "--gpu-keep-warm", "0"),
    ]
    assert machine.containers[NAME]["restart"] == "unless-stopped"
    # Where a container is all that runs, it need not be said.
    assert f"EXEC python -m gpu_manager status --url http://127.0.0.1:{machine.port}" in machine.localize(
        "status", PORT=""
    )
    machine.localize("status", PORT="", LC_ALL="zh_CN.UTF-8")
    assert machine.calls("exec")[-1][:2] == ["--env", "LC_ALL=zh"], "the app's table is in the same language"
    assert "LOG of" in machine.localize("logs", "--docker")
    assert "Ready" in machine.localize("restart", PORT="")
    assert "Stopped" in machine.localize("stop")
    assert machine.containers == {}
    assert machine.call("status", "--docker")[0] == 3


def test_its_rights_are_as_few_as_can_be(machine: Machine, tmp_path: Path) -> None:
    models, checkout, snapshots = tmp_path / "mo dels", tmp_path / "checkout", tmp_path / "snapshots"
    models.mkdir()
    checkout.mkdir()
    folders = {"MODEL_PATH": models, "STEP_AUDIO_ROOT": checkout, "GPU_SNAPSHOT_DIR": snapshots}
    machine.start(GPU_CONTROL_TOKEN="secret", **{name: str(folder) for name, folder in folders.items()})
    run = machine.calls("run")[-1]
    assert value_of("--cap-drop", run) == "ALL"
    assert value_of("--security-opt", run) == "no-new-privileges"
    assert pairs("--volume", run) == [
        "gpu-managed-tts-voices:/voices",
        "gpu-managed-tts-hub:/hub", f"{models}:{models}:ro", f"{checkout}:{checkout}:ro", f"{snapshots}:{snapshots}",
    ]  # fmt: skip
    assert snapshots.is_dir()
    passed_on = {"GPU_CONTROL_TOKEN", "GRADIO_AUTH", "GPU_TTS_ROOT_PATH", "GRADIO_ROOT_PATH", "GPU_TTS_ALLOWED_HOSTS"}
    passed_on |= {"GPU_TTS_API_KEYS", "GPU_TTS_CORS_ORIGINS"}
    assert passed_on < set(pairs("--env", run))
    assert not any("secret" in word for word in run), "a secret is not for the list of processes"
    if os.geteuid():
        assert value_of("--user", run) == f"{os.geteuid()}:{os.getegid()}"
        assert set(pairs("--group-add", run)) == {str(group) for group in (os.getegid(), *os.getgroups())}


def test_a_tokenizer_beside_the_model_is_mounted_too(machine: Machine, tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "models/Step-Audio-EditX", tmp_path / "models/Step-Audio-Tokenizer"
    model.mkdir(parents=True)
    machine.start(MODEL_PATH=str(model))
    assert str(tokenizer) not in str(machine.calls("run")[-1])
    tokenizer.mkdir()
    machine.start("--replace", MODEL_PATH=f"{model}/")
    mounted = pairs("--volume", machine.calls("run")[-1])
    assert f"{tokenizer}:{tokenizer}:ro" in mounted
    assert len(mounted) == 4


@pytest.mark.parametrize("by_flag", [True, False])
def test_voices_are_kept_where_the_user_says(machine: Machine, tmp_path: Path, by_flag: bool) -> None:
    voices = tmp_path / "voices"
    if by_flag:
        machine.start("--voices-dir", str(voices))
    else:
        machine.start(GPU_TTS_VOICES_DIR=str(voices))
        assert f"GPU_TTS_VOICES_DIR={voices}" in pairs("--env", machine.calls("run")[-1])
    assert pairs("--volume", machine.calls("run")[-1]) == [f"{voices}:{voices}"]
    assert voices.is_dir()


@pytest.mark.parametrize("by_flag", [True, False])
def test_voices_in_an_object_store_need_no_folder(machine: Machine, by_flag: bool) -> None:
    url = "s3://bucket/voices"
    if by_flag:
        machine.start("--voices-dir", url)
        assert url in machine.calls("run")[-1]
    else:
        machine.start(GPU_TTS_VOICES_DIR=url)
        assert f"GPU_TTS_VOICES_DIR={url}" in pairs("--env", machine.calls("run")[-1])
    assert pairs("--volume", machine.calls("run")[-1]) == []


def test_folders_that_arguments_name_lie_inside_where_they_lie_outside(machine: Machine, tmp_path: Path) -> None:
    recordings, whisper = tmp_path / "recordings", machine.project.bin / "whisper"
    whisper.mkdir()
    machine.start(
        *("--tmp-dir", str(recordings), "--enable-auto-transcribe", "--asr-model=whisper", "--tts-model-id", "an/id")
    )
    assert pairs("--volume", machine.calls("run")[-1]) == [
        "gpu-managed-tts-voices:/voices",
        "gpu-managed-tts-hub:/hub", f"{recordings}:{recordings}", f"{whisper}:{whisper}:ro",
    ]  # fmt: skip
    assert recordings.is_dir()
    assert machine.containers[NAME]["command"][1:6] == [
        *("--tmp-dir", str(recordings), "--enable-auto-transcribe", f"--asr-model={whisper}", "--tts-model-id"),
    ]


def test_the_tokenizer_of_the_newer_engine_is_beside_the_model_or_named(machine: Machine, tmp_path: Path) -> None:
    model, tokenizer, mine = (tmp_path / name for name in ("Step-Audio-EditX", "Step-Audio-Tokenizer", "mine"))
    for folder in (model, tokenizer, mine):
        folder.mkdir()
    machine.start("--tokenizer-path", str(mine), MODEL_PATH=str(model))
    assert pairs("--volume", machine.calls("run")[-1])[2:] == [f"{each}:{each}:ro" for each in (model, tokenizer, mine)]
    machine.start("--replace", "--tokenizer-path", str(tokenizer), MODEL_PATH=str(model))
    assert pairs("--volume", machine.calls("run")[-1])[2:] == [f"{each}:{each}:ro" for each in (model, tokenizer)]


def test_a_folder_that_cannot_be_is_met_before_a_container_is_replaced(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    machine.set(containers={NAME: OLD})
    said = machine.refuse("--docker", "--detach", "--replace", "--tmp-dir", str(tmp_path / "file" / "below"))
    assert "TMP_DIR" in said
    assert "cannot be written" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="of root alone the container is another user's")
def test_folders_that_root_may_use_but_not_the_user_inside(machine: Machine, tmp_path: Path) -> None:
    snapshots, models = tmp_path / "snapshots", tmp_path / "models"
    snapshots.mkdir()
    models.mkdir(mode=0o700)
    for setting, folder, mend in (
        ("GPU_SNAPSHOT_DIR", snapshots, "chown -R 10001"),
        ("MODEL_PATH", models, "chmod -R o+rX"),
    ):
        for arguments in (["--detach"], ["--check"]):
            said = machine.refuse("--docker", *arguments, **{setting: str(folder)})
            assert f"{mend} {folder}" in said
    os.chown(snapshots, 10001, -1)
    models.chmod(0o755)
    machine.start(GPU_SNAPSHOT_DIR=str(snapshots), MODEL_PATH=str(models))


@pytest.mark.skipif(os.geteuid() != 0, reason="of root alone the container is another user's")
def test_a_private_key_that_only_root_may_read_is_said_before_the_start(machine: Machine, tmp_path: Path) -> None:
    certificate, key = map(Path, make_certificate(tmp_path / "made", "localhost"))
    tmp_path.joinpath("made").chmod(0o755)
    certificate.chmod(0o644)
    key.chmod(0o600)
    arguments = ["--docker", "--detach", "--ssl-certfile", str(certificate), f"--ssl-keyfile={key}"]
    assert f"chown 10001 {key}" in machine.refuse(*arguments)
    os.chown(key, 10001, -1)
    said = machine.localize("--docker", "--check", *arguments[2:])
    assert f"--volume {key}:{key}:ro" in said


def test_what_would_be_made_is_said(machine: Machine, tmp_path: Path) -> None:
    said = machine.localize("--docker", "--check", GPU_SNAPSHOT_DIR=str(tmp_path / "snapshots"))
    assert f"Would create the folder {tmp_path / 'snapshots'}" in said


def test_the_image_is_built_when_something_has_changed(machine: Machine) -> None:
    machine.start(BASE_IMAGE="step-audio-editx", TORCH_INDEX_URL="https://example.org/cpu")
    build = machine.calls("build")[-1]
    assert build[-1] == str(machine.project.folder)
    arguments = ["BASE_IMAGE=step-audio-editx", "TORCH_INDEX_URL=https://example.org/cpu"]
    arguments += ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"]  # by name: they may hold a password
    assert pairs("--build-arg", build) == arguments
    same = {"BASE_IMAGE": "step-audio-editx", "TORCH_INDEX_URL": "https://example.org/cpu"}
    assert "up to date" in machine.start("--replace", **same)
    assert len(machine.calls("build")) == 1
    (machine.project.folder / "residency" / "new.py").touch()
    machine.start("--replace", **same)
    assert len(machine.calls("build")) == 2
    machine.set(images=machine.state["images"] | {"step-audio-editx": {"labels": {}, "id": "sha256:made anew"}})
    machine.start("--replace", **same)
    assert len(machine.calls("build")) == 3


def test_without_a_network_what_is_built_already_starts(machine: Machine) -> None:
    machine.start()
    machine.localize("stop")
    machine.set(failing=["build"])
    machine.start()
    machine.localize("stop")
    machine.project.requirements.write_text("# changed\n")
    assert "could not be built" in machine.refuse("--docker", "--detach")


class TestSomebodyElses:
    @pytest.fixture(autouse=True)
    def old(self, machine: Machine) -> None:
        machine.set(containers={NAME: OLD})

    def test_it_is_left_alone(self, machine: Machine) -> None:
        assert f"already a container {NAME} (running). Give --replace" in machine.refuse("--docker", "--detach")
        assert "was not started by this script" in machine.refuse("stop", "--docker")
        assert machine.containers == {NAME: OLD}

    def test_it_is_replaced_when_that_is_said_and_back_after_stop(self, machine: Machine) -> None:
        said = machine.start("--replace")
        assert KEPT in said
        assert machine.containers[KEPT] == OLD | {"status": "exited", "restart": "no", "retries": 0}, "it stays down"
        assert machine.containers[NAME]["image"] == "gpu-managed-tts"
        assert f"docker start {NAME}" in machine.localize("stop")
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    def test_it_stays_down_also_beside_ours_in_a_terminal(self, machine: Machine) -> None:
        process = machine.project.start("--docker", "--replace", **machine.environ)
        assert process.stdout is not None
        assert any("Ready" in line for line in process.stdout)
        assert machine.containers[KEPT] == OLD | {"status": "exited", "restart": "no", "retries": 0}
        machine.localize("stop", "--docker")
        process.communicate(timeout=30)
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    def test_it_is_back_also_after_ours_was_replaced_in_turn(self, machine: Machine) -> None:
        machine.start("--replace")
        assert "Give --replace" in machine.refuse("--docker", "--detach")
        machine.start("--replace", "--simulate-gpu", "48GB")
        machine.localize("stop")
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    def test_none_is_lost_to_another_of_that_name(self, machine: Machine) -> None:
        machine.set(containers={NAME: OLD, KEPT: OLD | {"status": "exited"}})
        assert "remove or rename one of them" in machine.refuse("--docker", "--detach", "--replace")

    def test_one_that_would_be_gone_once_it_is_stopped_is_not_stopped(self, machine: Machine) -> None:
        machine.set(containers={NAME: OLD | {"auto_remove": True, "restart": "no"}})
        said = machine.refuse("--docker", "--detach", "--replace")
        assert "started with --rm" in said
        assert f"docker stop {NAME}" in said

    def test_its_policy_is_asked_for_where_ours_is_gone_which_knew_it(self, machine: Machine) -> None:
        machine.start("--replace")
        machine.localize("stop")
        machine.set(containers={KEPT: OLD | {"status": "exited", "restart": "no"}})
        assert f"docker update --restart unless-stopped {NAME}" in machine.localize("stop", "--docker")

    def test_a_start_that_fails_says_the_way_back(self, machine: Machine) -> None:
        code, said = machine.call("--docker", "--detach", "--replace", "--break")
        assert (code, "To restore the previous state: " in said, "LOG of" in said) == (1, True, True)
        machine.localize("stop", "--docker")
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    @pytest.mark.parametrize("trouble", [{"failing": ["run"]}, {"no_start": True}], ids=["not made", "made"])
    def test_a_container_that_docker_cannot_start_leaves_it_as_it_was(
        self, machine: Machine, trouble: dict[str, Any]
    ) -> None:
        machine.set(**trouble)
        code, said = machine.call("--docker", "--detach", "--replace")
        assert (code, f"docker start {NAME}" in said) == (1, True), said
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    @pytest.mark.parametrize(
        "trouble", [{"failing": ["run"]}, {"no_start": True}, {"ends": 1}], ids=["not made", "not started", "ended"]
    )
    def test_ours_in_its_place_is_followed_by_another_one_that_is_ready_or_by_itself(
        self, machine: Machine, trouble: dict[str, Any]
    ) -> None:
        machine.start("--replace", "--one")
        machine.set(**trouble)
        code, said = machine.call("--docker", "--detach", "--replace", "--two", PORT=str(free_port()))
        assert (code, "runs again with its previous settings" in said) == (1, True), said
        assert f"Ready: http://127.0.0.1:{machine.port}" in said
        assert machine.containers.keys() == {NAME, KEPT}
        assert machine.containers[KEPT] == OLD | {"status": "exited", "restart": "no", "retries": 0}
        assert machine.containers[NAME]["status"] == "running"
        assert "--one" in machine.containers[NAME]["command"]
        machine.set(failing=[], no_start=False)
        machine.start("--replace", "--two")
        assert machine.containers.keys() == {NAME, KEPT}
        assert "--two" in machine.containers[NAME]["command"]
        machine.localize("stop")
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    @pytest.mark.parametrize("failing", ["rename", "update"])
    def test_its_policy_outlives_a_docker_that_fails_in_the_middle_of_stop(
        self, machine: Machine, failing: str
    ) -> None:
        machine.start("--replace")
        machine.set(failing=[failing])
        assert machine.call("stop", "--docker")[0] == 1
        machine.set(failing=[])
        assert "not known" not in machine.localize("stop", "--docker")
        assert machine.containers == {NAME: OLD | {"status": "exited"}}

    def test_one_that_cannot_be_renamed_is_said_to_be_stopped(self, machine: Machine) -> None:
        machine.set(failing=["rename"])
        code, said = machine.call("--docker", "--detach", "--replace")
        assert (code, f"is stopped: docker start {NAME}" in said) == (1, True), said

    def test_check_says_so_and_does_nothing(self, machine: Machine) -> None:
        said = machine.localize("--docker", "--check", "--replace")
        assert f"Would stop {NAME} and keep it as {KEPT}" in said
        assert "Would build: docker build" in said
        assert f"Would run: docker run --name {NAME}" in said
        assert machine.containers == {NAME: OLD}


def test_what_check_says_is_what_is_done(machine: Machine) -> None:
    said = machine.localize("--docker", "--detach", "--check", "--simulate-gpu", "48GB")
    machine.start("--simulate-gpu", "48GB")
    for verb in ("build", "run"):
        planned = next(line for line in said.splitlines() if f": docker {verb}" in line)
        assert shlex.split(planned.partition(f": docker {verb} ")[2]) == machine.calls(verb)[-1]


def test_what_is_left_of_one_that_has_ended_is_no_obstacle(machine: Machine) -> None:
    machine.call("--docker", "--detach", "--break")
    assert machine.containers[NAME]["status"] == "exited"
    machine.start()
    assert machine.containers[NAME]["status"] == "running"


def test_one_in_a_terminal_is_stopped_from_another_one(machine: Machine) -> None:
    process = machine.project.start("--docker", **machine.environ)
    assert process.stdout is not None
    assert any("Ready" in line for line in process.stdout)
    assert "--detach" not in machine.calls("run")[-1]
    machine.localize("stop", "--docker")
    process.communicate(timeout=30)
    assert machine.containers == {}


class TestGPU:
    GPUS = 'echo "0, 100, {driver}, NVIDIA A"; echo "1, 200, {driver}, NVIDIA B"'

    def test_the_chosen_one_is_given(self, machine: Machine) -> None:
        machine.project.nvidia_smi(self.GPUS.format(driver="580.95"))
        machine.project.program("nvidia-ctk", "")
        machine.set(runtimes="runc nvidia")
        assert "Toolkit" not in machine.start()
        assert value_of("--gpus", machine.calls("run")[-1]) == '"device=1"'

    def test_none_if_none_is_wanted(self, machine: Machine) -> None:
        machine.project.nvidia_smi(self.GPUS.format(driver="580.95"))
        machine.start(GPU_ID="none")
        assert "--gpus" not in machine.calls("run")[-1]

    def test_a_docker_that_cannot_give_one(self, machine: Machine) -> None:
        machine.project.nvidia_smi(self.GPUS.format(driver="580.95"))
        said = machine.refuse("--docker", "--detach")
        assert "NVIDIA Container Toolkit" in said
        assert "could not select device driver" in said

    def test_none_by_the_users_own_choice(self, machine: Machine) -> None:
        machine.start(CUDA_VISIBLE_DEVICES="-1")
        assert "--gpus" not in machine.calls("run")[-1]

    @pytest.mark.parametrize("own", [{}, {"CUDA_VISIBLE_DEVICES": "1"}], ids=["ours", "theirs"])
    def test_a_driver_that_is_too_old_for_what_would_be_built(self, machine: Machine, own: dict[str, str]) -> None:
        machine.project.requirements.write_text("torch==2.13.0\n")
        machine.project.nvidia_smi(self.GPUS.format(driver="535.1"))
        for arguments in (["--detach"], ["--check"]):
            said = machine.refuse("--docker", *arguments, **own)
            assert "Driver 535.1 is too old for torch with CUDA 13, which needs 580" in said
        assert machine.calls("build") == []

    def test_a_driver_that_is_too_old_for_the_image(self, machine: Machine) -> None:
        machine.project.nvidia_smi(self.GPUS.format(driver="535.1"))
        said = machine.refuse("--docker", "--detach")
        assert "Driver 535.1 is too old for torch with CUDA 13, which needs 580" in said


def test_a_port_that_is_said_is_the_one_that_is_meant(machine: Machine) -> None:
    machine.start()
    other = str(free_port())
    assert f"No app of this script runs on port {other}" in machine.localize("stop", "--port", other)
    assert machine.call("status", PORT=other)[0] == 3
    assert machine.containers[NAME]["status"] == "running"
    assert "Ready" in machine.localize("restart", "--port", machine.port)


def test_one_of_another_name_is_found(machine: Machine) -> None:
    machine.start("--container-name", "mine")
    assert "Container mine: running" in machine.localize("status", PORT="")
    assert "Container mine: running" in machine.localize("status"), "by its port"
    assert "Container mine: running" in machine.localize("status", "--docker", PORT="")
    machine.localize("stop", PORT="")
    assert machine.containers == {}


def test_several_are_listed_with_the_way_to_name_one(machine: Machine) -> None:
    port = str(free_port())
    machine.start()
    machine.start("--container-name", "another", PORT=port)
    for arguments in (["stop"], ["stop", "--docker"]):
        code, said = machine.call(*arguments, PORT="")
        assert (code, "2 apps are running. Choose one:" in said) == (1, True), said
        assert f"port {machine.port}, container {NAME}, since 2026-01-02 0" in said
        assert "stop --docker --container-name another" in said
    machine.localize("stop", "--docker", "--container-name", "another", PORT="")
    assert machine.containers.keys() == {NAME}


def test_a_name_that_a_sandbox_may_have_set_is_said_with_its_source(machine: Machine) -> None:
    assert "'sandbox-7', from the variable CONTAINER_NAME" in machine.start(CONTAINER_NAME="sandbox-7")
    assert machine.containers.keys() == {"sandbox-7"}
    machine.localize("stop", PORT="")
    said = machine.start(CONTAINER_NAME="sandbox-7", GPU_TTS_CONTAINER_NAME="mine")
    assert "variable CONTAINER_NAME" not in said
    assert machine.containers.keys() == {"mine"}
    # In a shell that has none, or another one, it is found all the same.
    assert "Container mine" in machine.localize("status", "--docker", PORT="", CONTAINER_NAME="sandbox-8")
    machine.localize("stop", PORT="", CONTAINER_NAME="sandbox-8")
    assert machine.containers == {}


def test_one_that_runs_is_found_behind_the_record_of_a_process_that_has_ended(machine: Machine) -> None:
    records = machine.project.folder / ".run"
    records.mkdir()
    write_record(records, machine.port, 999999999)
    machine.start()
    assert "EXEC" in machine.localize("status")
    machine.localize("stop")
    assert machine.containers == {}


def test_a_restart_refuses_what_it_cannot_change(machine: Machine) -> None:
    machine.start()
    assert "start --docker --replace" in machine.refuse("restart", "--docker", "--gpu-idle-timeout", "1h")
    assert "start --docker --replace" in machine.refuse("restart", "--docker", "--simulate-gpu", "48GB")


class TestARestartThatFails:
    def test_it_serves_again_after_a_second_start(self, machine: Machine) -> None:
        machine.start()
        machine.set(ends=1)
        code, said = machine.call("restart")
        assert (code, "is started again" in said, "runs again" in said) == (1, True, True), said
        assert "To restore" not in said
        assert machine.containers[NAME]["status"] == "running"

    def test_it_is_said_that_it_is_down(self, machine: Machine) -> None:
        machine.start()
        machine.set(ends=2)
        code, said = machine.call("restart")
        assert (code, f"nothing runs on port {machine.port} now" in said) == (1, True), said
        assert machine.containers[NAME]["status"] == "exited"
        assert "Ready" in machine.localize("restart", "--docker")

    def test_one_that_docker_leaves_alone_serves_as_before(self, machine: Machine) -> None:
        machine.start()
        machine.set(failing=["restart"])
        code, said = machine.call("restart")
        assert (code, "still serves" in said) == (1, True), said
        assert machine.containers[NAME]["status"] == "running"


@pytest.mark.parametrize("action", ["start", "stop", "status", "logs", "restart"])
def test_a_docker_that_does_not_answer(machine: Machine, action: str) -> None:
    machine.set(down=True)
    said = machine.refuse(action, "--docker")
    assert "docker does not respond: Cannot connect to the Docker daemon" in said


def test_no_docker(machine: Machine) -> None:
    (machine.project.bin / "docker").unlink()
    assert "docker is not installed" in machine.refuse("--docker")


def test_a_port_in_use(machine: Machine) -> None:
    machine.start()
    said = machine.refuse("--docker", "--detach", "--container-name", "another")
    assert f"port {machine.port}: it is in use" in said


def test_the_port_that_is_suggested_is_free(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 65535)), socket.create_server(("127.0.0.1", 1024)):
        said = machine.refuse("--docker", "--check", PORT="65535")
    assert "--port 1025" in said


LOWEST = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
CLOSED = pytest.mark.skipif(LOWEST.exists() and int(LOWEST.read_text()) < 2, reason="here anybody may take any port")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "192.0.2.1"], "192.0.2.1"),
        pytest.param(["--port", "1"], "no rights to a port below", marks=CLOSED),
    ],
)
def test_where_it_cannot_listen_nothing_is_stopped(machine: Machine, arguments: list[str], why: str) -> None:
    machine.set(containers={NAME: OLD})
    said = machine.refuse("--docker", "--detach", "--replace", *arguments)
    assert "Cannot listen on HOST" in said
    assert why in said
