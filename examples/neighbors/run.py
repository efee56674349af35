"""Three speech services and a stranger on one simulated GPU that has room for one model at a time.

    python examples/neighbors/run.py

Each service speaks a sentence in turn, every few seconds. Their panels show how a model leaves for a request of another
service, and for the stranger. Ctrl-C ends all of them. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

HERE = Path(__file__).resolve().parent
APP = HERE.parents[1] / "app.py"

CARD, HEADROOM = "18MB,shared=demo", "2MB"
"""The built-in engine has 13 MB of weights: one fits, two do not, as of models of 40 GB on a card of 48 GB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ports", type=int, nargs=3, default=[7861, 7862, 7863], help="(7861 7862 7863)")
    parser.add_argument("--card", default=CARD, help=f"the simulated GPU ({CARD})")
    parser.add_argument("--script", help="what the stranger does; see stranger.py")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two sentences (3)")
    options = parser.parse_args()
    ports = options.ports
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        services = [stack.enter_context(running(service(port, options.card, folder))) for port in ports]
        for port, process in zip(ports, services, strict=True):
            wait_until_ready(port, process)
            print(f"service: panel at http://127.0.0.1:{port}", flush=True)
        for port in ports:  # each loads its model, and leaves for the next one
            speak(port)
        script = ["--script", options.script] if options.script else []
        stack.enter_context(running([str(HERE / "stranger.py"), options.card, *script]))
        for port in itertools.cycle(ports):
            speak(port)
            show(ports)
            time.sleep(options.every)


class running(subprocess.Popen[bytes]):
    """A Python program that is ended with the block."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__([sys.executable, *arguments])

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()
        self.wait()


def service(port: int, card: str, folder: Path) -> list[str]:
    return [
        str(APP), "--server-name", "127.0.0.1", "--server-port", str(port), "--tmp-dir", str(folder / str(port)),
        "--enable-gpu-management", "--gpu-keep-warm", "600", "--simulate-gpu", card,
        "--gpu-headroom", HEADROOM, "--gpu-share-dir", str(folder / "queue"),
    ]  # fmt: skip


def ask(port: int, path: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"http://127.0.0.1:{port}{path}", data), timeout=120) as answer:
        return bytes(answer.read())


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            ask(port, "/healthz")
            return
        except OSError:
            if process.poll() is not None:
                sys.exit("a service has ended: is its port in use? --ports chooses others")
            time.sleep(0.2)


def speak(port: int) -> None:
    began_s = time.monotonic()
    ask(port, "/v1/audio/speech", {"input": "Good neighbours share.", "voice": "high"})
    print(f"{port}: spoke after {time.monotonic() - began_s:.2f} s", flush=True)


def show(ports: list[int]) -> None:
    """Prints where the models are, and for how many needs of other programs they have left."""
    found: list[dict[str, Any]] = [json.loads(ask(port, "/gpu/status")) for port in ports]
    places = ", ".join(f"{port} {one['models']['tts']['state']}" for port, one in zip(ports, found, strict=True))
    print(
        f"models: {places}; left for the stranger: {sum(one['sharing']['yields'] for one in found)} times", flush=True
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("ended")
