"""`GPUManagedTTS`: a drop-in for StepAudioTTS that is on the GPU only while it speaks::

    tts = GPUManagedTTS(model_path, audio_tokenizer, gpu_idle_timeout=600)
    audio, sample_rate = tts.clone("prompt.wav", "what is said in it", "what to say instead")

Importing this brings no torch; the engine is imported and built on the first call.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gpu_manager import GPUResourceManager, ModelExists, get_gpu_manager
from residency.contracts import Engine
from residency.errors import is_out_of_device_memory

if TYPE_CHECKING:
    import torch

__all__ = ["GPUManagedTTS"]

logger = logging.getLogger(__name__)


class GPUManagedTTS:
    """StepAudioTTS's methods, each one ``with manager.lease(...)``: load or restore, speak, leave the GPU.

    The engine is built on the first call, not here. Calls from several threads are served one at a time, in
    order of arrival; they return what the engine returned and raise what it raised, and the engine leaves
    the device either way.
    """

    def __init__(
        self,
        model_path: str | None,
        audio_tokenizer: Any = None,
        model_source: Any = None,
        tts_model_id: str | None = None,
        quantization_config: str | None = None,
        torch_dtype: Any = None,
        device_map: str = "cuda",
        gpu_idle_timeout: float | str = 600,
        *,
        gpu_keep_warm: float | str | None = None,
        gpu_load_timeout: float | str = -1,
        manager: GPUResourceManager | None = None,
        load: Callable[[], Engine] | None = None,
        name: str | None = None,
    ) -> None:
        """StepAudioTTS's arguments, then ours.

        Args:
            model_path: folder of the Step-Audio-EditX weights; None for the small built-in English engine.
            audio_tokenizer: a function without arguments that makes a StepAudioTokenizer on first use, or a ready one
                (which stays in main memory after a release, since it cannot be made again).
            model_source, torch_dtype: as StepAudioTTS takes them; None for its own defaults.
            gpu_idle_timeout: seconds idle (or ``"15m"``; -1 never) after which host memory is given up too.
            gpu_keep_warm: seconds on the GPU after a call, likewise; None for the manager's default (0).
            gpu_load_timeout: seconds after which a load is given up (`LoadTimeout`); the next loads anew. -1: never.
            manager: None for the process's own, `get_gpu_manager`.
            load: builds another engine instead of those two.
            name: the model's name in status; ``tts`` (or ``tts-2`` and so on, where that is taken) by default.
        """
        self.manager = manager or get_gpu_manager()
        arguments = {
            "model_source": model_source,
            "tts_model_id": tts_model_id,
            "quantization_config": quantization_config,
            "torch_dtype": torch_dtype,
            "device_map": device_map,
        }
        # A tokenizer that is ready is the caller's, and must outlive a release of the engine.
        keep = None if load or _is_factory(audio_tokenizer) else audio_tokenizer
        load = load or self._loader(model_path, audio_tokenizer, arguments)
        self.name = self._register(
            name,
            load,
            keep_warm=gpu_keep_warm,
            idle_timeout=gpu_idle_timeout,
            load_timeout=gpu_load_timeout,
            keep=keep,
        )

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        """Say ``target_text`` in the voice of a recording. Returns float32 [1, samples] on the CPU, and Hz."""
        return self._speak(lambda engine: engine.clone(prompt_wav_path, prompt_text, target_text))

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Change a recording. Returns float32 [1, samples] on the CPU, and Hz."""
        return self._speak(lambda engine: engine.edit(input_audio_path, audio_text, edit_type, edit_info, text))

    def get_gpu_status(self) -> dict[str, Any]:
        """The manager's status: what ``GET /gpu/status`` answers. Never counts as use."""
        return self.manager.status()

    def force_offload(self) -> bool:
        """Leave the GPU now. True: done; False: it follows the request that is running."""
        return self.manager.offload(self.name)

    def force_release(self) -> bool:
        """Leave GPU and host memory now. True: done; False: it follows the request that is running."""
        return self.manager.release(self.name)

    def close(self) -> None:
        """Release the engine once its requests have ended, and give up its name."""
        self.manager.unregister(self.name)

    def _speak(self, call: Callable[[Engine], tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
        """One request. If the device is full in the middle of it, other models leave and it is made once more."""
        with self.manager.lease(self.name) as engine:
            try:
                audio, sample_rate = call(engine)
            except Exception as error:
                if not is_out_of_device_memory(error):
                    raise
                logger.warning("%s: the device is full; making room and trying once more. %s", self.name, error)
            else:
                return self._own(audio), sample_rate
            # Out of the except block: its traceback held what the first attempt had allocated.
            self.manager.make_room(self.name)
            audio, sample_rate = call(engine)
            return self._own(audio), sample_rate

    def _own(self, audio: torch.Tensor) -> torch.Tensor:
        """Audio that survives the engine's leaving: what lies on the device may be a buffer of the engine."""
        return audio.clone() if self.manager.device.holds_tensor(audio) else audio

    def _loader(self, model_path: str | None, audio_tokenizer: Any, arguments: dict[str, Any]) -> Callable[[], Engine]:
        # The engines are imported where they are built: they bring torch and much else.
        if not model_path:

            def builtin() -> Engine:
                from residency.engines.builtin import BuiltinEngine

                return BuiltinEngine(device=self.manager.device.torch_device)

            return builtin

        def step_audio() -> Engine:
            from residency.engines.step_audio import build_tts

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


def _is_factory(audio_tokenizer: Any) -> bool:
    # A StepAudioTokenizer can be called too; it is known by its method.
    return callable(audio_tokenizer) and not hasattr(audio_tokenizer, "wav2token")


def _free_names() -> Iterator[str]:
    yield "tts"
    for number in itertools.count(2):
        yield f"tts-{number}"
