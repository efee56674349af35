"""A docker for tests: keeps its state in a file, notes each call, and answers as the real one (28.2) does.

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
state: dict[str, Any] = {"containers": {}, "images": {}, "runtimes": "runc", "ends": 0, "failing": []}


def save() -> None:
    STATE.write_text(json.dumps(state, indent=1))


def fail(words: str, code: int = 1) -> NoReturn:
    sys.exit(print(f"Error response from daemon: {words}", file=sys.stderr) or code)


def find(kind: str, name: str) -> Any:
    return state[kind].get(name) or fail(f"No such {kind}: {name}")


def options(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the options before the first other word, and the rest from that on."""
    found: dict[str, list[str]] = {"--label": []}
    while words[0].startswith("-"):
        name, *words = words
        value, words = ("", words) if name in ("--detach", "--init", "--rm") else (words[0], words[1:])
        found.setdefault(name, []).append(value)
    return found, words


def labels(found: dict[str, list[str]]) -> dict[str, str]:
    return dict(label.split("=", 1) for label in found["--label"])


def inspect(thing: Any, template: str) -> None:
    facts = {
        ".State.Status": thing.get("status"), ".State.StartedAt": "2026-01-02T03:04:05.678Z", ".Id": thing.get("id"),
        ".HostConfig.RestartPolicy.Name": thing.get("restart"),
        ".HostConfig.RestartPolicy.MaximumRetryCount": thing.get("retries", 0),
        ".HostConfig.AutoRemove": str(thing.get("auto_remove", False)).lower(),
    }  # fmt: skip
    facts |= {f'index .Config.Labels "{name}"': value for name, value in thing["labels"].items()}
    print(re.sub(r"\{\{(.*?)\}\}", lambda match: str(facts.get(match[1], "")), template))


def run(words: list[str]) -> None:
    found, (image, *command) = options(words)
    if "--entrypoint" in found:
        print(find("images", image).get("torch", "cuda: Optional[str] = '13.0'"))
        return
    name = found["--name"][0]
    if image not in state["images"] or name in state["containers"]:
        fail("pull access denied, or the name is already in use", 125)
    if "--gpus" in found and "nvidia" not in state["runtimes"]:
        fail('could not select device driver "" with capabilities: [[gpu]]', 125)
    made = {"labels": labels(found), "restart": found.get("--restart", ["no"])[0], "image": image, "command": command}
    state["containers"][name] = made
    if state.get("no_start"):
        made["status"] = "created"
        save()
        fail("failed to create task for container", 125)
    if "--detach" in found:
        start(made)
    else:
        made |= {"status": "running", "pid": os.getpid()}
        save()
        serve(command)


def start(made: Any) -> None:
    made["status"] = "exited"
    if state["ends"]:
        state["ends"] -= 1
    elif "--break" not in made["command"]:
        import subprocess

        served = subprocess.Popen(
            [sys.executable, "-S", __file__, "serve", *made["command"]],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert served.stdout
        served.stdout.readline()
        made |= {"status": "running", "pid": served.pid}


def stop(made: Any) -> None:
    if pid := made.pop("pid", None):
        os.kill(pid, signal.SIGKILL)
    made["status"] = "exited"


def answer(arguments: list[str]) -> None:
    containers = state["containers"]
    if arguments[0] in state["failing"]:
        fail("no space left on device")
    match arguments:
        case ["info", *_]:
            print(FOLDER)
        case ["container" | "image" as kind, "inspect", "--format", template, name]:
            inspect(find(f"{kind}s", name), template)
        case ["build", *words]:
            found, (folder,) = options(words)
            if not Path(folder, "Dockerfile").exists():
                fail("failed to build")
            state["images"][found["--tag"][0]] = {"labels": labels(found)}
        case ["run", *words]:
            run(words)
        case ["ps", "--filter", label, "--format", "{{.Names}}"]:
            ours = (name for name, made in containers.items() if label.removeprefix("label=") in made["labels"])
            print(*(name for name in ours if containers[name]["status"] == "running"))
        case ["start", name]:
            start(find("containers", name))
        case ["stop" | "restart" as verb, "-t", _, name]:
            stop(find("containers", name))
            if verb == "restart":
                start(containers[name])
            elif containers[name].get("auto_remove"):
                del containers[name]
        case ["rm", name] if find("containers", name)["status"] != "running":
            del containers[name]
        case ["rename", old, new] if new not in containers:
            containers[new] = find("containers", old)
            del containers[old]
        case ["update", "--restart", policy, name]:
            made = find("containers", name)
            made["restart"], _, retries = policy.partition(":")
            made["retries"] = int(retries or 0)
        case ["logs", "--tail", _, *_, name]:
            print("LOG of", find("containers", name)["command"])
        case ["exec", "--env", _, name, *command] if find("containers", name)["status"] == "running":
            print("EXEC", *command)
        case ["compose", "--profile", profile, "up" | "down", *_]:
            if f"profiles: [{profile}]" not in Path("compose.yaml").read_text(encoding="utf-8"):
                fail("no service selected")
        case _:
            fail(f"cannot do: {arguments}")
    save()


def serve(command: list[str]) -> None:
    """Does what the start script sees of the app, until it is killed."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", int(command[command.index("--server-port") + 1])), Answer)
    print("APP", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    with open(FOLDER / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    if STATE.exists():
        state |= json.loads(STATE.read_text())
    if state.get("down"):
        sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    answer(sys.argv[1:])
