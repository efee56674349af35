"""Home Assistant's protocol through the unmodified program wyoming-openai, which speaks with the served app.

Skipped without the environment of scripts/test_clients.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import ForkedApp, RunningApp, free_port, wait_until
from fork_server import ROOT
from gated_engine import close_gate, open_gate
from raw_http import ask

ENVIRONMENT = Path(os.environ.get("VENV_CLIENTS_DIR") or ROOT / ".venv-clients")
KEY = "a-key-of-the-app"
RATE = 24000
LEVELS = {"One": 0.1, "Two": 0.2, "Three": 0.3, "Four": 0.4}
CONVERSATION = (
    "One moment, please, I am going to look at the lights. Two of them are on. Three lamps have been off all day. "
    "Four are in the garden."
)

#: Speaks a constant level, which tells the sentence; the first sentence takes longest.
_TELLING = f"""
import torch
from residency.cancellation import checkpoint
levels = {LEVELS!r}
def clone(self, recording, text, sentence):
    gated_engine._pass("speak")
    checkpoint()
    print("spoken:", sentence, flush=True)
    level = levels.get(sentence.split()[0], 0.05)
    return torch.full((1, int({RATE} * (0.5 - level))), level), {RATE}
gated_engine.BuiltinEngine.clone = clone
"""

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "complete").exists(), reason="needs the environment of scripts/test_clients (Python 3.12)"
)


class Satellite:
    """A connection as Home Assistant opens one: events are a line of JSON, further JSON, and a payload."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Satellite:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, kind: str, payload: bytes = b"", **data: Any) -> None:
        event = {"type": kind, "data": data, "payload_length": len(payload)}
        self._socket.sendall(json.dumps(event).encode() + b"\n" + payload)

    def receive(self) -> tuple[str, dict[str, Any], bytes]:
        line = self._file.readline()
        assert line, "wyoming-openai closed the connection"
        event = json.loads(line)
        data = event.get("data") or {}
        if length := event.get("data_length"):
            data |= json.loads(self._file.read(length))
        return event["type"], data, self._file.read(event.get("payload_length") or 0)

    def receive_until(self, kind: str) -> list[tuple[str, dict[str, Any], bytes]]:
        events = [self.receive()]
        while events[-1][0] != kind:
            assert events[-1][0] != "error", events[-1]
            events.append(self.receive())
        return events


def levels_in(events: list[tuple[str, dict[str, Any], bytes]]) -> list[float]:
    """Returns the levels of the received sound, in order, without repetitions and cross-fades."""
    sound = np.frombuffer(b"".join(payload for kind, _, payload in events if kind == "audio-chunk"), "<i2") / 32768
    blocks = sound[: len(sound) // 240 * 240].reshape(-1, 240)
    levels = [round(float(block[0]), 2) for block in blocks if np.ptp(block) < 0.001]
    return [level for before, level in zip([None, *levels], levels, strict=False) if level != before]


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app")
    arguments = (
        "--enable-gpu-management", "--simulate-gpu", "48GB", "--enable-auto-transcribe",
        "--voices-dir", str(folder / "voices"),
    )  # fmt: skip
    with ForkedApp(folder / "tmp", *arguments, gates=gates, prelude=_TELLING) as app:
        yield app


@contextmanager
def wyoming(app: RunningApp, *arguments: str) -> Iterator[int]:
    """Runs wyoming-openai; yields the port of its server."""
    port = free_port()
    url, log = f"{app.url}/v1", app.tmp_dir.parent / f"wyoming-{port}.log"
    command = [
        str(ENVIRONMENT / "bin/python"), "-m", "wyoming_openai", "--uri", f"tcp://127.0.0.1:{port}",
        "--tts-openai-url", url, "--tts-openai-key", KEY, "--stt-openai-url", url, "--stt-openai-key", KEY,
        "--stt-models", "whisper-1", *arguments,
    ]  # fmt: skip
    program = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def listens() -> bool:
        assert program.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert wait_until(listens)
        yield port
    finally:
        program.kill()
        program.wait()


@pytest.fixture(scope="module")
def port(app: RunningApp, recording: str) -> Iterator[int]:
    """The server's port; the voices are those of the app, one of them stored before."""
    fields = {"name": "Ada", "text": "Good morning, this is a short recording of my voice."}
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}' for name, value in fields.items()]
    head = "".join(f"--x\r\n{part}\r\n" for part in parts)
    head += '--x\r\nContent-Disposition: form-data; name="file"; filename="ada.wav"\r\n\r\n'
    body = head.encode() + Path(recording).read_bytes() + b"\r\n--x--\r\n"
    stored = ask(
        app.port, "/v1/audio/voices", "Content-Type: multipart/form-data; boundary=x", method="POST", body=body
    )
    assert stored.status == 201, stored.text
    with wyoming(app, "--tts-backend", "KOKORO_FASTAPI", "--tts-streaming-models", "tts-1") as port:
        yield port


def test_the_voices_and_the_recognizer_are_offered(port: int) -> None:
    with Satellite(port) as satellite:
        satellite.send("describe")
        kind, info, _ = satellite.receive()
    assert kind == "info"
    (tts,) = info["tts"]
    assert [voice["name"] for voice in tts["voices"]] == ["high", "low", "Ada"]
    assert [model["name"] for model in info["asr"][0]["models"]] == ["whisper-1"]


@pytest.mark.parametrize("voice", ["high", "Ada"])
def test_a_whole_text(port: int, voice: str) -> None:
    """One request, whose sentences the app divides."""
    with Satellite(port) as satellite:
        satellite.send("synthesize", text=CONVERSATION, voice={"name": voice})
        events = satellite.receive_until("audio-stop")
    assert events[0][1] | {"timestamp": None} == {"rate": RATE, "width": 2, "channels": 1, "timestamp": None}
    assert levels_in(events) == list(LEVELS.values())


def test_a_conversation_prefetched_in_parallel_is_answered_in_order(app: RunningApp, gates: Path, port: int) -> None:
    """wyoming-openai requests the sentences that it knows to be complete at once: all but the last."""
    app.forget_log()
    close_gate(gates, "speak")
    with Satellite(port) as satellite:
        satellite.send("synthesize-start", voice={"name": "high"})
        satellite.send("synthesize-chunk", text=CONVERSATION)
        satellite.send("synthesize-stop")
        together = wait_until(lambda: (app.model()["leases"], app.model()["waiting"]) == (1, 2))
        open_gate(gates, "speak")
        assert together
        events = satellite.receive_until("synthesize-stopped")
    assert levels_in(events) == list(LEVELS.values())
    assert app.log.count("spoken:") == 4, "each sentence once"
    assert app.model()["leases"] == 0


def test_text_that_arrives_word_by_word(port: int) -> None:
    """As from a language model: each sentence is spoken once it is complete."""
    with Satellite(port) as satellite:
        satellite.send("synthesize-start", voice={"name": "high"})
        for word in CONVERSATION.split():
            satellite.send("synthesize-chunk", text=f"{word} ")
        satellite.send("synthesize-stop")
        assert levels_in(satellite.receive_until("synthesize-stopped")) == list(LEVELS.values())


def test_transcription(port: int) -> None:
    sound = np.zeros(16000, "<i2").tobytes()
    form = {"rate": 16000, "width": 2, "channels": 1}
    with Satellite(port) as satellite:
        satellite.send("transcribe", name="whisper-1", language="en")
        satellite.send("audio-start", **form)
        for begin in range(0, len(sound), 2048):
            satellite.send("audio-chunk", sound[begin : begin + 2048], **form)
        satellite.send("audio-stop")
        (*_, (_, data, _)) = satellite.receive_until("transcript")
    assert data["text"] == "16000 samples"


def test_with_an_api_key_the_voices_are_named_by_hand(tmp_path: Path) -> None:
    """wyoming-openai asks for the list of voices without its key."""
    gates = tmp_path / "gates"
    gates.mkdir()
    with (
        ForkedApp(tmp_path / "tmp", "--api-key", KEY, gates=gates, prelude=_TELLING) as app,
        wyoming(app, "--tts-models", "tts-1", "--tts-voices", "high", "low") as port,
        Satellite(port) as satellite,
    ):
        satellite.send("synthesize", text="Three lamps.", voice={"name": "low"})
        assert levels_in(satellite.receive_until("audio-stop")) == [0.3]
