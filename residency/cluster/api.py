"""The HTTP calls of the speech API in front of replicas: those of app.py, without the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
from ..web.speech.voices import VoiceStore
from .ray_tts import RayTTS

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


def build(settings: Settings, models: Mapping[str, bool], replicas: DeploymentHandle[Any], folder: str) -> FastAPI:
    """Returns the application.

    Args:
        models: the names of the models, and whether each is the built-in engine.
        replicas: those of the engines.
        folder: for recordings and results of running requests.
    """
    recordings = Recordings(folder, settings.max_disk)
    voices = VoiceStore(settings.voices_dir or folder, lambda path: None)
    queue = SpeechQueue("tts", settings.max_requests)
    limits = Limits(settings.max_audio, settings.max_text or Limits.text, settings.max_text or Limits.target_text)
    speakers = {}
    for name, builtin in models.items():
        engine = RayTTS(replicas, name, builtin)
        service = SpeechService(engine, engine.edit_types, recordings, None, limits, queue)
        speakers[name] = Speaker(service, voices)
    first, speaker = next(iter(speakers.items()))
    permissions = Permissions(settings.control_token, trust_local=False)
    speech = SpeechCalls(
        service=speaker.service,
        speaker=speaker,
        recordings=recordings,
        keys=ApiKeys(settings.api_keys, permissions, None),
        model=first,
        slots=Slots(settings.max_requests),
        watching=queue.watching,
        keep_alive=keep_alive_seconds,
    )
    return build_api(None, permissions, speech=speech)
