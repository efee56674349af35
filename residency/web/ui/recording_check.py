"""Checks an uploaded or recorded recording, and replaces it by a file that browsers play."""

from __future__ import annotations

from typing import TypedDict

import gradio as gr

from .. import static
from ..shared.gradio_compat import PRIVATE, localizer, session
from ..speech.recordings import Recordings
from ..speech.service import SpeechService
from .messages import Message


class Checked(TypedDict):
    """A checked recording: its path, an error as HTML or empty, and the path of the converted file or empty."""

    given: str
    message: str
    playable: str


class RecordingCheck:
    """Check of recordings; one object serves all sessions."""

    def __init__(self, speech: SpeechService, recordings: Recordings) -> None:
        self._speech, self._recordings = speech, recordings

    def register(self, recording: gr.Audio, message: gr.HTML) -> None:
        """Connects the recording's component and the place of its errors while the page is drawn."""
        received = gr.JSON(visible=False)
        show = static.calling("recordings.js", "showChecked(...values)")
        # Conversions run concurrently.
        changed = recording.change(
            self.receive,
            recording,
            received,
            concurrency_limit=8,
            trigger_mode="multiple",
            show_progress="minimal",  # the full one covers the button that removes the recording
            show_progress_on=recording,
            **PRIVATE,
        )
        changed.success(None, [received, recording], [recording, message], js=show, **PRIVATE)

    def receive(self, path: str | None) -> Checked | None:
        """Checks and converts a recording; returns None without one.

        The page removes a recording with an error, and shows the error until the next one.
        """
        if not path:
            return None
        self._recordings.own(session(), path)  # also if it is never used
        try:
            readable = self._speech.incoming.readable(path)
        except Exception as error:
            return {"given": path, "message": Message.of(error, localizer()), "playable": ""}
        self._recordings.own(session(), readable)
        return {"given": path, "message": "", "playable": readable if readable != path else ""}
