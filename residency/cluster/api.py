"""The HTTP calls of the speech API in front of replicas: those of app.py, without the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launch.settings import Settings
from ..scheduling.policies import keep_alive_seconds
from ..web.api.control import build as build_api
from ..web.api.slots import Slots
from ..web.api.speech_calls import SpeechCalls
from ..web.server.api_keys import ApiKeys
from ..web.server.cross_origin import cross_origin
from ..web.server.heartbeats import Heartbeats
from ..web.server.hosts import Hosts
from ..web.server.middleware import RequestMiddleware
from ..web.server.permissions import Permissions
from ..web.speech.conversion import Limits
from ..web.speech.object_voices import voice_store
from ..web.speech.queue import SpeechQueue
from ..web.speech.recordings import Recordings
from ..web.speech.service import SpeechService
from ..web.speech.speaking import Speaker
from .ray_tts import RayTTS

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp


def build(settings: Settings, models: Mapping[str, bool], replicas: DeploymentHandle[Any], folder: str) -> ASGIApp:
    """Returns the application, with the limits of uploads and the refusals of other sites' pages of app.py.

    Args:
        models: the names of the models, and whether each is the built-in engine.
        replicas: those of the engines.
        folder: for recordings and results of running requests.
    """
    recordings = Recordings(folder, settings.max_disk)
    voices = voice_store(settings.voices_dir)
    voices.sweep()
    queue = SpeechQueue("tts", settings.max_requests)
    speakers = {}
    for name, builtin in models.items():
        engine = RayTTS(replicas, name, builtin)
        most = settings.max_text or engine.target_characters
        limits = Limits(settings.max_audio, settings.max_text or Limits.text, most)
        service = SpeechService(engine, engine.edit_types, recordings, None, limits, queue)
        speakers[name] = Speaker(service, voices)
    first = next(iter(speakers))
    speaker = speakers.pop(first)
    permissions = Permissions(settings.control_token, trust_local=False)
    keys = ApiKeys(settings.api_keys, permissions, None)
    speech = SpeechCalls(
        service=speaker.service,
        speaker=speaker,
        recordings=recordings,
        keys=keys,
        model=first,
        others=speakers,
        slots=Slots(settings.max_requests),
        watching=queue.watching,
        keep_alive=keep_alive_seconds,
    )
    guard = RequestMiddleware(
        Path(folder),
        Heartbeats(lambda session: None, lambda session: None),
        largest_upload_bytes=math.inf if settings.max_upload is None else settings.max_upload,
        know=lambda session: False,
        reserved=recordings.reserved,
    )
    api = cross_origin(settings.cors_origins)(guard.around(build_api(None, permissions, speech=speech)))
    return Hosts(settings.allowed_hosts, keys.passes).around(api)
