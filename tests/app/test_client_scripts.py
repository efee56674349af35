"""Python programs in the documents that use the speech API, run as printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import ForkedApp, RunningApp, wait_until
from fork_server import ROOT, ForkedProcess
from gated_engine import close_gate, open_gate

PROGRAMS = {
    f"{page} {number}": code
    for page in ("speech-api.md", "clients.md")
    for number, code in enumerate(
        re.findall(
            r"^```python\n(.*?)^```",
            (ROOT / "docs" / "en" / page).read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        ),
        1,
    )
    if "from openai import" in code
}

RATE = 24000

#: Each sentence waits at a gate with the name of its first word.
_NAMED_GATES = f"""
import torch
def clone(self, recording, text, sentence):
    gated_engine._pass(sentence.split()[0])
    print("spoken:", sentence, flush=True)
    return torch.full((1, {RATE}), 0.25), {RATE}
gated_engine.BuiltinEngine.clone = clone
"""

#: In place of the sound card, which writes what it plays to a file.
SPEAKER = """
from typing import Any

class RawOutputStream:
    def __init__(self, samplerate: int, channels: int, dtype: str) -> None:
        assert (samplerate, channels, dtype) == (24000, 1, "int16")

    def __enter__(self) -> "RawOutputStream":
        self.played = open("played", "wb", buffering=0)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.played.close()

    def write(self, samples: bytes) -> None:
        assert len(samples) % 2 == 0, "PortAudio refuses half samples"
        self.played.write(samples)
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    with ForkedApp(tmp_path_factory.mktemp("app") / "tmp", gates=gates, prelude=_NAMED_GATES) as app:
        yield app


def start(code: str, app: RunningApp, folder: Path) -> ForkedProcess:
    (folder / "sounddevice.py").write_text(SPEAKER, encoding="utf-8")
    assert "http://127.0.0.1:7860/v1" in code
    code = code.replace("127.0.0.1:7860", f"127.0.0.1:{app.port}")
    return ForkedProcess(code, [], os.environ, folder, [folder])


def end(program: ForkedProcess) -> None:
    with program.stdout:
        output = program.stdout.read()
    assert program.wait(timeout=60) == 0, output


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_it_runs_as_printed(app: RunningApp, tmp_path: Path, code: str) -> None:
    end(start(code, app, tmp_path))
    (made,) = {path.name for path in tmp_path.iterdir()} & {"hello.mp3", "played"}
    assert (tmp_path / made).stat().st_size > 5000


PLAYERS = {name: code for name, code in PROGRAMS.items() if "sounddevice" in code}


@pytest.mark.parametrize("code", PLAYERS.values(), ids=PLAYERS)
def test_it_plays_the_first_sentence_before_the_second_one_is_made(
    app: RunningApp, gates: Path, tmp_path: Path, code: str
) -> None:
    app.forget_log()
    close_gate(gates, "Meanwhile")
    program = start(code, app, tmp_path)
    played = tmp_path / "played"
    assert wait_until(lambda: played.exists() and played.stat().st_size > RATE)
    assert app.log.count("spoken:") == 1
    open_gate(gates, "Meanwhile")
    end(program)
    assert played.stat().st_size > 2 * RATE * 1.9
    assert app.log.count("spoken:") == 2
