"""A docker for tests: keeps its books in a file, notes each call, and answers as the real one (28.2) does.

In FAKE_DOCKER, a folder: ``state.json``, ``calls.jsonl``. A container's process is this script's, and really listens.
A start script calls this a dozen times: run it with ``-S``, and import late what a call seldom needs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(os.environ["FAKE_DOCKER"])
STATE = FOLDER / "state.json"


def fail(words: str, code: int = 1) -> NoReturn:
    print(words, file=sys.stderr)
    sys.exit(code)


def options(arguments: list[str], flags: set[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options before the first other word, and from that on the rest; ``flags`` take no value."""
    found: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        name = rest.pop(0)
        found.setdefault(name, []).append("" if name in flags else rest.pop(0))
    return found, rest


def labels(found: dict[str, list[str]]) -> dict[str, str]:
    return dict(label.split("=", 1) for label in found.get("--label", []))


class Docker:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"containers": {}, "images": {}, "down": False, "runtimes": "runc"}
        if STATE.exists():
            self.state |= json.loads(STATE.read_text())
        self.containers, self.images = self.state["containers"], self.state["images"]

    def save(self) -> None:
        STATE.write_text(json.dumps(self.state, indent=1))

    def container(self, name: str) -> Any:
        if name not in self.containers:
            fail(f"Error response from daemon: No such container: {name}")
        return self.containers[name]

    def info(self, arguments: list[str]) -> None:
        if self.state["down"]:
            fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
        print(FOLDER if arguments else "Server:")

    def inspect(self, thing: Any, template: str) -> None:
        def value(match: re.Match[str]) -> str:
            what = match[1]
            if label := re.fullmatch(r'index \.Config\.Labels "(.*)"', what):
                return str(thing["labels"].get(label[1], ""))
            return str({
                ".State.Status": thing.get("status"),
                ".State.StartedAt": "2026-01-02T03:04:05.678Z",
                ".HostConfig.RestartPolicy.Name": thing.get("restart"),
                ".HostConfig.RestartPolicy.MaximumRetryCount": thing.get("retries", 0),
                ".HostConfig.AutoRemove": str(thing.get("auto_remove", False)).lower(),
                ".Id": thing.get("id"),
            }[what])  # fmt: skip

        print(re.sub(r"\{\{(.*?)\}\}", value, template))

    def build(self, arguments: list[str]) -> None:
        found, (folder,) = options(arguments, set())
        if self.state.get("offline"):
            fail("ERROR: failed to solve: python:3.11-slim-bookworm: failed to resolve source metadata: no such host")
        if not Path(folder, "Dockerfile").exists():
            fail("ERROR: failed to build: failed to read dockerfile: open Dockerfile: no such file or directory")
        self.images[found["--tag"][0]] = {"labels": labels(found)}

    def run(self, arguments: list[str]) -> None:
        found, (image, *command) = options(arguments, {"--detach", "--init", "--rm"})
        if image not in self.images:
            fail(f"docker: Error response from daemon: pull access denied for {image}", 125)
        if "--entrypoint" in found:
            print(self.images[image].get("torch", "cuda: Optional[str] = '13.0'"))
            return
        name = found["--name"][0]
        if name in self.containers:
            fail(f'docker: Error response from daemon: Conflict. The container name "/{name}" is already in use', 125)
        if "--gpus" in found and "nvidia" not in self.state["runtimes"]:
            fail(
                'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]', 125
            )
        made = {
            "labels": labels(found),
            "restart": found.get("--restart", ["no"])[0],
            "image": image,
            "command": command,
        }
        if self.state.get("no_start"):
            self.containers[name] = made | {"status": "created"}
            self.save()
            fail("docker: Error response from daemon: failed to create task for container", 125)
        self.containers[name] = made
        if "--detach" in found:
            self.bring_up(made)
            print("0" * 64)
        else:
            made |= {"status": "running", "pid": os.getpid()}
            self.save()
            serve(command)
            sys.exit()  # whoever stopped it has written the books

    def bring_up(self, made: Any) -> None:
        import subprocess

        made["status"] = "exited"
        if self.state.get("ends", 0):
            self.state["ends"] -= 1
        elif "--break" not in made["command"]:
            served = subprocess.Popen(
                [sys.executable, "-S", __file__, "serve", *made["command"]],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            assert served.stdout
            served.stdout.readline()
            made |= {"status": "running", "pid": served.pid}

    def take_down(self, made: Any) -> None:
        if pid := made.pop("pid", None):
            os.kill(pid, signal.SIGKILL)
        made["status"] = "exited"

    def answer(self, arguments: list[str]) -> None:
        if self.state["down"]:
            self.info([])
        if arguments[0] in self.state.get("failing", []):
            fail("Error response from daemon: no space left on device")
        match arguments:
            case ["info", *rest]:
                self.info(rest)
            case ["container", "inspect", "--format", template, name]:
                self.inspect(self.container(name), template)
            case ["image", "inspect", "--format", template, name]:
                if name not in self.images:
                    fail(f"Error response from daemon: No such image: {name}:latest")
                self.inspect(self.images[name], template)
            case ["build", *rest]:
                self.build(rest)
            case ["run", *rest]:
                self.run(rest)
            case ["ps", "--filter", label, "--format", "{{.Names}}"]:
                label = label.removeprefix("label=")
                for name, made in self.containers.items():
                    if made["status"] == "running" and label in made["labels"]:
                        print(name)
            case ["start", name]:
                self.bring_up(self.container(name))
                print(name)
            case ["stop", "-t", _, name]:
                self.take_down(self.container(name))
                if self.container(name).get("auto_remove"):
                    del self.containers[name]
                print(name)
            case ["restart", "-t", _, name]:
                self.take_down(self.container(name))
                self.bring_up(self.container(name))
                print(name)
            case ["rm", name]:
                if self.container(name)["status"] == "running":
                    fail(f'Error response from daemon: cannot remove container "/{name}": container is running')
                del self.containers[name]
            case ["rename", old, new]:
                if new in self.containers:
                    fail(f'Error response from daemon: Conflict. The name "/{new}" is already in use')
                self.containers[new] = self.container(old)
                del self.containers[old]
            case ["update", "--restart", policy, name]:
                made = self.container(name)
                made["restart"], _, retries = policy.partition(":")
                made["retries"] = int(retries or 0)
            case ["logs", "--tail", _, *_, name]:
                print("LOG of", self.container(name)["command"])
            case ["exec", "--env", _, name, *command]:
                if self.container(name)["status"] != "running":
                    fail(f"Error response from daemon: container {name} is not running")
                print("EXEC", *command)
            case ["compose", "--profile", profile, "up" | "down", *_]:
                if f"profiles: [{profile}]" not in Path("compose.yaml").read_text(encoding="utf-8"):
                    fail("no service selected")
            case _:
                fail(f"docker: unknown command: {arguments}")
        self.save()


def serve(command: list[str]) -> None:
    """What the app does as far as the start script sees it."""
    import http.server
    import threading

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(command[command.index("--server-port") + 1])), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("APP", flush=True)
    signal.sigwait([signal.SIGTERM])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        with open(FOLDER / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(sys.argv[1:]) + "\n")
        Docker().answer(sys.argv[1:])
