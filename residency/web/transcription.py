"""Writes what is said in a recording into the prompt text, if that is empty, and shows meanwhile how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from ..cancellation import cancelled_by
from ..errors import InvalidInput
from .compat import PRIVATE, engine_event, speaker
from .messages import Message
from .page_requests import Request
from .presses import LOOK_EVERY_S, in_thread, lines
from .speech import Speech
from .waiting import Waiting

MODEL = "asr"
"""The name of the speech recognition, if a manager looks after it."""

_READY = ("模型已就绪，正在识别录音", "The model is ready; writing down what is said in the recording")
# Not over a text that was written meanwhile, and not about a recording that was taken away.
_FILL_IN = """(heard, text, audio) =>
  (text && text.trim()) || !audio || !heard.recordings.includes(audio.path) ? text : heard.text"""


class Transcription:
    """Handlers and components. One object serves all sessions."""

    def __init__(self, speech: Speech, waiting: Waiting, managed: bool) -> None:
        self._speech, self._waiting = speech, waiting
        self._event = engine_event(managed, "recognizer", 8)

    def draw(self) -> None:
        """Draw the line of progress into the Blocks that are open."""
        self._line = gr.HTML(elem_id="hearing", elem_classes="progress-line", padding=False)
        self._heard = gr.JSON(visible=False)

    def register(self, comes: Sequence[Any], prompt: gr.Textbox, recording: gr.Audio, message: gr.HTML) -> None:
        """Connect what `draw` has drawn. ``comes`` are the events with which a recording comes."""
        inputs = [recording, prompt]
        hearing = gr.on(
            comes,
            self.hear,
            inputs,
            [self._heard, self._line, message],
            **self._event,
            trigger_mode="multiple",  # the next recording is not kept back by one that was taken away
            show_progress="hidden",
            **PRIVATE,
        )
        # In the browser, when the answer is there.
        hearing.success(None, [self._heard, prompt, recording], prompt, js=_FILL_IN, **PRIVATE)
        recording.clear(None, cancels=[hearing], **PRIVATE)

    async def hear(self, recording: str | None, prompt: str | None) -> AsyncIterator[list[Any]]:
        """A recording came. Yields what was heard, the line of progress and an error message, as often as one changes.

        A caller that closes the generator takes the request out of the queue.
        """
        request = Request()
        work = asyncio.ensure_future(in_thread(lambda: self._in_turn(request, recording, prompt)))
        try:
            async for line in lines(
                lambda: None if work.done() else request, lambda: asyncio.wait({work}, timeout=LOOK_EVERY_S)
            ):
                yield [gr.skip(), line, gr.skip()]
            heard, message = work.result()
            yield [heard, "", message or gr.skip()]
        finally:
            request.cancellation.cancel()

    def _in_turn(self, request: Request, recording: str | None, prompt: str | None) -> tuple[dict[str, Any], str]:
        try:
            readable = self._speech.incoming.readable(recording)
        except InvalidInput:  # said where the recording is received
            return {"recordings": [], "text": ""}, ""
        with cancelled_by(request.cancellation):
            text, message = self.transcribe(readable, prompt, request)
        return {"recordings": [recording, readable], "text": text}, message

    def transcribe(self, recording: str | None, prompt: str | None, request: Request | None = None) -> tuple[str, str]:
        """Returns what is said in a recording, or nothing if there is a text already, and an error message."""
        if not recording or (prompt and prompt.strip()):
            return "", ""
        request = request or Request()
        try:
            with self._waiting.told(MODEL, request.tell, _READY) as request.look:
                return self._speech.transcribe(recording), ""
        except Exception as error:
            return "", Message.of(error, speaker(), "recording")
