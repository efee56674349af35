"""Voices on the page: chosen from a list, which fills in recording and prompt text; stored and deleted by name."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from ...errors import Field
from .. import static
from ..server.permissions import Permissions
from ..shared.gradio_compat import PRIVATE, localizer, session
from ..shared.language import zh
from ..speech import sample_voices
from ..speech.recordings import Recordings
from ..speech.service import SpeechService
from ..speech.voices import Voice, VoiceStore, VoicesUnreadable
from .gpu_panel import check
from .labels import label
from .messages import SCRIPT, Message, MessagePlaces

logger = logging.getLogger(__name__)

_script = partial(static.calling, "voices.js")
_ABOUT: tuple[Field, ...] = ("recording", "prompt_text", "voice", "voice_name")
"""Fields of the messages about a voice."""


class Voices:
    """Components and handlers of the voices; one object serves all sessions.

    All users share the stored voices, so storing and deleting need the same permission as the panel's buttons.
    """

    def __init__(
        self,
        store: VoiceStore,
        speech: SpeechService,
        recordings: Recordings,
        permissions: Permissions,
        places: MessagePlaces,
    ) -> None:
        self._store, self._speech, self._recordings = store, speech, recordings
        self._permissions, self._places = permissions, places

    def draw(self) -> None:
        """Draws the samples, the list and the form for a new voice into the open Blocks."""
        with gr.Row():
            self._samples = {
                name: gr.Button(label(*sample.name), size="sm", min_width=120, elem_id=f"sample-{name}")
                for name, sample in sample_voices.VOICES.items()
            }
        with gr.Row():
            names = list(sample_voices.VOICES)  # `refresh` has all
            self._choice = gr.Dropdown(names, value=None, label=label("声音", "Voice"), elem_id="voice", scale=3)
            self._delete = gr.Button(
                label("🗑️ 删除声音", "🗑️ Delete voice"), size="sm", min_width=120, visible=False, elem_id="delete-voice"
            )
        self._places.draw("voice")
        with gr.Row(elem_id="new-voice"):  # hidden by CSS without a recording
            self._name = gr.Textbox(
                label=label("保存为声音", "Keep as a voice"),
                placeholder=label("名称（可不填）", "Name (optional)"),
                elem_id="voice-name",
                scale=3,
            )
            self._save = gr.Button(
                label("💾 保存声音", "💾 Save voice"), size="sm", min_width=120, elem_id="save-voice"
            )
        self._places.draw("voice_name")

    def register(self, prompt: gr.Textbox, recording: gr.Audio, target: gr.Textbox) -> list[Any]:
        """Connects the components of `draw`; returns the events that choose a voice."""
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
        self._listed = gr.State()
        for event in (partial(gr.on, None), self._choice.focus):  # when the page is opened; later, others store voices
            event(self.refresh, self._listed, [self._choice, self._listed], **at_once)
        filled_in = [prompt, recording, target, self._places.of("target_text"), self._choice, self._delete]
        filled_in.append(self._places.of("voice"))
        chosen = {self._choice.input: "choose(...values)"}
        chosen |= {button.click: f"['{name}', values[1]]" for name, button in self._samples.items()}
        settled = {"inputs": self._choice, "js": _script("settle(...values)"), **PRIVATE}
        for event, js in chosen.items():
            event(**self._places.wiping(*_ABOUT))
            event(
                self.choose, [self._choice, target], filled_in, js=_script(js), trigger_mode="multiple", **at_once
            ).then(None, **settled)
        replaced = [recording.upload, recording.stop_recording, recording.clear]
        gr.on(replaced, None, outputs=[self._choice, self._delete], js=_script("unchoose()"), **PRIVATE)
        self._name.change(**self._places.wiping_by_hand("voice_name"))
        places = [self._places.of(field) for field in _ABOUT]
        shown = {"js": static.calling(SCRIPT, "show()"), **PRIVATE}
        changed = [self._choice, self._listed, self._delete, self._name, *places]
        confirm = _script("confirmDeletion(...values)")
        saved = self._save.click(self.save, [self._name, recording, prompt], changed, **at_once)
        deleted = self._delete.click(self.delete, self._choice, changed, js=confirm, **at_once)
        for done in (saved, deleted):
            for after in (settled, shown):  # not in a row: in Gradio 5 nothing follows an event without a function
                done.then(None, **after)
        return list(chosen)

    def refresh(self, listed: Sequence[tuple[str, str]] | None) -> tuple[Any, Any]:
        """Returns an update of the list, and its choices (title, name), unless these are ``listed`` already.

        Gradio 5 hides all but the chosen one of an open list that it updates. Without an answer of the store the list
        stays; a choice from it then says why it is not there.
        """
        try:
            choices = self._choices()
        except VoicesUnreadable as error:
            logger.warning("%s", error)
            return gr.skip(), gr.skip()
        return (gr.skip(), gr.skip()) if choices == listed else (gr.update(choices=choices), choices)

    def _choices(self) -> list[tuple[str, str]]:
        localize = localizer()
        return [(_title(voice, localize), voice.name) for voice in self._store.all()]

    def choose(self, name: str | None, target_text: str | None) -> list[Any]:
        """Returns prompt text, recording, target text and its message, the choice, the delete button and a message.

        The session owns the recording, a copy. A sample also fills an empty target text.
        """
        if not name:
            return [gr.skip()] * 7
        try:
            voice = self._store.get(name)
            recording = self._copied(voice)
        except Exception as error:
            return [*[gr.skip()] * 4, None, gr.update(visible=False), Message.of(error, localizer(), "voice")]
        fills = not (target_text or voice.stored)
        target = (sample_voices.TARGET_TEXT, "") if fills else (gr.skip(), gr.skip())
        return [voice.text, recording, *target, voice.name, gr.update(visible=voice.stored), ""]

    def _copied(self, voice: Voice) -> str:
        os.makedirs(self._speech.folder, exist_ok=True)
        with self._recordings.reserved(os.path.getsize(voice.recording) if os.path.isfile(voice.recording) else 0):
            folder = tempfile.mkdtemp(dir=self._speech.folder)
            try:
                recording = self._store.copy(voice, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        self._recordings.own(session(), recording)
        return recording

    def save(self, request: gr.Request, name: str | None, recording: str | None, prompt_text: str | None) -> list[Any]:
        """Stores a recording and its words as a voice, called ``Voice 1`` or so without a name; returns updates."""
        return self._changed(request, "voice_name", lambda: self._saved(name, recording, prompt_text))

    def _saved(self, name: str | None, recording: str | None, prompt_text: str | None) -> tuple[str | None, str]:
        readable = self._speech.incoming.readable(recording)
        text = self._speech.checked_prompt(prompt_text)
        voice = self._store.add((name or "").strip() or self._unused_name(), text, readable)
        return voice.name, localizer()(f"声音“{voice.name}”已保存。", f"The voice {voice.name!r} is stored.")

    def delete(self, request: gr.Request, name: str | None) -> list[Any]:
        """Deletes a stored voice, unless the user has not confirmed it (None); returns updates."""
        if not name:
            return [gr.skip()] * (4 + len(_ABOUT))
        return self._changed(request, "voice", lambda: self._deleted(name))

    def _deleted(self, name: str) -> tuple[str | None, str]:
        voice = self._store.remove(name)
        return None, localizer()(f"声音“{voice.name}”已删除。", f"The voice {voice.name!r} is deleted.")

    def _changed(self, request: gr.Request, field: Field, change: Callable[[], tuple[str | None, str]]) -> list[Any]:
        """Returns updates of the list, the delete button, the name and the messages.

        ``change`` returns the voice to show as chosen, and the outcome, which is shown at ``field``.
        """
        try:
            check(self._permissions, request)
            chosen, outcome = change()
        except Exception as error:
            message, updates = Message.of(error, localizer(), field), [gr.skip()] * 4
        else:
            message = Message.status(outcome, field)
            choices = self._choices()
            updates = [gr.update(choices=choices, value=chosen), choices, gr.update(visible=chosen is not None), ""]
        return [*updates, *(message if message.field == each else "" for each in _ABOUT)]

    def _unused_name(self) -> str:
        taken = {voice.name.casefold() for voice in self._store.all()}
        word = "声音" if localizer() is zh else "Voice"
        return next(name for number in itertools.count(1) if (name := f"{word} {number}").casefold() not in taken)


def _title(voice: Voice, localize: Any) -> str:
    return voice.name if voice.stored else localize(*sample_voices.VOICES[voice.name].name)
