"""Sends malformed uploads and calls to a running app, and checks the responses.

    python benchmarks/fuzz.py                     # 500 uploads, and 2,000 calls that schemathesis makes up

Uploads: each must be used for speech, or refused with a message in both languages; no crash, and no files left on the
disk or outside the folder of recordings. Calls: no server error and no response that the OpenAPI description does not
contain, for all calls except ``/gpu/events``, which does not end. The speech API, under ``/v1``, gets as many with an
engine that computes nothing, and with names and recordings that are valid in half of them (`_speech_cases`), and
`--builtin` of them go to the built-in engine. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import psutil
import soundfile
from _uploads import FILE, Upload, uploads
from app_process import RunningApp, wait_until

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--max-upload", "20MB", "--gpu-keep-warm", "60")
#: Deletes recordings at the end of their session, and unused ones early.
PRELUDE = """
from residency.web import page
from residency.web.server import heartbeats
from residency.web.speech import recordings
heartbeats.LEFT_FOR_S, recordings.UNOWNED_FOR_S, page._SWEEP_EVERY_S = 0, 10, 1
"""
#: Arguments of schemathesis for the speech API: no schema describes recordings, and all values of a form are texts.
SPEECH = ("--include-path-regex", "^/v1/", "--exclude-checks", "positive_data_acceptance,negative_data_rejection")
HOOKS = "_speech_cases"
PATIENCE_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--uploads", type=int, default=500, help="how many (500)")
    add("--cases", type=int, default=2000, help="calls that schemathesis makes up, at least (2000; 0: none)")
    add("--builtin", type=int, help="of them for the speech API with the built-in engine (an eighth)")
    add("--seed", type=int, default=1)
    options = parser.parse_args()
    builtin = options.cases // 8 if options.builtin is None else options.builtin
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, seed {options.seed}")
    failures = 0
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "recordings")
        with RunningApp(folder, *ARGUMENTS, prelude=PRELUDE) as app:
            if options.uploads:
                failures += upload_all(app, folder, options.uploads, options.seed)
            if options.cases:
                failures += call_all(app, options.cases, options.seed, "--exclude-path-regex", "^/gpu/events$|^/v1/")
            if builtin:
                failures += call_all(app, builtin, options.seed, *SPEECH)
            crashed = app.process.poll() is not None or app.get("/healthz")[0] != 200
            failures += crashed or app.stop() != 0
        if options.cases:
            gates = Path(home, "gates")
            gates.mkdir()
            voices = ("--voices-dir", str(gates / "voices"))
            with RunningApp(folder, *ARGUMENTS, *voices, "--enable-auto-transcribe", gates=gates) as app:
                failures += call_all(app, options.cases, options.seed, *SPEECH)
                failures += app.stop() != 0
            shutil.rmtree(gates)
        left = [str(path.relative_to(home)) for path in Path(home).rglob("*") if path != folder]
        print(f"{'crashed' if crashed else 'served to the end'}; files left: {left or 'none'}")
        failures += len(left)
    sys.exit(1 if failures else 0)


def upload_all(app: RunningApp, folder: Path, count: int, seed: int) -> int:
    """Sends every upload in its own session; returns the number of wrong responses."""
    process = psutil.Process(app.process.pid)
    seen: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    rss: list[int] = []
    for upload in uploads(count, seed):
        verdict, said = judged(app, upload)
        seen.setdefault(upload.kind, Counter())[verdict] += 1
        if verdict == "wrong":
            wrong.append(f"{upload.kind}, {upload.name[:60]!r}: {said[:300]}")
        rss.append(process.memory_info().rss)
    print(f"\n{'uploads':28}{'spoken':>8}{'refused':>9}{'wrong':>7}")
    for kind, verdicts in sorted(seen.items()):
        print(f"{kind:28}{verdicts['spoken']:8}{verdicts['refused']:9}{verdicts['wrong']:7}")
    print("\n".join(wrong))
    quarter = len(rss) // 4
    print(f"memory of the app after a quarter of them and at the end: {rss[quarter] / 1e6:.0f}, {rss[-1] / 1e6:.0f} MB")
    remain = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    wait_until(lambda: not any(path.exists() for path in remain))
    late = [str(path.relative_to(folder)) for path in remain if path.exists()]
    print(f"files that outlive their session: {late or 'none'}")
    return len(wrong) + len(late)


def judged(app: RunningApp, upload: Upload) -> tuple[str, str]:
    """Returns ``spoken``, ``refused`` or ``wrong``, and the response."""
    session = uuid.uuid4().hex[:10]
    with in_session(app, session):
        code, said = post_file(app, upload)
        if code != 200:
            return ("refused" if code in (400, 413) and not upload.good else "wrong"), f"upload: {code} {said}"
        file = {"path": json.loads(said)[0], "meta": {"_type": "gradio.FileData"}}
        body = {"data": _filled_in(upload.data, file), "session_hash": session}
        code, said = call(app, "/gradio_api/call/clone", json.dumps(body).encode(), "application/json")
        if code != 200:
            return ("refused" if 400 <= code < 500 and not upload.good else "wrong"), f"call: {code} {said}"
        code, said = call(app, f"/gradio_api/call/clone/{json.loads(said)['event_id']}")
        event, _, data = said.rpartition("event: ")[2].partition("\ndata: ")
        if event == "complete":
            return ("spoken" if audible(app, json.loads(data)[0]["path"]) else "wrong"), said
        clear = (
            re.search("[\u4e00-\u9fff]", json.dumps(json.loads(data), ensure_ascii=False))
            and "engine failed" not in data
        )
        return ("refused" if event == "error" and clear and not upload.good else "wrong"), said


def _filled_in(data: object, file: object) -> object:
    if isinstance(data, list | tuple):
        return [_filled_in(part, file) for part in data]
    return file if data == FILE else data


@contextmanager
def in_session(app: RunningApp, session: str) -> Iterator[None]:
    """Keeps the heartbeat connection of pages and ``gradio_client`` open."""
    line = urllib.request.urlopen(f"{app.url}/gradio_api/heartbeat/{session}", timeout=PATIENCE_S)
    reader = threading.Thread(target=line.readline)
    reader.start()
    try:
        yield
    finally:
        reader.join()
        line.close()


def post_file(app: RunningApp, upload: Upload) -> tuple[int, str]:
    name = upload.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "%0A")
    head = f'--b0undary\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = (head + upload.content + b"\r\n") * upload.copies + b"--b0undary--\r\n"
    return call(app, "/gradio_api/upload", body, "multipart/form-data; boundary=b0undary")


def call(app: RunningApp, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, str]:
    request = urllib.request.Request(app.url + path, body, {"Content-Type": kind} if body is not None else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def audible(app: RunningApp, path: str) -> bool:
    with urllib.request.urlopen(f"{app.url}/gradio_api/file={path}", timeout=PATIENCE_S) as answer:
        samples, rate = soundfile.read(io.BytesIO(answer.read()))
    return rate == 24000 and 0.2 < len(samples) / rate < 10 and abs(samples).max() > 0.01


def call_all(app: RunningApp, cases: int, seed: int, *which: str) -> int:
    """Runs schemathesis for some calls; returns the number of kinds of failures, plus 1 if it made too few calls."""
    command = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [str(command), "run", f"{app.url}/openapi.json", *which, "--checks", "all",
         "--max-examples", str(cases // 4), "--request-timeout", str(PATIENCE_S), "--seed", str(seed), "--no-color"],
        capture_output=True, text=True, cwd=Path(__file__).parent, env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS},
    )  # fmt: skip
    generated = re.search(r"(\d+) generated", done.stdout)
    made = int(generated[1]) if generated else 0
    errors = app.log.count("A call over HTTP failed")
    print(f"\nschemathesis: {made} calls, exit status {done.returncode}, errors in the log: {errors}")
    if done.returncode or made < cases:
        print(done.stdout[-4000:] + done.stderr[-2000:])
    return bool(done.returncode) + (made < cases) + errors


if __name__ == "__main__":
    main()
