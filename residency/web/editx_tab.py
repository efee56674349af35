"""The Step-Audio-EditX tab: recording, texts, task, CLONE and EDIT, and the history as a chat with players."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from ..cancellation import cancelled_by, checkpoint
from ..contracts import Engine
from ..errors import InvalidInput
from . import static
from .server.permissions import Permissions
from .shared.gradio_compat import PRIVATE, localizer, supported
from .speech import task_names
from .speech.conversion import Limits
from .speech.object_voices import voice_store
from .speech.queue import SpeechQueue
from .speech.recordings import Recordings
from .speech.service import EditFailed, SpeechService
from .ui import guidance, status_text
from .ui.chat_history import Histories, Overtaken, SessionState, Step, as_messages, new_state
from .ui.gpu_panel import GpuPanel
from .ui.labels import label
from .ui.messages import SCRIPT, Message, MessagePlaces
from .ui.page_requests import PageRequest, PageRequests
from .ui.page_sessions import PageSessions
from .ui.prewarm import Prewarm
from .ui.recording_check import RecordingCheck
from .ui.saved_inputs import SavedInputs
from .ui.tasks import Tasks, sub_tasks_update
from .ui.transcription import Transcription
from .ui.voices import Voices
from .ui.waiting import WaitingRequests


class Inputs(NamedTuple):
    """The arguments of CLONE and EDIT, in the order of the event's inputs."""

    prompt_text: str | None
    prompt_audio: str | None
    target_text: str | None
    edit_type: str | None
    edit_info: str | None
    state: SessionState


class EditxTab:
    """Components and event handlers of the tab. One object serves all sessions, each with its own `SessionState`.

    Handlers show errors as messages and leave the history unchanged. ``args`` is `Settings` or any namespace with
    ``tmp_dir``. If ``tts_engine`` has a ``manager``, the tab has the GPU panel. With ``recognize``, recordings are
    transcribed into an empty prompt text. ``permissions`` decide which requests may use the panel's buttons; by default
    those from this machine and of signed-in users. With ``clone_appends``, CLONE continues the history; by default it
    starts a new one. ``more_tags`` are listed in the help. ``max_target_text``: without ``args.max_text``.
    """

    def __init__(
        self,
        args: Any,
        encoder: Any = None,
        tts_engine: Engine | None = None,
        *,
        edit_types: Mapping[str, Sequence[str]] | None = None,
        recognize: Callable[[str], str] | None = None,
        permissions: Permissions | None = None,
        clone_appends: bool = False,
        more_tags: Sequence[str] = (),
        max_target_text: int = Limits.target_text,
    ) -> None:
        self.args = args
        self.encoder = encoder
        self.tts_engine = tts_engine
        folder = getattr(args, "tmp_dir", None) or os.path.join(tempfile.gettempdir(), "gradio")
        max_text = getattr(args, "max_text", None)
        limits = Limits(
            getattr(args, "max_audio", Limits.audio_s), max_text or Limits.text, max_text or max_target_text
        )
        manager = getattr(tts_engine, "manager", None)
        self._model = getattr(tts_engine, "name", None) or "tts"
        queue = SpeechQueue(self._model, getattr(tts_engine, "at_once", 1)) if manager is None else None
        self.watching: Callable[..., AbstractContextManager[None]] = (manager or queue).watching  # type: ignore[union-attr]
        self.recordings = Recordings(folder, getattr(args, "max_disk", math.inf))
        edit_types = edit_types or task_names.STEP_AUDIO_EDIT_TYPES
        self.speech = SpeechService(tts_engine, edit_types, self.recordings, recognize, limits, queue)
        voices_dir = getattr(args, "voices_dir", None) or os.path.join(folder, "voices")
        self.voices = voice_store(voices_dir, getattr(tts_engine, "check_audio", lambda path: None))
        self._histories = Histories(self.recordings)
        self._clone_appends, self._more_tags = clone_appends, more_tags
        self._builtin = getattr(args, "engine", None) == "builtin"
        permissions = permissions or Permissions()
        self.panel = None if manager is None else GpuPanel(manager, permissions)
        self.waiting = WaitingRequests(manager or queue)
        self.message_places = MessagePlaces()
        self.voice_choice = Voices(self.voices, self.speech, self.recordings, permissions, self.message_places)
        self.page_requests = PageRequests(self.message_places)
        self.page_sessions = PageSessions(self.page_requests, self.recordings, self.waiting, self.message_places)
        self.tasks = Tasks(self.speech.edit_types, self.message_places)
        self.saved_inputs = SavedInputs(self.recordings, self.speech.edit_types)
        self.recording_check = RecordingCheck(self.speech, self.recordings)
        self.transcription = Transcription(self.speech, self.waiting, manager is not None)
        self.prewarm = None if manager is None else Prewarm(manager, self._model)

    def get_gpu_status(self) -> str:
        """Returns the state of the models as text."""
        return self.panel.text() if self.panel else status_text.NOT_ENABLED

    def offload_gpu(self) -> str:
        """Offloads all models to main memory; returns the outcome and the state as text."""
        return f"{self.panel.press('offload')[0]}\n{self.panel.text()}" if self.panel else status_text.NOT_ENABLED

    def release_gpu(self) -> str:
        """Releases all models; returns the outcome and the state as text."""
        return f"{self.panel.press('release')[0]}\n{self.panel.text()}" if self.panel else status_text.NOT_ENABLED

    def watched(self) -> AbstractContextManager[Any]:
        """Returns `WaitingRequests.watched` for the engine's model."""
        return self.waiting.watched(self._model)

    def init_state(self) -> SessionState:
        return new_state()

    def generate_clone(self, *inputs: Any) -> tuple[Any, SessionState, str]:
        """Clones the voice, whichever task is chosen. Takes the fields of `Inputs`, in their order.

        Returns chat messages, state and a `Message`, which is empty after success.
        """
        return self._answer(self._clone, Inputs(*inputs), self.page_requests.begin(inputs[-1]))

    def generate_clone_and_edit(self, *inputs: Any) -> tuple[Any, SessionState, str]:
        """Clones the voice and does the chosen task with the result, as two steps under one lease."""
        return self._answer(self._clone_and_edit, Inputs(*inputs), self.page_requests.begin(inputs[-1]))

    def generate_edit(self, *inputs: Any) -> tuple[Any, SessionState, str]:
        """Edits the latest result, or the recording if there is none. Arguments and result as `generate_clone`."""
        return self._answer(self._edit, Inputs(*inputs), self.page_requests.begin(inputs[-1]))

    def _clone(self, inputs: Inputs, history: list[Any]) -> None:
        recording = self.speech.incoming.readable(inputs.prompt_audio)
        result = self.speech.clone(recording, inputs.prompt_text, inputs.target_text)
        self._append_clone(inputs, history, recording, result)

    def _append_clone(self, inputs: Inputs, history: list[Any], recording: str, result: str, *further: Step) -> None:
        step = Step("clone", None, inputs.prompt_text, inputs.target_text, recording, result)
        self._histories.append(inputs.state, history, step, *further, anew=not self._clone_appends)

    def _clone_and_edit(self, inputs: Inputs, history: list[Any]) -> None:
        recording = self.speech.incoming.readable(inputs.prompt_audio)
        task, sub_task, text = inputs.edit_type, inputs.edit_info, inputs.target_text
        try:
            clone, edited = self.speech.clone_and_edit(recording, inputs.prompt_text, text, task, sub_task)
        except EditFailed as error:
            self._append_clone(inputs, history, recording, error.clone)
            raise
        self._append_clone(inputs, history, recording, clone, Step(task, sub_task, text, text, clone, edited))

    def _edit(self, inputs: Inputs, history: list[Any]) -> None:
        source, spoken = history[-1] if history else (inputs.prompt_audio, inputs.prompt_text)
        if history and not os.path.isfile(str(source)):
            raise InvalidInput(
                "The latest result is no longer on the server: press Clear History, then EDIT changes the recording",
                "服务器上已没有最近的结果：请点击“清空历史”，之后 EDIT 将修改录音",
            )
        task, sub_task = inputs.edit_type, inputs.edit_info
        recording = self.speech.incoming.readable(source)
        result, new_text = self.speech.edit(recording, spoken, task, sub_task, inputs.target_text)
        self._histories.append(inputs.state, history, Step(task, sub_task, spoken, new_text, recording, result))

    def clear_history(self, state: SessionState) -> tuple[list[Any], SessionState, str]:
        self._histories.clear(state)
        self.page_requests.stop(state)  # its result would be dropped
        return [], state, ""

    def update_edit_info(self, edit_type: str) -> Any:
        """Returns an update of the sub-task dropdown for a task."""
        return sub_tasks_update(self.speech.edit_types, edit_type)

    def _answer(
        self, work: Callable[[Inputs, list[Any]], None], inputs: Inputs, request: PageRequest
    ) -> tuple[Any, SessionState, str]:
        state, history = inputs.state, inputs.state["history_audio"]
        try:
            with cancelled_by(request.cancellation), self.watched() as request.progress:
                checkpoint()
                work(inputs, history)
            state["message"] = Message("")
        except EditFailed as error:  # the history has its clone
            state["message"] = Message.of(error, localizer())
        except Exception as error:
            late = state["history_audio"] is not history  # for example an EDIT whose recording was deleted meanwhile
            state["message"] = Message.of(Overtaken() if late else error, localizer())
            # Leaves the chat unchanged, so that a playing player continues.
            return gr.skip(), state, state["message"]
        finally:  # after the message is stored: a reloaded page reads it from there
            self.page_requests.end(state, request)
        return as_messages(state["history_messages"], localizer()), state, state["message"]

    async def _on_clone(self, *inputs: Any, then_edit: bool = False) -> AsyncIterator[list[Any]]:
        work = self._clone_and_edit if then_edit else self._clone
        async for shown in self.page_requests.press(partial(self._answer, work, Inputs(*inputs)), inputs[-1]):
            if isinstance(shown[0], list) and not self._clone_appends:
                # Gradio's players do not detect a changed recording: an empty chat removes them first.
                yield [[], *[gr.skip()] * (len(shown) - 1)]
            yield shown

    async def _on_edit(self, *inputs: Any) -> AsyncIterator[list[Any]]:
        async for shown in self.page_requests.press(partial(self._answer, self._edit, Inputs(*inputs)), inputs[-1]):
            yield shown

    def register_components(self) -> None:
        """Draws the tab into the open Blocks."""
        with gr.Tab("Editx"):
            with gr.Row():
                with gr.Column():
                    self._draw_inputs()
                with gr.Column():
                    self._draw_task_and_history()
            with gr.Row():
                self.button_tts = gr.Button("CLONE", variant="primary", elem_id="clone")
                self.button_edit = gr.Button("EDIT", variant="primary", elem_id="edit")
                self.button_both = gr.Button("CLONE + EDIT", variant="primary", elem_id="clone-edit")
                self.button_stop = gr.Button(label("停止", "Stop"), variant="stop", elem_id="stop")
                self.clean_history_submit = gr.Button(label("清空历史", "Clear History"), elem_id="clear")
            if self.panel:
                self.panel.register_components()
            with gr.Accordion(label("说明", "Help"), open=False):
                gr.Markdown(label(*guidance.buttons_help(self._clone_appends)))
                if "paralinguistic" in self.speech.edit_types:
                    gr.Markdown(label(*guidance.paralinguistic_help(self._more_tags)))
                gr.Markdown(label(*guidance.VERIFIED))

    def _draw_inputs(self) -> None:
        name = label("内置引擎", "Built-in engine") if self._builtin else "Step-Audio-EditX"
        self.model_input = gr.Textbox(label=label("模型", "Model Name"), value=name, interactive=False)
        self.prompt_text_input = gr.Textbox(
            label=label("提示文本", "Prompt Text"),
            info=label(*guidance.PROMPT_TEXT_HELP),
            placeholder=label(*guidance.PROMPT_IS_TRANSCRIBED)
            if self.speech.transcribes
            else label(*guidance.PROMPT_EXAMPLE),
            elem_id="prompt-text",
        )
        self.message_places.draw("prompt_text")
        self.prompt_audio_input = gr.Audio(
            label=label("输入音频", "Input Audio"),
            sources=["upload", "microphone"],
            type="filepath",
            elem_id="prompt-audio",
            **supported(gr.Audio, buttons=["download"]),
        )
        self._about_recording = self.message_places.draw("recording")
        self.voice_choice.draw()
        self.no_microphone = gr.Markdown(label(*guidance.NO_MICROPHONE), visible=False, elem_id="no-microphone")
        self.transcription.draw()
        self.generated_text = gr.Textbox(
            label=label("目标文本", "Target Text"),
            placeholder=label(*(guidance.TARGET_IN_ENGLISH if self._builtin else guidance.TARGET)),
            max_lines=200,
            elem_id="target-text",
        )
        self.message_places.draw("target_text")

    def _draw_task_and_history(self) -> None:
        self.tasks.draw()
        self.chat_box = gr.Chatbot(
            label=label("历史", "History"),
            height=400,
            render_markdown=False,
            elem_id="history",
            **supported(gr.Chatbot, type="messages", buttons=["copy"]),
        )
        # Beside the buttons, so that it is visible on a phone.
        self.message_places.draw()
        self.line = gr.HTML(elem_id="progress", elem_classes="progress-line", padding=False)

    def register_events(self) -> None:
        """Connects the components of `register_components`."""
        state = self.state = gr.State(self.init_state())
        inputs = [
            self.prompt_text_input,
            self.prompt_audio_input,
            self.generated_text,
            self.tasks.task,
            self.tasks.sub_task,
            state,
        ]
        outputs = [self.chat_box, self.line, *self.message_places.components]
        hidden = {"show_progress": "hidden", **PRIVATE}
        # No event waits in Gradio's queue or is dropped there: each starts immediately.
        asking: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "multiple", **hidden}
        # Presses and new inputs clear earlier messages. The chat has a clear button of its own.
        clears = (self.clean_history_submit.click, self.chat_box.clear)
        presses = (self.button_tts.click, self.button_edit.click, self.button_both.click)
        for press in (*presses, *clears):
            press(**self.message_places.wiping())
        for press in presses:
            press(None, js=static.calling(SCRIPT, "begin()"), **PRIVATE)
        self.prompt_text_input.change(**self.message_places.wiping_by_hand("prompt_text"))
        self.generated_text.change(**self.message_places.wiping_by_hand("target_text"))
        self.tasks.register()
        on_both = partial(self._on_clone, then_edit=True)
        for press, handler in zip(presses, (self._on_clone, self._on_edit, on_both), strict=True):
            press(handler, inputs, outputs, **asking).then(None, js=static.calling(SCRIPT, "show()"), **PRIVATE)
        self.button_stop.click(self.page_requests.stop, state, queue=False, **hidden)
        for clear in clears:
            # Updates only the chat: the request that this stops may have shown its end already.
            clear(lambda state: self.clear_history(state)[0], state, self.chat_box, **hidden)
        self._connect_inputs()
        if self.panel:
            self.panel.register_events()

    def _connect_inputs(self) -> None:
        opened: Any = None  # no triggers: when the page is opened
        gr.on(opened, None, js=static.text("upload.js"), **PRIVATE)
        denied = "() => ({__type__: 'update', visible: !window.isSecureContext})"  # browsers that deny the microphone
        gr.on(opened, None, outputs=self.no_microphone, js=denied, **PRIVATE)
        self.recording_check.register(self.prompt_audio_input, self._about_recording)
        # `RecordingCheck.receive` and `Transcription.transcribe` end in any order, so neither clears messages.
        added = [self.prompt_audio_input.upload, self.prompt_audio_input.stop_recording]
        gr.on(added, **self.message_places.wiping("recording"))
        chosen = self.voice_choice.register(self.prompt_text_input, self.prompt_audio_input, self.generated_text)
        if self.speech.transcribes:
            self.transcription.register(added, self.prompt_text_input, self.prompt_audio_input, self._about_recording)
        if self.prewarm:
            self.prewarm.register([self.prompt_text_input, self.generated_text], self.prompt_audio_input, chosen)

    def register_restore(self, continued: Any) -> None:
        """Restores the inputs after ``continued``, the event after which a session continues."""
        texts = [self.prompt_text_input, self.generated_text]
        returned = self.saved_inputs.register(
            continued, texts, self.prompt_audio_input, self.tasks, self.chat_box, self._about_recording
        )
        if self.speech.transcribes:
            self.transcription.resume(returned)
