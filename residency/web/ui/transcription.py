"""Transcribes a recording into the prompt text, if that is empty, and shows the progress."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, TypedDict

import gradio as gr

from ...cancellation import cancelled_by
from ...errors import ResidencyError
from .. import static
from ..shared.gradio_compat import PRIVATE, localizer
from ..speech.service import RECOGNIZER, SpeechService
from .messages import Message
from .page_requests import PageRequest, in_thread, reports
from .waiting import WaitingRequests

_READY = ("模型已就绪，正在识别录音", "The model is ready; transcribing the recording")
_script = partial(static.calling, "recordings.js")


class Transcript(TypedDict):
    """The result for the page.

    ``recordings`` are possible paths of the recording there; ``message`` is the error as HTML, or empty.
    """

    recordings: list[str]
    text: str
    message: str


class Transcription:
    """Handlers and components of the transcription. One object serves all sessions."""

    def __init__(self, speech: SpeechService, waiting: WaitingRequests, managed: bool) -> None:
        self._speech, self._waiting = speech, waiting
        # A manager has a queue of its own; the limit leaves some of Gradio's 40 threads for other events.
        self._event: dict[str, Any] = {"concurrency_id": "recognizer", "concurrency_limit": 8 if managed else 1}

    def draw(self) -> None:
        """Draws the progress line into the open Blocks."""
        self._line = gr.HTML(elem_id="transcribing", elem_classes="progress-line", padding=False)
        self._result = gr.JSON(visible=False)

    def register(self, added: Sequence[Any], prompt: gr.Textbox, recording: Any, message: gr.HTML) -> None:
        """Connects the components of `draw`. ``added`` are the events that add a recording."""
        self._recording, self._prompt, self._message = recording, prompt, message
        gr.on(added, None, recording, None, js=_script("beginTranscription(...values)"), **PRIVATE)
        recording.clear(js=_script("endTranscription()"), **PRIVATE)
        self._transcribe_on(partial(gr.on, added))

    def resume(self, returned: Any) -> None:
        """Restarts the transcription after ``returned``, the event that restores the recording of a reloaded page."""
        self._transcribe_on(partial(returned.then, js=_script("resumeTranscription(values[1])")))

    def _transcribe_on(self, event: Callable[..., Any]) -> None:
        running = event(
            self.transcribe,
            [self._recording, self._prompt],
            [self._result, self._line],
            **self._event,
            trigger_mode="multiple",  # a removed recording does not delay the next one
            show_progress="hidden",
            **PRIVATE,
        )
        # Runs in the browser when the result arrives.
        answer = [self._result, self._prompt, self._recording]
        running.success(None, answer, [self._prompt, self._message], js=_script("showTranscript(...values)"), **PRIVATE)
        self._recording.clear(None, cancels=[running], **PRIVATE)

    async def transcribe(self, recording: str | None, prompt: str | None) -> AsyncIterator[list[Any]]:
        """Transcribes a recording. Yields the result and the progress line whenever one changes.

        The result is a `Transcript`. Closing the generator cancels the request.
        """
        if not recording:  # nothing to resume after the page was loaded
            yield [gr.skip(), gr.skip()]
            return
        request = PageRequest()
        work = in_thread(lambda: self._answer(request, recording, prompt))
        try:
            async for progress in reports(request, work):
                yield [gr.skip(), request.line(progress, localizer())]
            yield [work.result(), ""]
        finally:
            request.cancellation.cancel()

    def _answer(self, request: PageRequest, recording: str, prompt: str | None) -> Transcript:
        result: Transcript = {"recordings": [], "text": "", "message": ""}
        try:
            readable = self._speech.incoming.readable(recording)
        except ResidencyError:  # `RecordingCheck` shows the error
            return result
        result["recordings"] = [recording, readable]
        if prompt and prompt.strip():
            return result
        try:
            with cancelled_by(request.cancellation), self._waiting.watched(RECOGNIZER, _READY) as request.progress:
                result["text"] = self._speech.transcribe(readable)
        except Exception as error:
            result["message"] = Message.of(error, localizer(), "recording")
        return result
