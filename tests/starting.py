"""The start script in a project whose app prints how it was called and whose requirements are tiny."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = set(
    """PROJECT_DIR HOST PORT GPU_ID GPU_IDLE_TIMEOUT GPU_KEEP_WARM GPU_SNAPSHOT_DIR MODEL_PATH STEP_AUDIO_ROOT VENV_DIR RUN_DIR
    DOCKER DETACH REPLACE FOLLOW CONTAINER_NAME IMAGE BASE_IMAGE SOCKET_DIR READY_TIMEOUT STOP_TIMEOUT TORCH_INDEX_URL""".split()
)

APP = """\
import json, os, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
cuda = {name: value for name, value in os.environ.items() if name.startswith("CUDA_")}
print("APP", json.dumps({"argv": sys.argv, "pid": os.getpid(), "cwd": os.getcwd(), "cuda": cuda}), flush=True)
if "--until-sigterm" in sys.argv:
    signal.sigwait([signal.SIGTERM])
    print("stopped by SIGTERM")
if "--say-greeting" in sys.argv:
    import greeting
    print(greeting.WORDS)
"""


class Project:
    """A folder with the real script, a stub app and an environment that outlives the single run."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder
        self.bin = bin_folder
        self.requirements = folder / "requirements.txt"
        (folder / "scripts").mkdir(parents=True)
        bin_folder.mkdir()
        shutil.copy(ROOT / "start_with_gpu_management.sh", folder)
        for file in (ROOT / "scripts").glob("*.sh"):
            shutil.copy(file, folder / "scripts")
        (folder / "app.py").write_text(APP)
        self.requirements.write_text("")

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        inherited = {
            name: value for name, value in os.environ.items() if name not in SETTINGS | {"CUDA_VISIBLE_DEVICES"}
        }
        # Nothing here may reach a registry, whatever this machine's pip is told.
        ours = {
            "PATH": f"{self.bin}:{_path_without_nvidia_smi(self.bin)}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PORT": str(free_port()),
        }
        return subprocess.Popen(
            [str(self.folder / "start_with_gpu_management.sh"), *arguments],
            env=inherited | ours | environ,
            cwd=self.bin,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> tuple[int, str]:
        process = self.start(*arguments, **environ)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def serve(self, *arguments: str, **environ: str) -> dict:
        """Run to the end and return what the app saw."""
        code, output = self.run(*arguments, **environ)
        assert code == 0, output
        return app_line(output)

    def refuse(self, *arguments: str, **environ: str) -> str:
        """Run what must fail before the app starts, and return what was said."""
        code, output = self.run(*arguments, **environ)
        assert code != 0, output
        assert "APP" not in output
        assert "❌" in output
        return output

    def program(self, name: str, script: str) -> None:
        """A shell script that is found before the machine's own program of that name."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def nvidia_smi(self, script: str) -> None:
        self.program("nvidia-smi", script)


def app_line(output: str) -> dict:
    return json.loads(next(line for line in output.splitlines() if line.startswith("APP ")).removeprefix("APP "))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _path_without_nvidia_smi(scratch: Path) -> str:
    """PATH as it is, but for folders with nvidia-smi: those are mirrored without it."""
    folders = []
    for number, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        if (Path(folder) / "nvidia-smi").exists():
            mirror = scratch / f"mirror-{number}"
            if not mirror.exists():
                mirror.mkdir()
                for program in Path(folder).iterdir():
                    if program.name != "nvidia-smi":
                        (mirror / program.name).symlink_to(program)
            folder = str(mirror)
        folders.append(folder)
    return os.pathsep.join(folders)
