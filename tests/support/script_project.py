"""The start script in a project with tiny requirements, whose app prints its arguments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from residency.launch.options import SETTINGS as LAUNCH_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "start_with_gpu_management.sh"
SETTINGS = {*LAUNCH_SETTINGS, "TORCH_INDEX_URL"}

OTHERS = {
    "CUDA_VISIBLE_DEVICES", "GPU_CONTROL_TOKEN", "GRADIO_AUTH", "GPU_TTS_ROOT_PATH", "GRADIO_ROOT_PATH",
    "GPU_TTS_ALLOWED_HOSTS", "GPU_TTS_API_KEYS", "GPU_TTS_CORS_ORIGINS", "GPU_TTS_VOICES_DIR",
}  # fmt: skip

APP = """\
import http.server, json, os, signal, sys, threading

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
cuda = {name: value for name, value in os.environ.items() if name.startswith("CUDA_")}
address = {name: value for name, value in os.environ.items() if name.endswith(("ROOT_PATH", "ALLOWED_HOSTS"))}
proxies = {name: os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY")}
secrets = {name: os.environ.get(name) for name in ("GPU_CONTROL_TOKEN", "GRADIO_AUTH")}
facts = {"argv": sys.argv, "pid": os.getpid(), "cwd": os.getcwd(), "cuda": cuda, "secrets": secrets, "proxies": proxies,
         "address": address}
print("APP", json.dumps(facts), flush=True)


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never-ready" in sys.argv else 200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


if "--break" in sys.argv:
    sys.exit("a mistake on purpose")
if "--serve" in sys.argv:
    port = int(sys.argv[sys.argv.index("--server-port") + 1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer)
    if "--ssl-certfile" in sys.argv:
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*(sys.argv[sys.argv.index(flag) + 1] for flag in ("--ssl-certfile", "--ssl-keyfile")))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
if "--serve" in sys.argv or "--until-sigterm" in sys.argv:
    for _ in range(2 if "--stubborn" in sys.argv else 1):
        signal.sigwait([signal.SIGTERM])
        print("SIGTERM came", flush=True)
    print("stopped by SIGTERM", flush=True)
if "--say-greeting" in sys.argv:
    import greeting
    print(greeting.WORDS)
"""

# Replaces residency.launch.command_line, which calls the app.
SHELL_COMMAND = """\
import urllib.request


def main(argv):
    print("ASKED", *argv)
    print("BY A PROXY", [host for host in ("127.0.0.1", "192.0.2.1") if not urllib.request.proxy_bypass(host)])
    return 0
"""


class Project:
    """A folder with the real script, a stub app, and an environment shared by all runs."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder
        self.bin = bin_folder
        self.requirements = folder / "requirements.txt"
        (folder / "scripts").mkdir(parents=True)
        bin_folder.mkdir()
        shutil.copy(SCRIPT, folder)
        shutil.copy(ROOT / "scripts" / "python", folder / "scripts")
        self.package = folder / "residency"
        for files in ("*.py", "launch/*.py", "scheduling/*.py"):
            for file in (ROOT / "residency").glob(files):
                copy = self.package / file.relative_to(ROOT / "residency")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
        self._parser = self.package / "launch" / "settings.py"
        self._parser.write_text(
            self._parser.read_text().replace("parse_args(argv, namespace)", "parse_known_args(argv, namespace)[0]")
        )
        (folder / "app.py").write_text(APP)
        (self.package / "launch" / "command_line.py").write_text(SHELL_COMMAND)
        self.requirements.write_text("")

    def take_the_real_parser(self) -> None:
        """Accepts only the arguments of the real app from now on, not also those of the stub app."""
        shutil.copy(ROOT / "residency" / "launch" / "settings.py", self._parser)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS | OTHERS}
        inherited = {name: value for name, value in inherited.items() if not name.startswith(("GPU_TTS_", "LC_"))}
        # Blocks access to registries, for every pip configuration of this machine.
        ours = {
            "PATH": f"{self.bin}:{hide_programs({'nvidia-smi', 'nvidia-ctk', 'docker'}, self.bin)}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "LANG": "C.UTF-8",
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
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def serve(self, *arguments: str, **environ: str) -> dict:
        """Runs to the end; returns what the app received."""
        code, output = self.run(*arguments, **environ)
        assert code == 0, output
        return app_line(output)

    def refuse(self, *arguments: str, **environ: str) -> str:
        """Runs a start that must fail before the app; returns the output."""
        code, output = self.run(*arguments, **environ)
        assert code != 0, output
        assert "APP" not in output
        assert "❌" in output
        return output

    def program(self, name: str, script: str) -> None:
        """Adds a shell script that precedes the machine's program of that name."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def nvidia_smi(self, script: str) -> None:
        self.program("nvidia-smi", script)


_environments: list[Path] = []


def ready_project(folder: Path) -> Project:
    """Returns a project with an environment, created by one real first start and copied from then on."""
    project = Project(folder / "a project", folder / "bin")
    if _environments:
        shutil.copytree(_environments[0], project.folder / ".venv", symlinks=True)
    else:
        project.serve()
        _environments.append(project.folder / ".venv")
    return project


class Caller:
    """Calls the start script of a project with fixed variables."""

    def __init__(self, project: Project, environ: dict[str, str]) -> None:
        self.project, self.environ = project, environ

    def call(self, *arguments: str, **environ: str) -> tuple[int, str]:
        return self.project.run(*arguments, **(self.environ | environ))

    def localize(self, *arguments: str, **environ: str) -> str:
        code, output = self.call(*arguments, **environ)
        assert code == 0, output
        return output


class Service(Caller):
    """An app that a project runs in the background, on its own port. It is killed at the end of the block."""

    def __init__(self, project: Project, run_dir: Path) -> None:
        self.run_dir, self.port = run_dir, str(free_port())
        self.log = run_dir / f"{self.port}.log"
        super().__init__(project, {"PORT": self.port, "RUN_DIR": str(run_dir)})

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError, ValueError):
            os.kill(self.pid, signal.SIGKILL)

    def start(self, *arguments: str, **environ: str) -> dict:
        """Returns what the app received."""
        assert "Ready: http://127.0.0.1:" + self.port in self.localize("--detach", "--serve", *arguments, **environ)
        return self.seen()

    def seen(self) -> dict:
        return app_line(self.log.read_text())

    @property
    def pid(self) -> int:
        return int((self.run_dir / f"{self.port}.pid").read_text())


def write_record(run_dir: Path, port: str, pid: int) -> None:
    """Writes the record of an app whose pid now belongs to another process, or to none."""
    record = {"pid": pid, "born": "12345", "log": "", "folder": "/", "arguments": [], "settings": {}}
    (run_dir / f"{port}.run").write_text(json.dumps(record))


def runs(pid: int) -> bool:
    """Returns whether a process runs; an ended orphan may not be reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def app_line(output: str) -> dict:
    return json.loads(next(line for line in output.splitlines() if line.startswith("APP ")).removeprefix("APP "))


def environment_like_ours(folder: Path) -> Path:
    """Creates an environment with this Python's packages, not created by the script."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    prefix = Path(sys.prefix)
    (folder / "lib").symlink_to(prefix / "lib")
    if (prefix / "pyvenv.cfg").exists():
        (folder / "pyvenv.cfg").symlink_to(prefix / "pyvenv.cfg")
    return folder


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def hide_programs(programs: set[str], scratch: Path) -> str:
    """Returns PATH with mirrors of all folders that contain these programs, without them."""
    folders = []
    for number, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        if any((Path(folder) / name).exists() for name in programs):
            mirror = scratch / f"mirror-{number}"
            if not mirror.exists():
                mirror.mkdir()
                for program in Path(folder).iterdir():
                    if program.name not in programs:
                        (mirror / program.name).symlink_to(program)
            folder = str(mirror)
        folders.append(folder)
    return os.pathsep.join(folders)
