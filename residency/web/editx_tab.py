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
from .shared.gradio_compat import PRIVATE, localizer, session, supported
from .speech import sample_voices, task_names
from .speech.conversion import Limits
from .speech.queue import SpeechQueue
from .speech.recordings import Recordings
from .speech.service import SpeechService
from .speech.voices import VoiceStore
from .ui import guidance, status_text
from .ui.chat_history import Histories, Overtaken, SessionState, Step, as_messages, new_state
from .ui.gpu_panel import GpuPanel
from .ui.labels import label
from .ui.messages import SCRIPT, Message, MessagePlaces
from .ui.page_requests import PageRequest, PageRequests
from .ui.page_sessions import PageSessions
from .ui.prewarm import Prewarm
from .ui.recording_check import RecordingCheck
from .ui.saved_inputs import SavedInputs, sub_tasks_update
from .ui.transcription import Transcription
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
        queue = SpeechQueue(self._model) if manager is None else None
        self.watching: Callable[..., AbstractContextManager[None]] = (manager or queue).watching  # type: ignore[union-attr]
        self.recordings = Recordings(folder, getattr(args, "max_disk", math.inf))
        edit_types = edit_types or task_names.STEP_AUDIO_EDIT_TYPES
        self.speech = SpeechService(tts_engine, edit_types, self.recordings, recognize, limits, queue)
        voices_dir = getattr(args, "voices_dir", None) or os.path.join(folder, "voices")
        self.voices = VoiceStore(voices_dir, getattr(tts_engine, "check_audio", lambda path: None))
        self._histories = Histories(self.recordings)
        self._clone_appends, self._more_tags = clone_appends, more_tags
        self._builtin = getattr(args, "engine", None) == "builtin"
        self.panel = None if manager is None else GpuPanel(manager, permissions or Permissions())
        self.waiting = WaitingRequests(manager or queue)
        self.message_places = MessagePlaces()
        self.page_requests = PageRequests(self.message_places)
        self.page_sessions = PageSessions(self.page_requests, self.recordings, self.waiting, self.message_places)
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

    def generate_edit(self, *inputs: Any) -> tuple[Any, SessionState, str]:
        """Edits the latest result, or the recording if there is none. Arguments and result as `generate_clone`."""
        return self._answer(self._edit, Inputs(*inputs), self.page_requests.begin(inputs[-1]))

    def _clone(self, inputs: Inputs, history: list[Any]) -> None:
        recording = self.speech.incoming.readable(inputs.prompt_audio)
        result = self.speech.clone(recording, inputs.prompt_text, inputs.target_text)
        step = Step("clone", None, inputs.prompt_text, inputs.target_text, recording, result)
        self._histories.append(inputs.state, history, step, anew=not self._clone_appends)

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

    def _choose_task(self, edit_type: str) -> tuple[Any, str]:
        update = self.update_edit_info(edit_type)
        return update, task_names.line(edit_type, update["value"], localizer())

    def _use_sample(self, sample: sample_voices.SampleVoice, target_text: str | None) -> tuple[Any, ...]:
        recording = sample_voices.copied(sample, self.speech.folder)
        self.recordings.own(session(), recording)
        # Target text and its message.
        target = (gr.skip(), gr.skip()) if target_text else (sample_voices.TARGET_TEXT, "")
        return sample.says, recording, *target

    def _answer(
        self, work: Callable[[Inputs, list[Any]], None], inputs: Inputs, request: PageRequest
    ) -> tuple[Any, SessionState, str]:
        state, history = inputs.state, inputs.state["history_audio"]
        try:
            with cancelled_by(request.cancellation), self.watched() as request.progress:
                checkpoint()
                work(inputs, history)
            state["message"] = Message("")
        except Exception as error:
            late = state["history_audio"] is not history  # for example an EDIT whose recording was deleted meanwhile
            state["message"] = Message.of(Overtaken() if late else error, localizer())
            # Leaves the chat unchanged, so that a playing player continues.
            return gr.skip(), state, state["message"]
        finally:  # after the message is stored: a reloaded page reads it from there
            self.page_requests.end(state, request)
        return as_messages(state["history_messages"], localizer()), state, state["message"]

    async def _on_clone(self, *inputs: Any) -> AsyncIterator[list[Any]]:
        async for shown in self.page_requests.press(partial(self._answer, self._clone, Inputs(*inputs)), inputs[-1]):
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
        with gr.Row():
            self.samples = [
                (gr.Button(label(*sample.name), size="sm", min_width=120, elem_id=f"sample-{name}"), sample)
                for name, sample in sample_voices.VOICES.items()
            ]
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
        with gr.Row():  # on a phone one below the other, so that names have room
            with gr.Column(min_width=240):
                tasks = list(self.speech.edit_types)  # `SavedInputs` sets their names
                self.edit_type = gr.Dropdown(label=label("任务", "Task"), choices=tasks, value="clone", elem_id="task")
                self.message_places.draw("task")
            with gr.Column(min_width=240):
                self.edit_info = gr.Dropdown(
                    label=label("子任务", "Sub-task"), choices=[], interactive=False, elem_id="sub-task"
                )
                self.message_places.draw("sub_task")
        self.task_line = gr.Markdown(task_names.line("clone", None, label), elem_id="task-line")
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
            self.edit_type,
            self.edit_info,
            state,
        ]
        outputs = [self.chat_box, self.line, *self.message_places.components]
        hidden = {"show_progress": "hidden", **PRIVATE}
        # No event waits in Gradio's queue or is dropped there: each starts immediately.
        asking: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "multiple", **hidden}
        # Presses and new inputs clear earlier messages. The chat has a clear button of its own.
        clears = (self.clean_history_submit.click, self.chat_box.clear)
        for press in (self.button_tts.click, self.button_edit.click, *clears):
            press(**self.message_places.wiping())
        for press in (self.button_tts.click, self.button_edit.click):
            press(None, js=static.calling(SCRIPT, "begin()"), **PRIVATE)
        self.prompt_text_input.change(**self.message_places.wiping_by_hand("prompt_text"))
        self.generated_text.change(**self.message_places.wiping_by_hand("target_text"))
        self.edit_type.input(**self.message_places.wiping("task", "sub_task"))
        self.edit_info.input(**self.message_places.wiping("sub_task"))
        cloned = self.button_tts.click(self._on_clone, inputs, outputs, **asking)
        edited = self.button_edit.click(self._on_edit, inputs, outputs, **asking)
        for pressed in (cloned, edited):
            pressed.then(None, js=static.calling(SCRIPT, "show()"), **PRIVATE)
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
        # Only on user input: `SavedInputs` restores the sub-task too.
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
        self.edit_type.input(self._choose_task, self.edit_type, [self.edit_info, self.task_line], **at_once)
        self.edit_info.input(
            lambda task, sub_task: task_names.line(task, sub_task, localizer()),
            [self.edit_type, self.edit_info],
            self.task_line,
            **at_once,
        )
        # `RecordingCheck.receive` and `Transcription.transcribe` end in any order, so neither clears messages.
        added = [self.prompt_audio_input.upload, self.prompt_audio_input.stop_recording]
        gr.on(added, **self.message_places.wiping("recording"))
        filled_in = [self.prompt_text_input, self.prompt_audio_input, self.generated_text]
        filled_in.append(self.message_places.of("target_text"))
        for button, sample in self.samples:
            button.click(**self.message_places.wiping("recording", "prompt_text"))
            button.click(partial(self._use_sample, sample), self.generated_text, filled_in, **at_once)
        if self.speech.transcribes:
            self.transcription.register(added, self.prompt_text_input, self.prompt_audio_input, self._about_recording)
        if self.prewarm:
            samples = [button for button, _ in self.samples]
            self.prewarm.register([self.prompt_text_input, self.generated_text], self.prompt_audio_input, samples)

    def register_restore(self, continued: Any) -> None:
        """Restores the inputs after ``continued``, the event after which a session continues."""
        texts, tasks = [self.prompt_text_input, self.generated_text], [self.edit_type, self.edit_info]
        returned = self.saved_inputs.register(
            continued, texts, self.prompt_audio_input, tasks, self.task_line, self.chat_box, self._about_recording
        )
        if self.speech.transcribes:
            self.transcription.resume(returned)
