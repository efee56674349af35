"""Speech of long texts: split into sentences, spoken under one lease, joined and encoded while it is spoken."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile

from ...cancellation import checkpoint
from ...contracts import Engine
from ...errors import InvalidInput, RequestCancelled, RequestStopped, ResidencyError
from ...sentences import Sentence
from . import task_names
from .encoding import Encoder, Joiner, check_form
from .recordings import DISK_IS_FULL, UNDER_WAY, OutOfDiskSpace
from .segments import sentences
from .service import SpeechService, check, explain
from .voices import Voice, VoiceStore

_S_PER_CHARACTER = 0.25
"""Upper estimate for Chinese; English takes a third."""
_BYTES_PER_S = {"wav": 48_000, "mp3": 16_000, "opus": 9_000, "aac": 13_000}
"""By format; the others are at most as large as wav."""
_EMPTY = Sentence("The text is empty: send what should be spoken", "文本为空：请发送要合成的内容")
_INSTRUCTED = ("emotion", "style", "speed")
"""Tasks that instructions may name."""
_LANGUAGE_TAG = re.compile(r"\s*(\[(?:Cantonese|Japanese|Korean|Sichuanese)\])\s*(?=\S)", re.IGNORECASE)
"""Step-Audio-EditX takes the language of a text from the tag before it."""


class SpeechEditFailed(ResidencyError):
    """The edit of a sentence has failed with ``error``, after the sentence was spoken."""

    def __init__(self, edit: tuple[str, str], error: Exception) -> None:
        named, reason = "/".join(edit), explain(error, has_history=False)
        super().__init__(
            f"The text was spoken, but the edit {named} that instructions name failed; without instructions you get "
            f"the unedited speech. {reason.en}",
            f"语音已合成，但 instructions 所指的编辑 {named} 失败；去掉 instructions 再发送，即可得到未经编辑的语音。"
            f"{reason.zh}",
        )
        self._arguments = (edit, error)
        self.error = OutOfDiskSpace() if isinstance(error, OSError) and error.errno in DISK_IS_FULL else error
        self.param = "instructions"


@dataclass(frozen=True)
class SpeechRequest:
    """A checked request.

    Attributes:
        voice: None until `Speaker.with_voice` gives it.
        sentences: the text, in the order of speaking.
        format: a key of `encoding.MEDIA_TYPES`.
        speed: multiple of the engine's tempo, 0.25 to 4.
        edit: task and sub-task that change each sentence after it was spoken; None: none.
        keep_warm_s: seconds that the model stays on the device afterwards; None: as configured.
    """

    voice: Voice | None
    sentences: tuple[str, ...]
    format: str = "wav"
    speed: float = 1.0
    edit: tuple[str, str] | None = None
    keep_warm_s: float | None = None


def most_bytes(text: str, format: str, speed: float) -> int:
    """Returns an upper estimate of the size of a text's speech."""
    return round(len(text) * _S_PER_CHARACTER * _BYTES_PER_S.get(format, _BYTES_PER_S["wav"]) / speed)


class Speaker:
    """Speaks `SpeechRequest` objects with the engine of a `SpeechService`. Thread-safe, as far as the engine is."""

    def __init__(self, service: SpeechService, voices: VoiceStore) -> None:
        self.service = service
        self.voices = voices

    def checked(
        self,
        text: str | None,
        voice: str | None,
        format: str = "wav",
        speed: float = 1.0,
        instructions: str | None = None,
        keep_warm_s: float | None = None,
    ) -> SpeechRequest:
        """Returns a request; ``voice`` is the name of one, None for one that `with_voice` gives. Loads no model.

        The request has an edit if ``instructions`` name exactly one of the engine. Reads files. Raises `InvalidInput`
        about the first part that is wrong.
        """
        text = self.service.checked_text("target_text", text, _EMPTY, self.service.limits.text)
        if not any(map(str.isalnum, text)):
            raise InvalidInput("The text has no words: write some", "文本中没有文字：请填写内容", "target_text")
        check_form(format, speed)
        found = None if voice is None else self.voices.get(voice)
        check(self.service.engine, "check_text", text, "target_text")
        types = self.service.edit_types
        offered = {task: types[task] for task in _INSTRUCTED if task in types}
        edit = task_names.named_in(instructions or "", offered)
        asked = SpeechRequest(None, _tagged_sentences(text), format, speed, edit, keep_warm_s)
        return asked if found is None else self.with_voice(asked, found)

    def with_voice(self, request: SpeechRequest, voice: Voice) -> SpeechRequest:
        """Returns the request with another voice. Raises `InvalidInput` if the engine cannot take its recording."""
        check(self.service.engine, "check_audio", voice.recording, "recording")
        return replace(request, voice=voice)

    def speak(self, request: SpeechRequest, write: Callable[[bytes], object]) -> None:
        """Calls ``write`` with each part of the encoded speech; it must return at once, since the model is held.

        Raises `RequestStopped` after a cancellation (see `residency.cancellation`), and errors of engine and manager.
        """
        voice = request.voice
        assert voice is not None, "it was checked with a voice, or `with_voice` gave one"
        self.service.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            recording = stack.enter_context(self.voices.copied(voice, self.service.folder))
            joiner: Joiner | None = None
            with self.service.engine_held(request.keep_warm_s) as engine:
                for sentence in request.sentences:
                    checkpoint()
                    samples, sample_rate = self._say(engine, request, voice, recording, sentence)
                    if joiner is None:
                        whole = len(samples) if len(request.sentences) == 1 else None
                        joiner = Joiner(sample_rate)
                        encoder = stack.enter_context(Encoder(request.format, sample_rate, request.speed, whole=whole))
                    write(encoder.encode(joiner.add(samples)))
            assert joiner is not None, "a checked request has a sentence"
            write(encoder.encode(joiner.finish()))
            write(encoder.finish())

    def _say(
        self, engine: Engine, request: SpeechRequest, voice: Voice, recording: str, sentence: str
    ) -> tuple[Any, int]:
        """Returns a sentence as float32 [samples], and Hz."""
        audio, sample_rate = engine.clone(recording, voice.text, sentence)
        if request.edit is not None:
            checkpoint()
            try:
                with _as_file(audio, sample_rate, self.service.folder) as spoken:
                    audio, sample_rate = engine.edit(spoken, sentence, *request.edit, sentence)
            except (RequestCancelled, RequestStopped):
                raise
            except Exception as error:
                raise SpeechEditFailed(request.edit, error) from error
        return np.asarray(audio, dtype=np.float32).reshape(-1), sample_rate


def _tagged_sentences(text: str) -> tuple[str, ...]:
    """Returns the sentences of a text; each begins with the language tag of the text, if it has one."""
    tag = _LANGUAGE_TAG.match(text)
    if tag is None:
        return tuple(sentences(text))
    return tuple(f"{tag[1]} {sentence}" for sentence in sentences(text[tag.end() :]))


@contextmanager
def _as_file(audio: Any, sample_rate: int, folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the path of a WAV file with the audio; deletes it at the end."""
    with tempfile.TemporaryDirectory(prefix=f"{UNDER_WAY}-step-", dir=folder, ignore_cleanup_errors=True) as workshop:
        path = os.path.join(workshop, "speech.wav")
        soundfile.write(path, np.asarray(audio, dtype=np.float32).reshape(-1), sample_rate, subtype="FLOAT")
        yield path
