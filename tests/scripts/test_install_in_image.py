"""`scripts/install_in_image` in the image of a checkout: its packages are used, and none is installed twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from script_project import ROOT

PROJECT = """
[project]
dependencies = [
    "only-in-image>=1",
]

[project.urls]
"""


def packages_of(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def add_package(folder: Path, name: str) -> None:
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").touch()
    described = folder / f"{module}-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (described / "INSTALLER").write_text("uv\n")


def test_the_environment_of_a_newer_checkouts_image_is_used(tmp_path: Path) -> None:
    app, made, elsewhere = tmp_path / "app", tmp_path / "opt venv", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "scripts", app / "scripts")
    (app / "pyproject.toml").write_text(PROJECT)
    venv.create(app / ".venv", with_pip=False)  # as uv does
    for name in ("torch", "only-in-image"):
        add_package(packages_of(app / ".venv"), name)
    add_package(elsewhere, "linked")
    (packages_of(app / ".venv") / "linked.pth").write_text(f"{elsewhere}\n")
    done = subprocess.run(
        [str(app / "scripts" / "install_in_image"), str(made)],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Requirement already satisfied: only-in-image" in done.stdout
    program = "import torch, only_in_image, linked, pip; print(torch.__file__, pip.__file__)"
    found = subprocess.run(
        [made / "bin" / "python", "-Ic", program],
        capture_output=True, text=True, check=True,
    ).stdout.split(" /")  # fmt: skip
    assert found[0].startswith(str(app / ".venv"))
    assert str(made)[1:] in found[1]
