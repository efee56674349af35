"""`GPUManagedTTS`: a drop-in replacement for StepAudioTTS that is on the GPU only during calls::

    tts = GPUManagedTTS(model_path, audio_tokenizer, gpu_idle_timeout=600)
    audio, sample_rate = tts.clone("prompt.wav", "what is said in it", "what to say instead")

The engine's other attributes are available too, each use with its own lease; for several uses in one lease::

    speech_tokens, *_ = tts.preprocess_prompt_wav("prompt.wav")
    with tts.lease() as engine:
        engine.llm.generate(...)

Importing this module does not import torch; the first call imports and builds the engine.
"""

from __future__ import annotations

import enum
import itertools
import logging
import types
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gpu_manager import GPUResourceManager, Lease, ModelExists, get_gpu_manager
from residency.contracts import Engine
from residency.engines.engine_calls import EngineCalls
from residency.engines.generations import known_arguments, with_names_of_both
from residency.engines.part_proxy import Part, Path, asked_by_tools, not_settable
from residency.engines.text import speakable, spoken_by_step_audio
from residency.observability.error_classification import is_out_of_device_memory
from residency.status_types import Status
from residency.workers.remote_engine import RemoteCalls, RemoteEngine

if TYPE_CHECKING:
    import torch

__all__ = ["GPUManagedTTS", "Part", "ask"]

T = TypeVar("T")

_OWN = ("manager", "name", "_check_audio", "_check_text")

logger = logging.getLogger(__name__)


class Default(enum.Enum):
    """Marks omitted arguments, where None has a meaning for the engine."""

    ENGINES_OWN = "StepAudioTTS's own default"


class GPUManagedTTS:
    """StepAudioTTS with a lease for each call: loads or restores the engine, calls it, and offloads it.

    The first call builds the engine. Calls from several threads run one at a time, in order of arrival; they return
    or raise what the engine returns or raises.

    The engine's other attributes can be read here; this counts as a request and loads the engine. Values that hold
    device memory, which an offload frees, are replaced at any depth: by a `Part` on reading, by copies in results.
    Attributes can be set only on the engine itself, in ``load`` or under `lease`, except those in a subclass's body.
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
        check_audio: Callable[[str], object] | None = None,
        **engine_arguments: Any,
    ) -> None:
        """Takes the arguments of StepAudioTTS of either generation, then those of GPU management.

        Args:
            model_path: folder of the Step-Audio-EditX weights; None for the small built-in English engine.
            audio_tokenizer: a function without arguments that builds a StepAudioTokenizer on first use, or a ready one,
                which is offloaded now, outlives releases, and is restored by `close`.
            model_source, tts_model_id, quantization_config, torch_dtype, device_map, engine_arguments: as for the
                StepAudioTTS of the checkout, with its defaults; ``quantization`` and the others of the newer generation
                by name. Its ``cosyvoice_cuda_graph`` is False by default, since an engine with CUDA graphs cannot be
                offloaded. An argument of the other generation raises `InvalidInput`.
            gpu_idle_timeout: idle seconds (or ``"15m"``; -1: never) until host memory is freed too.
            gpu_keep_warm: seconds on the GPU after a call, likewise; None for the manager's default (0).
            gpu_load_timeout: seconds until a load fails with `LoadTimeout`; the next call starts anew. -1: no limit.
            manager: None for the manager of this process, `get_gpu_manager`.
            load: builds another engine instead of those two.
            name: the model's name in status; by default ``tts``, or ``tts-2`` and so on where that is taken.
            check_text: raises `InvalidInput` for a target text that the engine cannot speak, without loading the
                engine. The built-in engine and Step-Audio-EditX have their own.
            check_audio: raises `InvalidInput` for the path of a recording that the engine cannot take, likewise.
                Step-Audio-EditX has its own, for recordings that are too long for its context.
        """
        self.manager = manager or get_gpu_manager()
        given = {
            "model_source": model_source, "tts_model_id": tts_model_id, "quantization_config": quantization_config,
            "torch_dtype": torch_dtype, "device_map": device_map, **known_arguments(engine_arguments),
        }  # fmt: skip
        arguments = {name: value for name, value in given.items() if value is not Default.ENGINES_OWN}
        # A ready tokenizer belongs to the caller, and must outlive a release of the engine.
        keep = None if load or _is_factory(audio_tokenizer) else audio_tokenizer
        own = None if load else spoken_by_step_audio if model_path else speakable
        self._check_text: Callable[[str], object] | None = check_text or own
        self._check_audio = check_audio
        load = load or self._loader(model_path, audio_tokenizer, arguments)
        durations = {"keep_warm": gpu_keep_warm, "idle_timeout": gpu_idle_timeout, "load_timeout": gpu_load_timeout}
        self.name = self._register(name, load, keep=keep, **durations)

    def check_text(self, target_text: str) -> None:
        """Raises `InvalidInput` for a text that the engine is known not to support. Does not load the engine."""
        if self._check_text is not None:
            self._check_text(target_text)

    def check_audio(self, path: str) -> None:
        """Raises `InvalidInput` for a recording that the engine is known not to take. Does not load the engine."""
        if self._check_audio is not None:
            self._check_audio(path)

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        """Speaks ``target_text`` in the voice of a recording. Returns float32 [1, samples] on the CPU, and Hz.

        Raises `InvalidInput`, before the engine is loaded, if `check_text` or `check_audio` refuses.
        """
        self.check_text(target_text)
        self.check_audio(prompt_wav_path)
        return self._speak("clone", prompt_wav_path, prompt_text, target_text)

    @with_names_of_both
    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Edits a recording. Returns float32 [1, samples] on the CPU, and Hz.

        The names of the newer generation (``prompt_wav_path``, ``prompt_text``, ``target_text``) are accepted too.
        Raises `InvalidInput`, before the engine is loaded, if `check_audio` refuses the recording, or `check_text` the
        new text of ``paralinguistic``.
        """
        if edit_type == "paralinguistic" and text is not None:  # all others keep the words of the recording
            self.check_text(text)
        self.check_audio(input_audio_path)
        return self._speak("edit", input_audio_path, audio_text, edit_type, edit_info, text)

    def get_gpu_status(self) -> Status:
        """Returns the answer of ``GET /gpu/status``. Does not count as use."""
        return self.manager.status()

    def force_offload(self) -> bool:
        """Moves the engine to host memory. True: done; False: pending until the running request ends."""
        return self.manager.offload(self.name)

    def force_release(self) -> bool:
        """Frees GPU and host memory. True: done; False: pending until the running request ends."""
        return self.manager.release(self.name)

    def lease(self, timeout: float | str | None = None, keep_warm: float | str | None = None) -> Lease:
        """Returns a lease: ``with tts.lease() as engine`` is the engine itself, on the device until the block ends.

        See `GPUResourceManager.lease`; ``keep_warm``: how long it stays on the device after this request.
        """
        return self.manager.lease(self.name, timeout, keep_warm=keep_warm)

    def __getattr__(self, name: str) -> Any:
        if asked_by_tools(name) or name in _OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.read_part((name,))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN and not hasattr(type(self), name):
            raise not_settable(f"a {type(self).__name__}", name)
        super().__setattr__(name, value)

    def close(self) -> None:
        """Releases the engine after its running requests, and unregisters its name."""
        self.manager.unregister(self.name)

    def _speak(self, method: str, *arguments: Any) -> tuple[torch.Tensor, int]:
        def call(engine: Any) -> Any:
            return self._calls(engine).call((method,), arguments, {}, streams=False)

        answer: tuple[torch.Tensor, int] = ask(self.manager, self.name, call)
        return answer

    def _calls(self, engine: Any) -> EngineCalls | RemoteCalls:
        if isinstance(engine, RemoteEngine):
            return engine.calls_for(self)
        return EngineCalls(engine, self, self.manager.device.holds_tensor)

    def read_part(self, path: Path) -> Any:
        """Returns the engine's value at ``path``: the object itself, a tensor's copy, or a `Part`.

        Shares the model with the current request, if any.
        """
        with self.manager.lease(self.name, reading=True) as engine:
            return self._calls(engine).read(path)

    def use_part(self, path: Path, use: Callable[[Any], Any]) -> Any:
        return ask(self.manager, self.name, lambda engine: self._calls(engine).use(path, use))

    def set_part(self, path: Path, name: str, value: Any) -> NoReturn:
        raise not_settable(repr(Part(self, path)), name)

    def call_part(self, path: Path, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        with ExitStack() as held:
            lease = self.lease()
            held.enter_context(lease)
            answer = ask(self.manager, self.name, lambda engine: self._calls(engine).call(path, arguments, keywords))
            if not isinstance(answer, types.GeneratorType):
                return answer
            return self._stream(lease, held.pop_all(), answer)

    @staticmethod
    def _stream(lease: Lease, held: AbstractContextManager[Any], stream: Generator[Any, Any, Any]) -> Iterator[Any]:
        """Yields a generator's items; keeps its lease until it ends, is closed or is collected."""
        with held, closing(stream):
            lease.resumed()
            for item in stream:
                lease.suspended()
                yield item
                lease.resumed()

    def _loader(
        self, model_path: str | None, audio_tokenizer: Any, arguments: Mapping[str, Any]
    ) -> Callable[[], Engine]:
        if not model_path:
            torch_device = self.manager.device.torch_device

            def builtin() -> Engine:  # imports torch
                from residency.engines.builtin import BuiltinEngine

                return BuiltinEngine(device=torch_device)

            return builtin

        from residency.engines.step_audio import audio_check, build_tts, checkout_now, tts_shortcomings

        root = checkout_now()  # folder and variables may be others at the first request
        for shortcoming in tts_shortcomings(model_path, root, **arguments):
            logger.warning("%s", shortcoming)
        self._check_audio = self._check_audio or audio_check(root, arguments.get("max_model_len"))
        make_tokenizer = audio_tokenizer if _is_factory(audio_tokenizer) else lambda: audio_tokenizer
        return lambda: build_tts(model_path, make_tokenizer, root, **arguments)

    def _register(self, name: str | None, load: Callable[[], Engine], **settings: Any) -> str:
        names = (f"tts-{number}" if number > 1 else "tts" for number in itertools.count(1))
        while True:
            candidate = name or next(names)
            try:
                self.manager.register(candidate, load, **settings)
                return candidate
            except ModelExists:
                if name:
                    raise


def ask(manager: GPUResourceManager, name: str, call: Callable[[Any], T]) -> T:
    """Calls ``call`` with the engine of a managed model, on the device, and returns its result.

    If the device is full, offloads other models and calls it once more. Raises what `Lease` and ``call`` raise.
    """
    with manager.lease(name) as engine:
        try:
            return call(engine)
        except Exception as error:
            if not is_out_of_device_memory(error):
                raise
            logger.warning("%s: the device is full; offloading other models and retrying once. %s", name, error)
        # Outside the except block: its traceback keeps the memory of the first attempt.
        manager.make_room(name)
        return call(engine)


def _is_factory(audio_tokenizer: Any) -> bool:
    # A StepAudioTokenizer is callable too; its method identifies it.
    return callable(audio_tokenizer) and not hasattr(audio_tokenizer, "wav2token")
