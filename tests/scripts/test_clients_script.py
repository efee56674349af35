"""``scripts/test_clients`` says that it skips, and why; where its tests are required, it fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("required", "code"), [("", 0), ("1", 1)])
def test_without_a_newer_python_it_says_what_did_not_run(tmp_path: Path, required: str, code: int) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        (programs / name).write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.11.2\n')
        (programs / name).chmod(0o755)
    places = {"VENV_DIR": str(tmp_path / "app"), "VENV_CLIENTS_DIR": str(tmp_path / "clients"), "HOME": str(tmp_path)}
    environ = {**os.environ, **places, "REQUIRE_CLIENTS": required, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "scripts" / "test_clients"], env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "SKIPPED: the tests with wyoming-openai (Home Assistant) did NOT run" in done.stdout
    assert "needs Python 3.12 or newer" in done.stdout
    assert "Python 3.11.2" in done.stdout
    assert not (tmp_path / "app").exists(), "nothing was installed for it"
