"""Endpoints of the Gradio page for programs (``gradio_client``): return a WAV file, or the status as JSON."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import gradio as gr

from ...cancellation import cancelled_by
from ...status_types import Status
from ..server.permissions import Permissions
from ..shared.gradio_compat import session
from ..shared.protocols import Manager
from ..speech.recordings import Recordings
from ..speech.service import SpeechService, explain
from ..ui.gpu_panel import check
from ..ui.page_requests import PageRequest, in_thread, reports

T = TypeVar("T")
NOBODY = gr.Request()


def register_speech(
    speech: SpeechService,
    watched: Callable[[], AbstractContextManager[Any]],
    recordings: Recordings,
) -> None:
    """Registers ``/clone`` and ``/edit``. They raise `gr.Error` with a readable message.

    ``watched`` is `WaitingRequests.watched` for the engine's model. Files are deleted with the client's session.
    ``job.cancel()`` ends a request as Stop does on the page.
    """

    async def answer(recording: str, work: Callable[[str], str]) -> str:
        request, show = PageRequest(), gr.Progress()

        def speak() -> str:
            recordings.own(session(), recording)
            readable = speech.incoming.readable(recording)
            recordings.own(session(), readable)
            with cancelled_by(request.cancellation), watched() as request.progress:
                result = work(readable)
            recordings.own(session(), result)
            return result

        answered = in_thread(lambda: _or_error(speak))
        try:
            async for progress in reports(request, answered):
                if progress:
                    sentence, share = progress
                    show(share, desc=sentence)
            return answered.result()
        finally:
            request.cancellation.cancel()

    async def clone(prompt_audio: str, prompt_text: str, target_text: str) -> str:
        """Say target_text in the voice of prompt_audio, in which prompt_text is said."""
        return await answer(prompt_audio, lambda audio: speech.clone(audio, prompt_text, target_text))

    async def edit(
        input_audio: str, audio_text: str, edit_type: str, edit_info: str | None = None, text: str | None = None
    ) -> str:
        """Change input_audio, in which audio_text is said. Only paralinguistic uses text."""
        return await answer(
            input_audio, lambda audio: speech.edit(audio, audio_text, edit_type, edit_info or None, text)[0]
        )

    # They do not wait in Gradio's queue, which detects neither free engines nor disconnected clients.
    with gr.Row(visible=False):
        for function, texts in ((clone, 2), (edit, 4)):
            inputs = [gr.Audio(type="filepath"), *(gr.Textbox() for _ in range(texts))]
            _expose(function, inputs, gr.Audio(), concurrency_limit=None)


def register_gpu(manager: Manager, permissions: Permissions) -> None:
    """Registers ``/gpu_status``, ``/gpu_offload``, ``/gpu_release`` and ``/gpu_warm``; without a name, for all models.

    Changes need permission; without it they raise `gr.Error` with the message of `NotAllowed`.
    """

    def gpu_status() -> Status:
        """Where the models are, in bytes and seconds."""
        return manager.status()

    def changed(change: Callable[[str | None], bool], model: str | None, request: gr.Request) -> Status:
        _or_error(lambda: check(permissions, request))
        _or_error(lambda: change(model or None))
        return manager.status()

    def gpu_offload(model: str | None = None, request: gr.Request = NOBODY) -> Status:
        """Bring a model to main memory (after the running request, if there is one); answer the status."""
        return changed(manager.offload, model, request)

    def gpu_release(model: str | None = None, request: gr.Request = NOBODY) -> Status:
        """Free a model's memory everywhere (after the running request, if there is one); answer the status."""
        return changed(manager.release, model, request)

    def gpu_warm(model: str | None = None, request: gr.Request = NOBODY) -> Status:
        """Begin to bring a model to the device; answer the status."""
        return changed(manager.warm, model, request)

    with gr.Row(visible=False):
        _expose(gpu_status, [], gr.JSON())
        for change in (gpu_offload, gpu_release, gpu_warm):
            _expose(change, [gr.Textbox()], gr.JSON())


def _expose(function: Callable[..., Any], inputs: list[Any], output: Any, **keywords: Any) -> None:
    # A hidden button, since its components handle files, unlike `gr.api`.
    gr.Button().click(function, inputs, output, api_name=function.__name__, **keywords)


def _or_error(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        raise gr.Error(explain(error), print_exception=False) from None
