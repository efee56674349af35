"""The launcher runs in any supported Python, before there is an environment: it needs the standard library only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from script_project import ROOT, Project

LAUNCH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from residency.launch.__main__ import main
code = main("launch", ["--check", "--host", "localhost", "--port", "65000", "--simulate-gpu", "48GB"])
import residency.launch.command_line, residency.launch.environment
others = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names - {{"residency", "__main__"}}
assert not others, others
sys.exit(code)
"""


@pytest.mark.parametrize("python", [sys.executable, "python3.10", "python3.12", "python3.13"])
def test_it_needs_no_package(python: str) -> None:
    """`-S`: without site-packages; `-I`: without the caller's folder and variables."""
    probe = shutil.which(python)
    if probe is None or subprocess.run([probe, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no {python} here")
    done = subprocess.run([probe, "-S", "-I", "-B", "-c", LAUNCH], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing was changed" in done.stdout or "未做任何改动" in done.stdout


def test_an_old_python_first_on_the_path_is_passed_over(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", tmp_path / "bin")
    project.program("python3", "exit 1")
    newer = shutil.which("python3.11") or shutil.which("python3.10")
    if newer is None:
        pytest.skip("no other name of a Python here")
    assert project.run("--check")[0] == 0


def test_output_that_is_not_read_to_its_end_is_no_error() -> None:
    command = f'"{ROOT}/start_with_gpu_management.sh" --check --port 65000 --simulate-gpu 48GB | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "BrokenPipe" not in done.stderr
