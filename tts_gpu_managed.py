"""`GPUManagedTTS`: a drop-in for StepAudioTTS that is on the GPU only while it speaks::

    tts = GPUManagedTTS(model_path, audio_tokenizer, gpu_idle_timeout=600)
    audio, sample_rate = tts.clone("prompt.wav", "what is said in it", "what to say instead")

What else the engine has is there too, each use under a lease of its own; several in one lease::

    speech_tokens, *_ = tts.preprocess_prompt_wav("prompt.wav")
    with tts.lease() as engine:
        engine.llm.generate(...)

Importing this brings no torch; the engine is imported and built on the first call.
"""

from __future__ import annotations

import enum
import itertools
import logging
import sys
import traceback
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_manager import GPUResourceManager, Lease, ModelExists, get_gpu_manager
from residency.contracts import Engine
from residency.engines.answers import HandOut, is_bound, is_stream
from residency.engines.part_proxy import Part, Path, asked_by_tools, follow, not_settable, unwrapped
from residency.engines.text import speakable
from residency.memory.discovery import discover
from residency.observability.error_classification import all_of, is_out_of_device_memory
from residency.status_types import Status

if TYPE_CHECKING:
    import torch

__all__ = ["GPUManagedTTS", "Part", "ask"]

T = TypeVar("T")

_OWN = ("manager", "name", "_check_text")

logger = logging.getLogger(__name__)


class Default(enum.Enum):
    """What is left out, where None means something to the engine."""

    ENGINES_OWN = "StepAudioTTS's own default"


class GPUManagedTTS:
    """StepAudioTTS's methods, each one ``with manager.lease(...)``: load or restore, speak, leave the GPU.

    The engine is built on the first call, not here. Calls from several threads are served one at a time, in
    order of arrival; they return what the engine returned and raise what it raised, and the engine leaves
    the device either way.

    The engine's other attributes can be read here (which is a request, and loads it). What holds memory of the device
    is not handed out, since it leaves the device: it is a `Part`, or in answers a copy, at any depth. Attributes are
    set on the engine itself, in ``load`` or under `lease`; here they are refused, unless a subclass has them in its
    body.
    """

    def __init__(
        self,
        model_path: str | None,
        audio_tokenizer: Any = None,
        model_source: Any = Default.ENGINES_OWN,
        tts_model_id: str | None = None,
        quantization_config: str | None = None,
        torch_dtype: Any = Default.ENGINES_OWN,
        device_map: Any = "cuda",
        gpu_idle_timeout: float | str = 600,
        *,
        gpu_keep_warm: float | str | None = None,
        gpu_load_timeout: float | str = -1,
        manager: GPUResourceManager | None = None,
        load: Callable[[], Engine] | None = None,
        name: str | None = None,
        check_text: Callable[[str], object] | None = None,
    ) -> None:
        """StepAudioTTS's arguments, then ours.

        Args:
            model_path: folder of the Step-Audio-EditX weights; None for the small built-in English engine.
            audio_tokenizer: a function without arguments that makes a StepAudioTokenizer on first use, or a ready one,
                which leaves the device now, outlives releases, and is yours again after `close`.
            model_source, torch_dtype: as StepAudioTTS takes them; left out, its own defaults.
            gpu_idle_timeout: seconds idle (or ``"15m"``; -1 never) after which host memory is given up too.
            gpu_keep_warm: seconds on the GPU after a call, likewise; None for the manager's default (0).
            gpu_load_timeout: seconds after which a load is given up (`LoadTimeout`); the next loads anew. -1: never.
            manager: None for the process's own, `get_gpu_manager`.
            load: builds another engine instead of those two.
            name: the model's name in status; ``tts`` (or ``tts-2`` and so on, where that is taken) by default.
            check_text: raises `InvalidInput` for a target text that the engine cannot say, without the engine. The
                built-in engine brings its own.
        """
        self.manager = manager or get_gpu_manager()
        given = {
            "model_source": model_source,
            "tts_model_id": tts_model_id,
            "quantization_config": quantization_config,
            "torch_dtype": torch_dtype,
            "device_map": device_map,
        }
        arguments = {name: value for name, value in given.items() if value is not Default.ENGINES_OWN}
        # A tokenizer that is ready is the caller's, and must outlive a release of the engine.
        keep = None if load or _is_factory(audio_tokenizer) else audio_tokenizer
        if check_text is None and load is None and not model_path:
            check_text = speakable
        self._check_text = check_text
        load = load or self._loader(model_path, audio_tokenizer, arguments)
        self.name = self._register(
            name,
            load,
            keep_warm=gpu_keep_warm,
            idle_timeout=gpu_idle_timeout,
            load_timeout=gpu_load_timeout,
            keep=keep,
        )

    def check_text(self, target_text: str) -> None:
        """`InvalidInput` for a text that the engine cannot speak, as far as is known without it. Loads nothing."""
        if self._check_text is not None:
            self._check_text(target_text)

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        """Say ``target_text`` in the voice of a recording. Returns float32 [1, samples] on the CPU, and Hz.

        `InvalidInput`, before the engine is loaded, if `check_text` refuses the text.
        """
        self.check_text(target_text)
        answer: tuple[torch.Tensor, int] = self._speak(
            lambda engine: engine.clone(prompt_wav_path, prompt_text, target_text)
        )
        return answer

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Change a recording. Returns float32 [1, samples] on the CPU, and Hz."""
        answer: tuple[torch.Tensor, int] = self._speak(
            lambda engine: engine.edit(input_audio_path, audio_text, edit_type, edit_info, text)
        )
        return answer

    def get_gpu_status(self) -> Status:
        """The manager's status: what ``GET /gpu/status`` answers. Never counts as use."""
        return self.manager.status()

    def force_offload(self) -> bool:
        """Leave the GPU now. True: done; False: it follows the request that is running."""
        return self.manager.offload(self.name)

    def force_release(self) -> bool:
        """Leave GPU and host memory now. True: done; False: it follows the request that is running."""
        return self.manager.release(self.name)

    def lease(self, timeout: float | str | None = None) -> Lease:
        """``with tts.lease() as engine``: the engine itself, on the device until the block ends."""
        return self.manager.lease(self.name, timeout)

    def __getattr__(self, name: str) -> Any:
        if asked_by_tools(name) or name in _OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.read_part((name,))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN and not hasattr(type(self), name):
            raise not_settable(f"a {type(self).__name__}", name)
        super().__setattr__(name, value)

    def close(self) -> None:
        """Release the engine once its requests have ended, and give up its name."""
        self.manager.unregister(self.name)

    def _speak(self, call: Callable[[Engine], Any]) -> Any:
        def answer(engine: Engine) -> Any:
            with self._own_errors(engine):
                return self._own(call(engine), engine)

        return ask(self.manager, self.name, answer)

    def _own(self, answer: Any, engine: Engine) -> Any:
        """An answer that survives the engine's leaving."""
        return HandOut(self, engine, self.manager.device.holds_tensor, _holds_memory)(answer)

    @contextmanager
    def _own_errors(self, engine: Engine) -> Iterator[None]:
        """Replaces the attributes of errors by copies, in place, and clears the live locals of their frames."""
        callers = list(all_of(sys.exc_info()[1], hidden=True))
        try:
            yield
        except Exception as error:
            for found in all_of(error, hidden=True):
                if any(found is other for other in callers):
                    continue
                traceback.clear_frames(found.__traceback__)
                if isinstance(found, AttributeError):
                    found.obj = None
                if _holds_memory((found.args, vars(found))):
                    found.args, attributes = self._own((found.args, vars(found)), engine)
                    vars(found).update(attributes)
            raise

    def read_part(self, path: Path) -> Any:
        """What is found there in the engine: itself, a tensor's copy, or a `Part`.

        Joins the request that has the model, if one has it.
        """
        with self.manager.lease(self.name, reading=True) as engine, self._own_errors(engine):
            value = follow(path, engine)
            if not _is_tensor(value) and (is_bound(value) or _holds_memory(value)):
                return Part(self, path)
            return self._own(value, engine)

    def use_part(self, path: Path, use: Callable[[Any], Any]) -> Any:
        return self._speak(lambda engine: use(follow(path, engine)))

    def call_part(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        def call(engine: Engine) -> Any:
            there = {name: unwrapped(value, engine) for name, value in keywords.items()}
            with self._own_errors(engine):
                answer = follow(path, engine)(*(unwrapped(value, engine) for value in arguments), **there)
                return self._items(answer, engine) if is_stream(answer) else self._own(answer, engine)

        with ExitStack() as held:
            lease = self.lease()
            held.enter_context(lease)
            answer = ask(self.manager, self.name, call)
            if not isinstance(answer, types.GeneratorType):
                return answer
            return self._stream(lease, held.pop_all(), answer)

    def _stream(
        self, lease: Lease, held: AbstractContextManager[Any], stream: Generator[Any, Any, Any]
    ) -> Iterator[Any]:
        """A generator of the engine keeps the lease under which it began, until it ends, is closed or is let go."""
        with held, closing(stream):
            lease.resumed()
            for item in stream:
                lease.suspended()
                yield item
                lease.resumed()

    def _items(self, stream: Iterator[Any], engine: Engine) -> Generator[Any, None, None]:
        """The items as they go out. The lease is `_stream`'s."""
        generator = closing(stream) if isinstance(stream, Generator) else nullcontext()
        with self._own_errors(engine), generator:
            for item in stream:
                yield self._own(item, engine)

    def _loader(self, model_path: str | None, audio_tokenizer: Any, arguments: dict[str, Any]) -> Callable[[], Engine]:
        if not model_path:

            def builtin() -> Engine:  # which brings torch and much else
                from residency.engines.builtin import BuiltinEngine

                return BuiltinEngine(device=self.manager.device.torch_device)

            return builtin

        from residency.engines.step_audio import build_tts, tts_shortcomings

        for shortcoming in tts_shortcomings(model_path, **arguments):
            logger.warning("%s", shortcoming)

        def step_audio() -> Engine:
            make_tokenizer = audio_tokenizer if _is_factory(audio_tokenizer) else lambda: audio_tokenizer
            return build_tts(model_path, make_tokenizer, **arguments)

        return step_audio

    def _register(self, name: str | None, load: Callable[[], Engine], **settings: Any) -> str:
        for candidate in [name] if name else _free_names():
            try:
                self.manager.register(candidate, load, **settings)
                return candidate
            except ModelExists:
                if name:
                    raise
        raise AssertionError("there is always a free name")


def ask(manager: GPUResourceManager, name: str, call: Callable[[Any], T]) -> T:
    """One request to a managed model: what ``call`` answers, given the engine, which is on the device meanwhile.

    If the device is full in the middle of it, other models leave and it is made once more. Raises what `Lease` and
    ``call`` raise.
    """
    with manager.lease(name) as engine:
        try:
            return call(engine)
        except Exception as error:
            if not is_out_of_device_memory(error):
                raise
            logger.warning("%s: the device is full; making room and trying once more. %s", name, error)
        # Outside the except block, whose traceback keeps the memory of the first attempt.
        manager.make_room(name)
        return call(engine)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_memory(value: Any) -> bool:
    found = discover(value)
    return bool(found.tensors or found.sessions)


def _is_factory(audio_tokenizer: Any) -> bool:
    # A StepAudioTokenizer can be called too; it is known by its method.
    return callable(audio_tokenizer) and not hasattr(audio_tokenizer, "wav2token")


def _free_names() -> Iterator[str]:
    yield "tts"
    for number in itertools.count(2):
        yield f"tts-{number}"
