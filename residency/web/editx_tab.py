"""The Step-Audio-EditX page: a recording, texts, a task, CLONE and EDIT, and the history as a chat with players."""

from __future__ import annotations

import html
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import gradio as gr

from ..contracts import Engine
from ..errors import InvalidInput
from . import microphone, words
from .compat import PRIVATE, engine_event, session, speaker, supported
from .edit_types import STEP_AUDIO_EDIT_TYPES
from .gpu_panel import GpuPanel
from .guard import Guard
from .history import Histories, Overtaken, State, Step, as_messages, new_state
from .intent import Intent
from .labels import label
from .language import translated
from .recordings import Recordings
from .speech import Limits, Speech, explain
from .visits import Visits
from .waiting import Waiting

logger = logging.getLogger(__name__)

HELP = (
    "**CLONE** 用录音的音色朗读目标文本（任务须为 clone），成功后开始新的历史。\n\n"
    "**EDIT** 修改录音；已有结果时，在上一次结果上继续叠加；要编辑新的录音，请先清空历史。",
    "**CLONE** says the target text in the voice of the recording (task: clone); once it succeeds, a new history "
    "begins.\n\n**EDIT** changes the recording, or the latest result if there is one: edits stack. Clear the history "
    "to edit a new recording.",
)
TAGS = """
`[Breathing] [Laughter] [Surprise-oh] [Confirmation-en] [Uhm] [Surprise-ah] [Surprise-wa] [Sigh] [Question-ei]
[Dissatisfaction-hnn]`
"""
PARALINGUISTIC_HELP = (
    f"**paralinguistic** 在目标文本中加入标签： {TAGS}",
    f"**paralinguistic** puts sounds where the target text has tags: {TAGS}",
)
# Not over what somebody has written meanwhile, and not about a recording that was taken away.
_FILL_IN = """(heard, text, audio) =>
  (text && text.trim()) || !audio || audio.path !== heard.recording ? text : heard.text"""


class EditxTab:
    """Draws the tab and answers its events. One object serves all sessions; what belongs to one is in its `State`.

    Handlers raise nothing: an error becomes a message, and the history stays as it was. ``args`` is `Settings`
    or any namespace with ``tmp_dir``. If ``tts_engine`` has a ``manager``, the tab has the GPU panel too. With
    ``recognize``, what is said in a recording is written into an empty prompt text. ``guard`` decides who may press
    the panel's buttons; without one only people on this machine, and who has signed in.
    """

    def __init__(
        self,
        args: Any,
        encoder: Any = None,
        tts_engine: Engine | None = None,
        *,
        edit_types: Mapping[str, Sequence[str]] | None = None,
        recognize: Callable[[str], str] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.args = args
        self.encoder = encoder
        self.tts_engine = tts_engine
        folder = getattr(args, "tmp_dir", None) or os.path.join(tempfile.gettempdir(), "gradio")
        limits = Limits(getattr(args, "max_audio", Limits.audio_s), getattr(args, "max_text", Limits.text))
        self.speech = Speech(tts_engine, edit_types or STEP_AUDIO_EDIT_TYPES, folder, recognize, limits)
        self.recordings = Recordings(folder)
        self._histories = Histories(self.recordings)
        self._builtin = getattr(args, "engine", None) == "builtin"
        manager = getattr(tts_engine, "manager", None)
        self.panel = None if manager is None else GpuPanel(manager, guard or Guard())
        self._model = getattr(tts_engine, "name", None)
        self.waiting = Waiting(manager)
        self.visits = Visits(self._histories, self.recordings, self.waiting)
        self.engine_event = engine_event(manager is not None)
        self._hearing_event = engine_event(manager is not None, "recognizer", 8)
        self.intent = Intent(manager, self._model) if manager is not None and self._model else None

    # -- GPU ----------------------------------------------------------------------------------------------------

    def get_gpu_status(self) -> str:
        """Where the model is, in words."""
        return self.panel.text() if self.panel else words.NOT_ENABLED

    def offload_gpu(self) -> str:
        """Bring the model to main memory; say what came of it and where things are now."""
        return f"{self.panel.press('offload')}\n{self.panel.text()}" if self.panel else words.NOT_ENABLED

    def release_gpu(self) -> str:
        """Free the model's memory everywhere; say what came of it and where things are now."""
        return f"{self.panel.press('release')}\n{self.panel.text()}" if self.panel else words.NOT_ENABLED

    def told(self) -> AbstractContextManager[None]:
        """A block in which the person whose event this is reads what the model does meanwhile."""
        return self.waiting.told(self._model)

    # -- requests -----------------------------------------------------------------------------------------------

    def init_state(self) -> State:
        return new_state()

    def generate_clone(
        self,
        prompt_text: str | None,
        prompt_audio: str | None,
        target_text: str | None,
        edit_type: str | None,
        edit_info: str | None,
        state: State,
    ) -> tuple[Any, State, str]:
        """CLONE was pressed. Returns chat messages, state and an error message (empty if it went well)."""

        history = state["history_audio"]

        def clone() -> None:
            if edit_type != "clone":
                raise InvalidInput(
                    "CLONE needs the task clone: choose it, or press EDIT",
                    "CLONE 需要任务 clone：请选择它，或点击 EDIT",
                )
            result = self.speech.clone(prompt_audio, prompt_text, target_text)
            entry = Step("clone", None, prompt_text, target_text, prompt_audio, result)
            self._histories.begin(state, history, entry)

        return self._answer(clone, state)

    def _clone_and_wipe(self, *inputs: Any) -> tuple[Any, State, str]:
        chat, state, message = self.generate_clone(*inputs)
        return chat if message else [], state, message

    def generate_edit(
        self,
        prompt_text: str | None,
        prompt_audio: str | None,
        target_text: str | None,
        edit_type: str | None,
        edit_info: str | None,
        state: State,
    ) -> tuple[Any, State, str]:
        """EDIT was pressed: works on the latest result, or on the recording. Returns as `generate_clone` does."""

        history = state["history_audio"]
        source, said = history[-1] if history else (prompt_audio, prompt_text)

        def edit() -> None:
            if history and not os.path.isfile(str(source)):
                raise InvalidInput(
                    "The latest result is gone from the server: press Clear History, then EDIT changes the recording",
                    "服务器上已没有最近的结果：请点击“清空历史”，之后 EDIT 将修改录音",
                )
            result, says = self.speech.edit(source, said, edit_type, edit_info, target_text)
            self._histories.go_on(state, history, Step(edit_type, edit_info, said, says, source, result))

        return self._answer(edit, state)

    def transcribe(self, prompt_audio: str | None, prompt_text: str | None) -> tuple[str, str]:
        """A recording came. Returns what is said in it, or nothing if there is a text already, and an error message."""
        if not prompt_audio or (prompt_text and prompt_text.strip()):
            return "", ""
        try:
            with self.waiting.told("asr"):
                return self.speech.transcribe(prompt_audio), ""
        except Exception as error:
            return "", _warned(error)

    def _hear(self, prompt_audio: str | None, prompt_text: str | None) -> tuple[dict[str, Any], str]:
        text, message = self.transcribe(prompt_audio, prompt_text)
        return {"recording": prompt_audio, "text": text}, message

    def clear_history(self, state: State) -> tuple[list[Any], State, str]:
        self._histories.clear(state)
        return [], state, ""

    def update_edit_info(self, edit_type: str) -> Any:
        """The sub-tasks of a task."""
        choices = list(self.speech.edit_types.get(edit_type, []))
        return gr.update(choices=choices, value=choices[0] if choices else None, interactive=bool(choices))

    def _answer(self, work: Callable[[], None], state: State) -> tuple[Any, State, str]:
        history = state["history_audio"]
        with self._histories.at_work(state):  # until it is kept what came of it, for who has lost the line meanwhile
            try:
                with self.told():
                    work()
            except Exception as error:
                late = state["history_audio"] is not history  # an EDIT, for example, whose recording went meanwhile
                state["message"] = _warned(Overtaken() if late else error)
                # The chat is left alone, so that a player that is playing plays on.
                return gr.skip(), state, state["message"]
            state["message"] = ""
        return as_messages(state["history_messages"], speaker()), state, ""

    # -- the page -----------------------------------------------------------------------------------------------

    def register_components(self) -> None:
        """Draw the tab into the Blocks that are open."""
        with gr.Tab("Editx"):
            with gr.Row():
                with gr.Column():
                    name = label("内置引擎", "Built-in engine") if self._builtin else "Step-Audio-EditX"
                    self.model_input = gr.Textbox(label=label("模型", "Model Name"), value=name, interactive=False)
                    heard = label("上传录音后自动填写", "Written from the recording")
                    self.prompt_text_input = gr.Textbox(
                        label=label("提示文本", "Prompt Text"),
                        placeholder=heard if self.speech.transcribes else None,
                        elem_id="prompt-text",
                    )
                    self.prompt_audio_input = gr.Audio(
                        label=label("输入音频", "Input Audio"),
                        sources=["upload", "microphone"],
                        type="filepath",
                        elem_id="prompt-audio",
                        **supported(gr.Audio, buttons=["download"]),
                    )
                    microphone.draw_hint()
                    self.heard = gr.JSON(visible=False)
                    self.generated_text = gr.Textbox(
                        label=label("目标文本", "Target Text"), max_lines=200, elem_id="target-text"
                    )
                with gr.Column():
                    with gr.Row():
                        tasks = list(self.speech.edit_types)
                        self.edit_type = gr.Dropdown(
                            label=label("任务", "Task"), choices=tasks, value="clone", elem_id="task"
                        )
                        self.edit_info = gr.Dropdown(
                            label=label("子任务", "Sub-task"), choices=[], interactive=False, elem_id="sub-task"
                        )
                    self.chat_box = gr.Chatbot(
                        label=label("历史", "History"),
                        height=480,
                        render_markdown=False,
                        elem_id="history",
                        **supported(gr.Chatbot, type="messages", buttons=["copy"]),
                    )
            with gr.Row():
                self.button_tts = gr.Button("CLONE", variant="primary", elem_id="clone")
                self.button_edit = gr.Button("EDIT", variant="primary", elem_id="edit")
                self.clean_history_submit = gr.Button(label("清空历史", "Clear History"), elem_id="clear")
            gr.HTML("<p role='alert'></p>", elem_id="not-known")  # here.js writes it
            self.message = gr.HTML(elem_id="message")
            if self.panel:
                self.panel.register_components()
            with gr.Accordion(label("说明", "Help"), open=False):
                gr.Markdown(label(*HELP))
                if "paralinguistic" in self.speech.edit_types:
                    gr.Markdown(label(*PARALINGUISTIC_HELP))

    def register_events(self) -> None:
        """Connect what `register_components` has drawn."""
        state = self.state = gr.State(self.init_state())
        inputs = [
            self.prompt_text_input,
            self.prompt_audio_input,
            self.generated_text,
            self.edit_type,
            self.edit_info,
            state,
        ]
        outputs = [self.chat_box, state, self.message]
        asking = {**self.engine_event, **supported(gr.on, show_progress_on=self.chat_box), **PRIVATE}
        # In the browser, at once: the error of the last request is not the next one's.
        for press in (self.button_tts.click, self.button_edit.click):
            press(None, None, self.message, js="() => ''", show_progress="hidden", **PRIVATE)
        # Gradio's players do not notice that their recording was exchanged: a new history needs new players.
        self.button_tts.click(self._clone_and_wipe, inputs, outputs, **asking).then(
            lambda state: as_messages(state["history_messages"], speaker()),
            state,
            self.chat_box,
            show_progress="hidden",
            **PRIVATE,
        )
        self.button_edit.click(self.generate_edit, inputs, outputs, **asking)
        # The chat has a bin of its own.
        for clear in (self.clean_history_submit.click, self.chat_box.clear):
            clear(self.clear_history, [state], outputs, **PRIVATE)
        # Of everything that is uploaded or recorded, whether or not it is used.
        self.prompt_audio_input.change(
            lambda path: self.recordings.own(session(), path), self.prompt_audio_input, queue=False, **PRIVATE
        )
        self.edit_type.change(self.update_edit_info, self.edit_type, self.edit_info, queue=False, **PRIVATE)
        if self.speech.transcribes:
            hearing = self.prompt_audio_input.change(
                self._hear,
                [self.prompt_audio_input, self.prompt_text_input],
                [self.heard, self.message],
                **self._hearing_event,
                trigger_mode="multiple",  # the next recording is not kept back by one that was taken away
                **supported(self.prompt_audio_input.change, show_progress_on=self.prompt_text_input),
                **PRIVATE,
            )
            # In the browser, when the answer is there.
            present = [self.heard, self.prompt_text_input, self.prompt_audio_input]
            hearing.success(None, present, self.prompt_text_input, js=_FILL_IN, **PRIVATE)
            self.prompt_audio_input.clear(None, cancels=[hearing], **PRIVATE)
        if self.intent:
            writing = [box.focus for box in (self.prompt_text_input, self.generated_text)]
            writing += [box.input for box in (self.prompt_text_input, self.generated_text)]
            # When an upload begins no event comes, but the server sees its request: `Traffic` looks for that.
            speaking = [self.prompt_audio_input.start_recording, self.prompt_audio_input.upload]
            for event in (*writing, *speaking):
                event(self.intent.show, queue=False, show_progress="hidden", trigger_mode="once", **PRIVATE)
        if self.panel:
            self.panel.register_events()


def _warned(error: Exception) -> str:
    """The error as a message for the page, which stays until the next press; a toast would say it a second time."""
    sentence = html.escape(translated(explain(error), speaker()))
    return f"<p role='alert'>⚠️ {sentence}</p>"
