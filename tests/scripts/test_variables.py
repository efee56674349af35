"""Settings by variable: names of this project's own, the short ones, and those that others set as well."""

from __future__ import annotations

from pathlib import Path

import pytest
from script_project import Project, app_line, free_port, ready_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return ready_project(tmp_path_factory.mktemp("variables"))


def value(seen: dict, flag: str) -> str:
    return seen["argv"][seen["argv"].index(flag) + 1]


def test_the_flag_wins_over_the_prefixed_name_and_that_over_the_short_one(project: Project) -> None:
    port = str(free_port())
    seen = project.serve(
        "--gpu-keep-warm", "3s",
        GPU_TTS_GPU_KEEP_WARM="2s", GPU_KEEP_WARM="1s",
        GPU_TTS_GPU_IDLE_TIMEOUT="2m", GPU_IDLE_TIMEOUT="1m",
        GPU_TTS_PORT=port, PORT="1", GPU_TTS_HOST="localhost", HOST="127.0.0.1",
    )  # fmt: skip
    assert value(seen, "--gpu-keep-warm") == "3s"
    assert value(seen, "--gpu-idle-timeout") == "2m"
    assert value(seen, "--server-port") == port
    assert value(seen, "--server-name") == "localhost"
    assert value(project.serve(GPU_TTS_PORT="", PORT=port), "--server-port") == port, "an empty one is none"


def test_every_setting_has_a_prefixed_name_and_a_relative_folder_is_the_callers(project: Project) -> None:
    (project.bin / "checkout").mkdir()
    seen = project.serve(GPU_TTS_STEP_AUDIO_ROOT="checkout", GPU_TTS_GPU_SNAPSHOT_DIR="snapshots",
                         GPU_TTS_GPU_ISOLATION="process", GPU_TTS_GPU_RESIDUE="keep")  # fmt: skip
    assert value(seen, "--step-audio-root") == str(project.bin / "checkout")
    assert value(seen, "--gpu-isolation") == "process"
    assert value(seen, "--gpu-residue") == "keep"
    assert value(seen, "--gpu-snapshot-dir") == str(project.bin / "snapshots")
    _, said = project.run("--check", GPU_TTS_DETACH="1", GPU_TTS_RUN_DIR=str(project.bin / "run"))
    assert f"log: {project.bin}/run/" in said


@pytest.mark.parametrize("host", ["x86_64-conda-linux-gnu", "my-laptop", "localhost.localdomain"])
def test_a_host_that_a_compiler_or_a_shell_has_set_is_passed_over_and_that_is_said(project: Project, host: str) -> None:
    code, said = project.run(HOST=host)
    assert code == 0, said
    assert value(app_line(said), "--server-name") == "127.0.0.1"
    assert f"The variable HOST ('{host}') is ignored" in said
    assert "GPU_TTS_HOST" in said
    assert "is ignored" not in project.run("--host", "localhost", HOST=host)[1], "it does not matter then"
    assert "is ignored" not in project.run(GPU_TTS_HOST="localhost", HOST=host)[1]


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--host", "no.such.host.invalid"], {}, "HOST 'no.such.host.invalid' (--host)"),
        (["--server-name=192.0.2.1"], {}, "HOST '192.0.2.1' (--server-name)"),
        ([], {"GPU_TTS_HOST": "no.such.host.invalid"}, "HOST 'no.such.host.invalid' (variable GPU_TTS_HOST)"),
        ([], {"HOST": "192.0.2.1"}, "HOST '192.0.2.1' (variable HOST)"),
        (["--port", "http"], {}, "PORT 'http' (--port)"),
        ([], {"GPU_TTS_PORT": "http"}, "PORT 'http' (variable GPU_TTS_PORT)"),
        ([], {"PORT": "http"}, "PORT 'http' (variable PORT)"),
        ([], {"GPU_TTS_GPU_IDLE_TIMEOUT": "soon"}, "GPU_IDLE_TIMEOUT 'soon' (variable GPU_TTS_GPU_IDLE_TIMEOUT)"),
        ([], {"GPU_TTS_MODEL_PATH": "/no/model"}, "MODEL_PATH '/no/model' (variable GPU_TTS_MODEL_PATH)"),
        ([], {"GPU_TTS_DETACH": "yes"}, "DETACH 'yes' (variable GPU_TTS_DETACH)"),
    ],
)
def test_what_is_wrong_is_said_with_its_source(
    project: Project, arguments: list[str], environ: dict[str, str], named: str
) -> None:
    assert named in project.refuse(*arguments, **environ)


def test_a_value_of_the_last_start_is_said_to_be_one(project: Project, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    port, run_dir = str(free_port()), str(tmp_path / "run")
    code, said = project.run("--detach", "--serve", "--model-path", str(models), PORT=port, RUN_DIR=run_dir)
    assert code == 0, said
    models.rmdir()
    code, said = project.run("restart", PORT=port, RUN_DIR=run_dir)
    assert (code, f"MODEL_PATH '{models}' (of the last start)" in said) == (1, True), said
    assert project.run("stop", PORT=port, RUN_DIR=run_dir)[0] == 0


def test_the_name_of_a_sandbox_is_none_of_a_process(project: Project) -> None:
    assert "sandbox" not in project.run("--check", CONTAINER_NAME="sandbox-7")[1]
