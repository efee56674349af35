"""Shows the message of a request beside the control that it is about."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from ...errors import Field, RequestStopped
from .. import static
from ..shared.gradio_compat import PRIVATE
from ..shared.language import Localize, translated
from ..speech.service import explain

CONTROLS: dict[Field, str] = {
    "recording": "prompt-audio",
    "prompt_text": "prompt-text",
    "target_text": "target-text",
    "task": "task",
    "sub_task": "sub-task",
    "voice": "voice",
    "voice_name": "voice-name",
}
"""The page element of each field."""

SCRIPT = "messages.js"


class Message(str):
    """HTML that stays on the page until the next press, or a change of its ``field`` (None: of no single field)."""

    field: Field | None

    def __new__(cls, shown: str, field: Field | None = None) -> Message:
        message = super().__new__(cls, shown)
        message.field = field
        return message

    @classmethod
    def of(cls, error: Exception, localize: Localize, field: Field | None = None) -> Message:
        """Returns the message of an error; ``field`` is the default for errors without a field."""
        sentence = translated(explain(error), localize)
        if isinstance(error, RequestStopped) or isinstance(error.__cause__, RequestStopped):
            return cls.status(sentence)  # no failure: the user pressed Stop
        return cls(f"<p role='alert'>⚠️ {html.escape(sentence)}</p>", getattr(error, "field", None) or field)

    @classmethod
    def status(cls, sentence: str, field: Field | None = None) -> Message:
        """Returns a message that is no error."""
        return cls(f"<p role='status'>{html.escape(sentence)}</p>", field)


class MessagePlaces:
    """Places for messages: one for each control, and one for messages without a field."""

    def __init__(self) -> None:
        self._places: dict[Field | None, gr.HTML] = {}

    def draw(self, field: Field | None = None) -> gr.HTML:
        """Draws a place into the open Blocks."""
        name = f"about-{CONTROLS[field]}" if field else "message"
        self._places[field] = gr.HTML(elem_id=name, elem_classes="said", padding=False)
        return self._places[field]

    def of(self, field: Field) -> gr.HTML:
        return self._places[field]

    @property
    def components(self) -> list[gr.HTML]:
        return list(self._places.values())

    def wiping(self, *fields: Field) -> dict[str, Any]:
        """Returns arguments of an event that clears the places of these fields (default: all) in the browser."""
        places = [self._places[field] for field in fields] or self.components
        js = static.calling(SCRIPT, f"wipe({len(places)})")
        return {"fn": None, "inputs": None, "outputs": places, "js": js, "show_progress": "hidden", **PRIVATE}

    def wiping_by_hand(self, field: Field) -> dict[str, Any]:
        """Returns the same for the event `change` of a text, but ignores texts that a page reload restores.

        Gradio's event `input` misses pasted text and input methods.
        """
        return {**self.wiping(field), "js": static.calling(SCRIPT, f"wipeByHand('{CONTROLS[field]}')")}

    def values(self, message: str) -> list[str]:
        """Returns the message at its place and empty texts elsewhere, in the order of `components`."""
        place = getattr(message, "field", None)
        return [message if field == place else "" for field in self._places]

    def unchanged(self) -> list[Any]:
        return [gr.skip()] * len(self._places)
