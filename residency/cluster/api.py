"""The HTTP calls of the speech API in front of replicas: those of app.py, without the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.builtin import supported_edit_types
from ..launch.settings import Settings
from ..scheduling.policies import keep_alive_seconds
from ..web.api.control import build as build_api
from ..web.api.slots import Slots
from ..web.api.speech_calls import SpeechCalls
from ..web.server.api_keys import ApiKeys
from ..web.server.permissions import Permissions
from ..web.speech.conversion import Limits
from ..web.speech.queue import SpeechQueue
from ..web.speech.recordings import Recordings
from ..web.speech.service import SpeechService
from ..web.speech.speaking import Speaker
from ..web.speech.task_names import STEP_AUDIO_EDIT_TYPES
from ..web.speech.voices import VoiceStore

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..contracts import Engine


def build(settings: Settings, engine: Engine, folder: str) -> FastAPI:
    """Returns the application. ``folder``: for recordings and results of running requests."""
    recordings = Recordings(folder, settings.max_disk)
    queue = SpeechQueue("tts", settings.max_requests)
    edit_types = supported_edit_types() if settings.engine == "builtin" else STEP_AUDIO_EDIT_TYPES
    limits = Limits(settings.max_audio, settings.max_text or Limits.text, settings.max_text or Limits.target_text)
    service = SpeechService(engine, edit_types, recordings, None, limits, queue)
    voices = VoiceStore(settings.voices_dir or folder, getattr(engine, "check_audio", lambda path: None))
    permissions = Permissions(settings.control_token, trust_local=False)
    speech = SpeechCalls(
        service=service,
        speaker=Speaker(service, voices),
        recordings=recordings,
        keys=ApiKeys(settings.api_keys, permissions, None),
        model="builtin" if settings.engine == "builtin" else "step-audio-editx",
        slots=Slots(settings.max_requests),
        watching=queue.watching,
        keep_alive=keep_alive_seconds,
    )
    return build_api(None, permissions, speech=speech)
