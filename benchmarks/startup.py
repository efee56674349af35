"""Measures the start of ``app.py``: its help, a wrong flag, the page; and of the start script.

    python benchmarks/startup.py [--repeat 3] [--model-path DIR --step-audio-root DIR]

In the same run: Python alone, and Python with an import of Gradio, the lower limit for the page. Exits with 1 if a goal
is missed, or if a heavy module has been imported when the page is ready.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "onnxruntime", "tts", "tokenizer"}
HELP_WITHIN_S, PAGE_WITHIN_S, SCRIPT_WITHIN = 1.0, 5.0, 1.3
BARE, SCRIPT = "app.py, until /readyz", "start script, until /readyz"

# Runs app.py until it serves; then prints the imported modules and exits.
_UNTIL_IT_SERVES = """
import logging, os, runpy, sys
class Watch(logging.Handler):
    def emit(self, record):
        if "Serving on" in record.getMessage():
            print("modules:", *sys.modules, flush=True)
            os._exit(0)
logging.getLogger("app").addHandler(Watch())
sys.argv[0] = "app.py"
runpy.run_path("app.py", run_name="__main__")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model-path", help="for the real engine; nothing of it is loaded")
    parser.add_argument("--step-audio-root")
    options = parser.parse_args()
    real = [] if options.model_path is None else ["--model-path", options.model_path]
    real += [] if options.step_audio_root is None else ["--step-audio-root", options.step_audio_root]

    with tempfile.TemporaryDirectory() as folder:
        page = ["-c", _UNTIL_IT_SERVES, "--server-name", "127.0.0.1", "--tmp-dir", folder, "--enable-gpu-management"]
        commands = {
            "python": ["-c", ""],
            "python, which imports gradio": ["-c", "import gradio"],
            "app.py --help": ["app.py", "--help"],
            "app.py --gpu-keep-warm soon": ["app.py", "--gpu-keep-warm", "soon"],
            "page, built-in engine": page,
        } | ({"page, real engine": [*page, *real]} if real else {})
        times: dict[str, list[float]] = {name: [] for name in (*commands, BARE, SCRIPT)}
        imported: set[str] = set()
        for _ in range(options.repeat + 1):
            for name, command in commands.items():
                port = ["--server-port", str(_free_port())] if name.startswith("page") else []
                seconds, modules = _run([*command, *port])
                times[name].append(seconds)
                imported |= HEAVY & modules
            managed = ["--enable-gpu-management", "--tmp-dir", folder, "--server-name", "127.0.0.1", "--server-port"]
            times[BARE].append(_until_ready([sys.executable, "app.py", *managed], folder))
            times[SCRIPT].append(
                _until_ready(["./start_with_gpu_management.sh", "--tmp-dir", folder, "--port"], folder)
            )

    print(
        f"{date.today()}, Python {platform.python_version()}, medians of {options.repeat} after one to warm the cache\n"
    )
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:35}{seconds:8.2f} s{seconds / medians['python, which imports gradio']:8.2f} x gradio")
    helps = max(seconds for name, seconds in medians.items() if name.startswith("app.py -"))
    pages = max(seconds for name, seconds in medians.items() if name.startswith("page"))
    good = helps <= HELP_WITHIN_S and pages <= PAGE_WITHIN_S and not imported
    print(f"\nimported when the page is there, of {', '.join(sorted(HEAVY))}: {', '.join(sorted(imported)) or 'none'}")
    print(f"help and errors within {HELP_WITHIN_S:g} s, page within {PAGE_WITHIN_S:g} s: {'yes' if good else 'NO'}")
    ratio = statistics.median(ours / bare for ours, bare in zip(times[SCRIPT][1:], times[BARE][1:], strict=True))
    quick = ratio <= SCRIPT_WITHIN
    print(f"second start by the script, over app.py alone, in pairs: {ratio:.2f}, wanted <= {SCRIPT_WITHIN:g}: "
          f"{'yes' if quick else 'NO'}")  # fmt: skip
    return 0 if good and quick else 1


def _until_ready(command: list[str], folder: str) -> float:
    """Returns the seconds until it is ready; appends the port to the command."""
    port = _free_port()
    environ = {name: value for name, value in os.environ.items() if name not in ("PORT", "PROJECT_DIR")}
    environ |= {"VENV_DIR": sys.prefix, "RUN_DIR": f"{folder}/run"}
    began_s = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, str(port)], cwd=ROOT, env=environ, **quiet) as app:
        try:
            while app.poll() is None:
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                    return time.perf_counter() - began_s
                time.sleep(0.005)
        finally:
            app.terminate()
    raise SystemExit(f"It did not start: {command}")


def _run(command: list[str]) -> tuple[float, set[str]]:
    began_s = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began_s
    line = next((line for line in done.stdout.splitlines() if line.startswith("modules:")), "")
    if "-c" in command and "--tmp-dir" in command and not line:
        raise SystemExit(f"The page did not come up:\n{done.stderr}")
    return seconds, set(line.split()[1:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
