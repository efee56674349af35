"""The calls under ``/v1`` over an engine of tones, without a server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from starlette.testclient import TestClient

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.errors import InvalidInput
from residency.scheduling.policies import keep_alive_seconds
from residency.web.api.control import build
from residency.web.api.slots import Slots
from residency.web.api.speech_calls import SpeechCalls
from residency.web.server.api_keys import ApiKeys
from residency.web.server.permissions import Permissions
from residency.web.speech.conversion import Limits
from residency.web.speech.queue import SpeechQueue
from residency.web.speech.recordings import Recordings
from residency.web.speech.service import SpeechService
from residency.web.speech.speaking import Speaker
from residency.web.speech.voices import VoiceStore
from tts_gpu_managed import GPUManagedTTS

HERE = ("127.0.0.1", 4000)
EDITS = {"clone": [], "emotion": ["happy", "sad"], "style": ["whisper"], "speed": ["faster", "more faster"], "vad": []}


class Tones:
    """Speaks a tone for each text, of a length that is the text's; remembers calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.fails_at = 1

    def clone(self, path: str, prompt_text: str, text: str) -> tuple[Any, int]:
        self.asked.append(("clone", prompt_text, text))
        assert soundfile.info(path).frames
        return self._speak(text)

    def edit(self, path: str, text: str, task: str, info: str | None = None, target: str | None = None) -> Any:
        self.asked.append(("edit", text, task, info))
        assert soundfile.info(path).frames
        return self._speak(text)

    def _speak(self, text: str) -> tuple[Any, int]:
        if self.error and len(self.asked) >= self.fails_at:
            raise self.error
        return np.full((1, 1000 * len(text)), 0.25, np.float32), 24000


class Served:
    """The calls and their parts."""

    def __init__(
        self, folder: Path, *, recognize: Any = None, keys: Any = (), most: int = 8, limits: Limits | None = None,
        disk: float = math.inf, managed: bool = True,
    ) -> None:  # fmt: skip
        self.tones = Tones()
        self.manager = GPUResourceManager(SimulatedDevice(1 << 30))
        engine: Any = self.tones
        if managed:
            engine = GPUManagedTTS(None, manager=self.manager, load=lambda: self.tones, check_text=self._check)
        self.queue = None if managed else SpeechQueue("tts")
        self.recordings = Recordings(folder / "recordings", disk)
        self.service = SpeechService(engine, EDITS, self.recordings, recognize, limits, self.queue)
        self.voices = VoiceStore(folder / "voices")
        permissions = Permissions("t0ken")
        self.keys = ApiKeys(keys, permissions)
        self.slots = Slots(most)
        self.calls = SpeechCalls(
            self.service, Speaker(self.service, self.voices), self.recordings, self.keys, "tones",
            self.slots, (self.queue or self.manager).watching, keep_alive_seconds,
        )  # fmt: skip
        self.app = build(self.manager if managed else None, permissions, speech=self.calls)

    @staticmethod
    def _check(text: str) -> None:
        if "ж" in text:
            raise InvalidInput("This engine speaks English", "该引擎只会英文")

    def client(self, address: tuple[str, int] = HERE, **headers: str) -> TestClient:
        return TestClient(
            self.app, "http://127.0.0.1:7860", client=address, headers=headers, raise_server_exceptions=False
        )

    def left(self) -> list[str]:
        folder = Path(self.recordings.folder)
        return [str(path) for path in folder.rglob("*")] if folder.exists() else []
