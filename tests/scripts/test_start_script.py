"""The start script, really run: in a project whose app prints how it was called and whose requirements are tiny."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from script_project import SETTINGS, Project, app_line, free_port, hide_programs


def _wheel(folder: Path, name: str, version: str, module: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", module)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Its environment was made by one real first start; tests that change it have a project of their own."""
    folder = tmp_path_factory.mktemp("start")
    project = Project(folder / "a project, 项目", folder / "bin")
    project.serve()
    return project


@pytest.fixture
def project(shared: Project) -> Iterator[Project]:
    yield shared
    (shared.bin / "nvidia-smi").unlink(missing_ok=True)


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path / "project", tmp_path / "bin")


GPUS = 'echo "0, 1034, 575.1, NVIDIA A"; echo "1, 40123, 575.1, NVIDIA B"; echo "2, 812, 575.1, NVIDIA C"'


def test_defaults_reach_the_app(project: Project) -> None:
    port = str(free_port())
    assert project.serve(PORT=port)["argv"] == [
        *(str(project.folder / "app.py"), "--enable-gpu-management", "--server-name", "127.0.0.1"),
        *("--server-port", port, "--gpu-idle-timeout", "600", "--gpu-keep-warm", "0"),
    ]


def test_the_default_port_is_gradios(project: Project) -> None:
    _, output = project.run("--check", PORT="")
    assert "7860" in output  # whether it is free here or in use


def test_a_flag_wins_over_the_environment(project: Project) -> None:
    seen = project.serve("--gpu-idle-timeout=-1", "--gpu-keep-warm", "90s", GPU_IDLE_TIMEOUT="15m", HOST="localhost")
    assert seen["argv"][2:4] == ["--server-name", "localhost"]
    assert seen["argv"][6:] == ["--gpu-idle-timeout", "-1", "--gpu-keep-warm", "90s"]


def test_other_arguments_go_on_to_the_app_unchanged(project: Project) -> None:
    seen = project.serve("--simulate-gpu", "48GB", "--control-token=a b=c", "--share")
    assert seen["argv"][2:6] == ["--simulate-gpu", "48GB", "--control-token=a b=c", "--share"]
    assert seen["cwd"] == str(project.bin), "relative paths among the arguments are the caller's"


def test_model_and_checkout_are_passed_on(project: Project, tmp_path: Path) -> None:
    seen = project.serve("--step-audio-root", str(tmp_path), MODEL_PATH=str(tmp_path))
    assert seen["argv"][-4:] == ["--model-path", str(tmp_path), "--step-audio-root", str(tmp_path)]


def test_a_model_path_may_be_the_id_of_a_hub(project: Project) -> None:
    seen = project.serve("--model-source", "huggingface", "--model-path", "stepfun-ai")
    assert seen["argv"][-2:] == ["--model-path", "stepfun-ai"]


def test_script_is_found_through_a_link(project: Project, tmp_path: Path) -> None:
    link = tmp_path / "start"
    link.symlink_to(project.folder / "start_with_gpu_management.sh")
    answer = subprocess.run([link, "--help"], capture_output=True, text=True, check=True)
    assert all(name in answer.stdout for name in SETTINGS), "the help tells every setting"


class TestGPU:
    def test_the_one_with_most_free_memory(self, project: Project) -> None:
        project.nvidia_smi(GPUS)
        code, output = project.run()
        assert code == 0
        assert "GPU: 1 (NVIDIA B), 40123 MiB free; most free memory of: 0 1 2" in output
        assert app_line(output)["cuda"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}

    def test_the_one_asked_for(self, project: Project) -> None:
        project.nvidia_smi(GPUS)
        assert project.serve("--gpu-id", "2", GPU_ID="0")["cuda"]["CUDA_VISIBLE_DEVICES"] == "2"

    def test_one_that_there_is_not(self, project: Project) -> None:
        project.nvidia_smi(GPUS)
        assert "GPU_ID '7' (variable GPU_ID); nvidia-smi lists: 0 1 2" in project.refuse(GPU_ID="7")

    def test_one_whose_memory_is_unknown(self, project: Project) -> None:
        project.nvidia_smi('echo "0, [N/A], 580.9, NVIDIA GB10"')
        assert project.serve()["cuda"]["CUDA_VISIBLE_DEVICES"] == "0"

    @pytest.fixture
    def patience(self, project: Project) -> Iterator[None]:
        """Less of it than people have."""
        module = project.package / "launch" / "choose_gpu.py"
        text = module.read_text()
        module.write_text(text.replace("NVIDIA_SMI_S = 30", "NVIDIA_SMI_S = 0.3"))
        yield
        module.write_text(text)

    def test_one_beside_a_broken_one(self, project: Project) -> None:
        project.nvidia_smi(
            'echo "0, 20000, 580.1, NVIDIA A"; echo "Unable to determine the device handle for GPU1"; exit 255'
        )
        assert project.serve()["cuda"]["CUDA_VISIBLE_DEVICES"] == "0"

    def test_the_users_own_choice_stays(self, project: Project) -> None:
        project.nvidia_smi(GPUS)
        assert project.serve(CUDA_VISIBLE_DEVICES="2,0")["cuda"] == {"CUDA_VISIBLE_DEVICES": "2,0"}

    @pytest.mark.parametrize(
        ("nvidia_smi", "reason"),
        [
            ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "version mismatch"),
            ("echo", "lists none"),
            (None, "nvidia-smi is not installed"),
            ("trap '' TERM; while :; do :; done", "does not respond within 0.3 s"),
        ],
    )
    def test_none_is_no_obstacle(self, project: Project, patience: None, nvidia_smi: str | None, reason: str) -> None:
        if nvidia_smi is not None:
            project.nvidia_smi(nvidia_smi)
        code, output = project.run()
        assert code == 0
        assert not app_line(output)["cuda"].get("CUDA_VISIBLE_DEVICES")
        line = next(line for line in output.splitlines() if line.startswith("GPU: none"))
        assert reason in line
        assert "GPU_ID '0' (variable GPU_ID) cannot be used" in project.refuse(GPU_ID="0")


class TestDriver:
    """Against the torch that is installed, by what that says of itself."""

    @pytest.fixture
    def torch(self, project: Project) -> Iterator[Path]:
        folder = next((project.folder / ".venv").glob("lib/python3*/site-packages")) / "torch"
        folder.mkdir()
        yield folder / "version.py"
        shutil.rmtree(folder)

    @pytest.mark.parametrize(("driver", "cuda"), [("580.65.06", "13.0"), ("535.1", "12.8"), ("525.60.13", "12.1")])
    def test_new_enough(self, project: Project, torch: Path, driver: str, cuda: str) -> None:
        torch.write_text(f"cuda: Optional[str] = '{cuda}'\nhip = None\n")
        project.nvidia_smi(f'echo "0, 1000, {driver}, NVIDIA A"')
        assert project.serve()["cuda"]["CUDA_VISIBLE_DEVICES"] == "0"

    @pytest.mark.parametrize(("driver", "cuda", "needed"), [("575.1", "13.0", 580), ("470.1", "12.8", 525)])
    def test_too_old(self, project: Project, torch: Path, driver: str, cuda: str, needed: int) -> None:
        torch.write_text(f"cuda = '{cuda}'\n")
        project.nvidia_smi(f'echo "0, 1000, {driver}, NVIDIA A"')
        said = project.refuse()
        assert f"Driver {driver} is too old for torch with CUDA {cuda[:2]}, which needs {needed} or newer" in said
        assert said == project.refuse("--check"), "the plan meets it too"
        assert project.serve(GPU_ID="none")["cuda"] == {"CUDA_VISIBLE_DEVICES": ""}

    @pytest.mark.parametrize("own", [{}, {"CUDA_VISIBLE_DEVICES": "0"}], ids=["ours", "theirs"])
    def test_too_old_for_what_would_be_installed(self, fresh: Project, own: dict[str, str]) -> None:
        fresh.requirements.write_text("torch==2.13.0\n")
        fresh.nvidia_smi('echo "0, 1000, 470.1, NVIDIA A"')
        for arguments in (["--check"], []):
            said = fresh.refuse(*arguments, **own)
            assert "Driver 470.1 is too old for torch with CUDA 13, which needs 580 or newer" in said
        assert not (fresh.folder / ".venv").exists(), "before gigabytes are fetched"
        assert "Nothing was changed" in fresh.run("--check", TORCH_INDEX_URL="https://example.org/cu126", **own)[1]

    def test_nobody_is_told_to_remove_an_environment_of_his_own(self, fresh: Project, tmp_path: Path) -> None:
        theirs = tmp_path / "theirs"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(theirs)], check=True)
        torch = next(theirs.glob("lib/python3*/site-packages")) / "torch"
        torch.mkdir()
        fresh.nvidia_smi('echo "0, 1000, 470.1, NVIDIA A"')
        (torch / "version.py").write_text("cuda = '12.8'\n")
        said = fresh.refuse("--check", VENV_DIR=str(theirs))
        assert f"install another torch into {theirs}" in said
        (torch / "version.py").write_text("cuda = None\n")
        said += fresh.run("--check", VENV_DIR=str(theirs))[1]
        assert f"To use it, install another torch into {theirs}" in said
        assert f"remove {theirs}" not in said

    def test_a_torch_that_cannot_use_it(self, project: Project, torch: Path) -> None:
        torch.write_text("cuda: Optional[str] = None\n")
        project.nvidia_smi(GPUS)
        _, output = project.run()
        assert "built without CUDA, so the GPU is not used" in output
        assert app_line(output)

    def test_none_without_a_gpu(self, project: Project, torch: Path) -> None:
        torch.write_text("cuda = '13.0'\n")
        assert project.serve()


class TestDisk:
    @pytest.mark.parametrize(("index", "needed"), [("https://download.pytorch.org/whl/cpu", 3000), ("", 9000)])
    def test_too_little(self, fresh: Project, index: str, needed: int) -> None:
        fresh.program("df", f'echo "Filesystem 1M-blocks Used Available"; echo "disk 99999 0 {needed - 1} 0% /"')
        said = fresh.refuse(TORCH_INDEX_URL=index, VENV_DIR=str(fresh.folder / "not" / "yet"))
        assert f"about {needed} MB" in said
        assert f"only {needed - 1} MB are free" in said
        assert not (fresh.folder / "not").exists()

    def test_what_is_installed_needs_none(self, project: Project) -> None:
        project.program("df", 'echo "disk 99999 0 0 0% /"')
        try:
            assert project.serve()
        finally:
            (project.bin / "df").unlink()


class TestModels:
    def test_a_file_is_none(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "weights").touch()
        assert "is not a readable folder" in project.refuse(MODEL_PATH=str(tmp_path / "weights"))

    def test_the_id_of_a_hub(self, project: Project) -> None:
        code, output = project.run("--model-path", "stepfun-ai")
        assert code == 0, output
        assert "used as the id of a hub" in output
        assert "stepfun-ai" in app_line(output)["argv"]
        assert "is not a readable folder" in project.refuse("--model-path", "stepfun-ai", "--model-source", "local")

    def test_one_at_home(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "weights").mkdir()
        assert f"{tmp_path}/weights" in project.serve("--model-path=~/weights", HOME=str(tmp_path))["argv"]

    def test_what_is_missing_in_the_folder_is_said(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "Step-Audio-Tokenizer").mkdir()
        _, output = project.run(MODEL_PATH=str(tmp_path))
        assert "has no Step-Audio-EditX:" in output
        assert app_line(output), "it may come later"
        (tmp_path / "config.json").write_text("{}")
        _, output = project.run(MODEL_PATH=str(tmp_path))
        assert "has no" not in output, "the folder of the model itself"
        (tmp_path / "config.json").unlink()
        (tmp_path / "Step-Audio-EditX-AWQ-4bit").mkdir()
        _, output = project.run(MODEL_PATH=str(tmp_path))
        assert "has no" not in output


class TestPort:
    def test_one_in_use(self, fresh: Project) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            said = fresh.refuse("--port", str(port))
        assert not (fresh.folder / ".venv").exists(), "it is said before the install, not after it"
        assert f"port {port}: it is in use" in said
        assert "--port" in said
        if shutil.which("ss") or shutil.which("lsof"):
            assert f"by pid {os.getpid()}" in said

    def test_one_in_use_on_a_machine_that_cannot_say_by_what(self, project: Project, tmp_path: Path) -> None:
        path = hide_programs({"ps", "nvidia-smi", "docker"}, tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            assert f"port {port}: it is in use" in project.refuse(PORT=str(port), PATH=path)

    def test_an_address_of_another_machine(self, project: Project) -> None:
        assert "Cannot listen on HOST '192.0.2.1'" in project.refuse(HOST="192.0.2.1")

    def test_a_port_that_was_just_left_is_free(self, project: Project) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                server.accept()[0].close()  # this end closes first, so it keeps the port in TIME_WAIT
        assert str(port) in project.serve("--server-port", str(port))["argv"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"PORT": "0"},
        {"PORT": "65536"},
        {"PORT": "http"},
        {"PORT": "80 80"},
        {"GPU_IDLE_TIMEOUT": "soon"},
        {"GPU_IDLE_TIMEOUT": "-2"},
        {"GPU_IDLE_TIMEOUT": "5d"},
        {"GPU_KEEP_WARM": "1e3"},
        {"MODEL_PATH": "/no/such/model"},
        {"STEP_AUDIO_ROOT": "/no/such/checkout"},
        {"PROJECT_DIR": "/no/such/project"},
    ],
    ids=str,
)
def test_wrong_settings_are_named(project: Project, wrong: dict[str, str]) -> None:
    said = project.refuse(**wrong)
    assert all(name in said and value in said for name, value in wrong.items())


@pytest.mark.parametrize("arguments", [["--port"], ["--docker=yes"], ["--gpu-id"], ["--port", "--check"]])
def test_arguments_that_cannot_be_followed(project: Project, arguments: list[str]) -> None:
    assert arguments[0].partition("=")[0] in project.refuse(*arguments)


def test_an_action_that_there_is_not(project: Project) -> None:
    assert "no action 'staus': start, stop, restart, status, logs" in project.refuse("staus")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "7861"], "unrecognized arguments: --prot 7861"),
        (["--simulate-gpu", "abc"], "'abc' is not a valid size"),
        (["--control-token"], "expected one argument"),
    ],
)
def test_what_the_app_would_refuse_is_said_before_anything_is_installed(
    fresh: Project, arguments: list[str], said: str
) -> None:
    fresh.take_the_real_parser()
    assert said in fresh.refuse(*arguments)
    assert said in fresh.refuse("--check", *arguments)
    assert not (fresh.folder / ".venv").exists()
    code, output = fresh.run("--check", "--simulate-gpu", "48GB", "--gpu-snapshot-dir", "snap shots")
    assert code == 0, output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("setting", ["VENV_DIR", "GPU_SNAPSHOT_DIR"])
def test_folders_that_cannot_be_written(fresh: Project, setting: str) -> None:
    assert f"{setting} '/proc/x/y' (variable {setting}) cannot be written" in fresh.refuse(
        "--check", **{setting: "/proc/x/y"}
    )


def test_a_file_in_the_place_of_a_folder(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = str(tmp_path / "file" / "below")
    assert f"GPU_SNAPSHOT_DIR '{wrong}' (variable GPU_SNAPSHOT_DIR) cannot be written" in project.refuse(
        GPU_SNAPSHOT_DIR=wrong
    )
    assert f"RUN_DIR '{wrong}' (variable RUN_DIR) cannot be written" in project.refuse("--detach", RUN_DIR=wrong)


def test_a_disk_that_fills_up_during_an_install_is_reported(fresh: Project) -> None:
    fresh.serve()
    fresh.requirements.write_text("# nothing more\n")
    script = fresh.folder / "start_with_gpu_management.sh"
    full = ["bash", "-c", 'ulimit -f 0; exec "$0"', script]
    environ = os.environ | {"PORT": str(free_port()), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    done = subprocess.run(full, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("❌ ")
    assert "Check the disk space" in done.stderr
    assert "Traceback" not in done.stderr
    fresh.serve()


def test_no_environment_is_made_in_a_checkout(fresh: Project, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    said = fresh.refuse("--check", STEP_AUDIO_ROOT=str(checkout), VENV_DIR=str(checkout / ".venv"))
    assert "has no tts.py" in said
    assert "creates none in a checkout" in said
    assert not list(checkout.iterdir())


def test_check_says_the_plan_and_does_nothing(fresh: Project) -> None:
    fresh.nvidia_smi(GPUS)
    before = sorted(fresh.folder.rglob("*"))
    code, output = fresh.run("--check", "--tmp-dir", "a b")
    assert code == 0
    assert "GPU: 1" in output
    assert f"{fresh.folder}/.venv will be created with" in output
    assert "app.py --enable-gpu-management --tmp-dir 'a b'" in output
    assert "APP" not in output
    assert "background" not in output
    code, output = fresh.run("--check", "--detach", PORT="7999")
    assert (code, f"log: {fresh.folder}/.run/7999.log, pid: {fresh.folder}/.run/7999.pid" in output) == (0, True)
    assert sorted(fresh.folder.rglob("*")) == before


def test_sigterm_reaches_the_app(project: Project) -> None:
    process = project.start("--until-sigterm")
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("APP "))
    assert app_line(line)["pid"] == process.pid, "the app takes the script's place"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert "stopped by SIGTERM" in output
    assert process.returncode == 0


class TestEnvironment:
    def test_from_half_made_to_changed_requirements(self, fresh: Project, tmp_path: Path) -> None:
        """One story, because every chapter that makes an environment costs seconds."""
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        first = _wheel(wheels, "greeting", "1.0", "WORDS = 'hello from 1.0'")
        fresh.requirements.write_text("greeting==1.0\n")

        # An install that fails ends the start and says what to do.
        said = fresh.refuse("--say-greeting")
        assert "could not be installed" in said
        assert "run this again" in said

        # The next start goes on; a killed start's ruins are cleared away first.
        (fresh.folder / ".venv" / "bin" / "python").unlink()
        _, output = fresh.run("--say-greeting", PIP_FIND_LINKS=str(wheels))
        assert "is incomplete" in output
        assert "hello from 1.0" in output

        # Now nothing is installed, so nothing is missed.
        first.unlink()
        _, output = fresh.run("--say-greeting")
        assert "is ready" in output
        assert "Installing" not in output
        assert "hello from 1.0" in output

        # Other requirements are installed on the next start.
        _wheel(wheels, "greeting", "2.0", "WORDS = 'hello from 2.0'")
        fresh.requirements.write_text("greeting==2.0\n")
        _, output = fresh.run("--say-greeting", PIP_FIND_LINKS=str(wheels))
        assert "needs an install" in output
        assert "hello from 2.0" in output

    def test_two_first_starts_at_once(self, fresh: Project, tmp_path: Path) -> None:
        """And PyTorch alone comes from TORCH_INDEX_URL."""
        page = tmp_path / "torch-index" / "torch"
        page.mkdir(parents=True)
        wheel = _wheel(page, "torch", "9.9", "")
        (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
        fresh.requirements.write_text('torch==9.9 ; python_version >= "3"\n')
        environ = {"TORCH_INDEX_URL": page.parent.as_uri(), "PIP_NO_INDEX": "0", "PIP_INDEX_URL": tmp_path.as_uri()}

        starts = [fresh.start("--number", str(number), **environ) for number in (1, 2)]
        outputs = [start.communicate(timeout=60)[0] for start in starts]

        assert [start.returncode for start in starts] == [0, 0], outputs
        assert all(app_line(output) for output in outputs)
        if shutil.which("flock"):
            assert sum("Successfully installed torch-9.9" in output for output in outputs) == 1, outputs

    def test_somebody_elses_is_left_alone(self, fresh: Project, tmp_path: Path) -> None:
        theirs = tmp_path / "theirs"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(theirs)], check=True)
        packages = next(theirs.glob("lib/python*/site-packages"))
        before = sorted(theirs.rglob("*"))
        fresh.requirements.write_text("torch==9.9\ngradio==9.9\nonnxruntime==1\nhibari-tts==0.2.1\n")

        assert "lacks torch gradio onnxruntime hibari-tts" in fresh.refuse(VENV_DIR=str(theirs))
        assert sorted(theirs.rglob("*")) == before

        for name in ("torch", "gradio", "onnxruntime_gpu"):
            with zipfile.ZipFile(_wheel(tmp_path, name, "9.9", "")) as wheel:
                wheel.extractall(packages)
        code, output = fresh.run(VENV_DIR=str(theirs))
        assert code == 0
        assert "lacks hibari-tts;" in output
        assert app_line(output)

    def test_a_folder_that_is_none_is_left_alone(self, fresh: Project, tmp_path: Path) -> None:
        diary = tmp_path / "diary" / "today.txt"
        diary.parent.mkdir()
        diary.write_text("dear diary")
        assert "is not a Python environment" in fresh.refuse(VENV_DIR=str(diary.parent))
        assert diary.read_text() == "dear diary"

    def test_no_usable_python(self, fresh: Project) -> None:
        for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
            (fresh.bin / name).write_text("#!/bin/sh\necho 'No module named ensurepip' >&2\nexit 1\n")
            (fresh.bin / name).chmod(0o755)
        assert "apt-get install python3 python3-venv" in fresh.refuse()


def test_an_environment_may_be_a_link_to_what_is_not_made_yet(project: Project, tmp_path: Path) -> None:
    link, disk = tmp_path / "environment", tmp_path / "disk"
    link.symlink_to(disk)
    project.serve(VENV_DIR=str(link))
    assert (disk / "pyvenv.cfg").exists()
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "no disk" / "environment")
    assert "cannot be written" in project.refuse("--check", VENV_DIR=str(nowhere))


def test_an_empty_flag_is_the_default(shared: Project) -> None:
    code, said = shared.run("--check", "--detach", "--venv-dir", "", "--run-dir=", "--host", "")
    assert code == 0, said
    assert f"{shared.folder}/.venv is ready" in said
    assert "log: " + str(shared.folder / ".run") in said
    assert "http://127.0.0.1:" in said
