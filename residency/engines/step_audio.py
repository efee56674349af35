"""The real engine: an unmodified Step-Audio-EditX checkout and its weights. See `checkout` for how it is imported.

Not yet run with its real weights by this project: see docs/en/verification.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cancellation import checkpoint
from ..contracts import Engine
from ..errors import EngineUnavailable
from ..observability.error_classification import in_words, is_out_of_device_memory, may_be_device_loss, message_of
from ..sentences import Sentence
from . import requirements
from .asr import DEFAULT_MODEL, Recognizer, unavailable
from .checkout import find_checkout, import_from, install_command, not_found, unfit, unimportable
from .step_audio_weights import check_model, check_weights, from_a_hub, model_folder


def build(
    model_path: str,
    *,
    root: str | None = None,
    model_source: str = "auto",
    tokenizer_model_id: str | None = None,
    tts_model_id: str | None = None,
    quantization: str | None = None,
    torch_dtype: str = "bfloat16",
    device_map: str = "cuda",
) -> Engine:
    """Tokenizer and engine, with the arguments that the public app passes for the same flags.

    `EngineUnavailable` if the checkout or something that it needs is missing; or what the checkout raises.
    """
    checkout = _checkout(root)
    tts, tokenizers, loader = import_from(checkout, "tts", "tokenizer", "model_loader")
    import torch

    source = getattr(loader.ModelSource, model_source.upper())
    tokenizer_arguments = {"funasr_model_id": tokenizer_model_id} if tokenizer_model_id else {}

    def both() -> Engine:
        tokenizer = tokenizers.StepAudioTokenizer(
            os.path.join(model_path, "Step-Audio-Tokenizer"), model_source=source, **tokenizer_arguments
        )
        engine: Engine = tts.StepAudioTTS(
            os.path.join(model_path, model_folder(quantization)),
            tokenizer,
            model_source=source,
            tts_model_id=tts_model_id,
            quantization_config=quantization,
            torch_dtype=getattr(torch, torch_dtype),
            device_map=device_map,
        )
        return engine

    return _explained(
        both,
        checkout,
        lambda: check_weights(
            model_path,
            model_source=model_source,
            tokenizer_model_id=tokenizer_model_id,
            tts_model_id=tts_model_id,
            quantization=quantization,
        ),
    )


def build_tts(model_path: str, make_tokenizer: Callable[[], Any], **arguments: Any) -> Engine:
    """StepAudioTTS as a program builds it itself.

    ``make_tokenizer`` is called once the checkout's modules can be imported. Errors as for `build`.
    """
    checkout = _checkout(None)
    (tts,) = import_from(checkout, "tts")

    def engine() -> Engine:
        built: Engine = tts.StepAudioTTS(model_path, make_tokenizer(), **arguments)
        return built

    return _explained(engine, checkout, lambda: _check_tts(model_path, arguments))


def build_recognizer(root: str | None = None) -> Callable[[str], str]:
    """The checkout's own speech recognition: a function from an audio file to what is said in it.

    Its model only: its wrapper turns errors into empty answers, also that of a full device.
    """
    checkout = _checkout(root)
    (module,) = import_from(checkout, "whisper_wrapper")
    try:
        pipeline = module.WhisperWrapper().model
    except Exception as error:
        raise unavailable(DEFAULT_MODEL, error) from error
    return Recognizer(pipeline)


def shortcomings(model_path: str, root: str | None, *, model_source: str = "auto", **weights: Any) -> list[Sentence]:
    """What is not as it should be, in sentences, before anything is loaded: it may work all the same.

    `EngineUnavailable` without a checkout.
    """
    found = _shortcomings(root, lambda: check_weights(model_path, model_source=model_source, **weights))
    hub = from_a_hub(model_path, model_source)
    return [hub, *found] if hub else found


def tts_shortcomings(model_path: str, **arguments: Any) -> list[Sentence]:
    """The same for what `build_tts` is given; a missing checkout is one of them."""
    try:
        return _shortcomings(None, lambda: _check_tts(model_path, arguments))
    except EngineUnavailable as error:
        return [message_of(error)]


def _shortcomings(root: str | None, check: Callable[[], None]) -> list[Sentence]:
    checkout = _checkout(root)
    found = []
    try:
        check()
    except EngineUnavailable as error:
        found.append(message_of(error))
    if unmet := requirements.unmet(checkout / "requirements.txt"):
        others, command = requirements.listed(unmet), install_command(checkout)
        found.append(
            Sentence(
                f"Not as Step-Audio-EditX asks for: {others.en}. If it does not load: {command}",
                f"与 Step-Audio-EditX 的要求不符：{others.zh}。若无法加载：{command}",
            )
        )
    return found


def _check_tts(model_path: str, arguments: dict[str, Any]) -> None:
    model = arguments.get("tts_model_id")
    check_model(
        str(model_path if model is None else model),
        model_source=arguments.get("model_source", "auto"),
        quantization=arguments.get("quantization_config"),
    )


def _checkout(root: str | None) -> Path:
    checkout = find_checkout(root)
    if checkout is None:
        raise not_found()
    return checkout


def _explained(make: Callable[[], Engine], checkout: Path, check: Callable[[], None]) -> Engine:
    """What ``make`` builds. If it fails for want of something, the error says what, and what to do."""
    try:
        return _interruptible(make())
    except Exception as error:
        # Only now: the checkout knows best what it needs.
        reason = _reason(error, checkout, check)
        if reason is None:
            raise
        raise reason from error


def _interruptible(engine: Engine) -> Engine:
    """Let a cancellation end a request with the language model's next step, which is nearly all of its time.

    An engine whose language model computes in another process (vLLM) is not interrupted.
    """
    llm: Any = getattr(engine, "llm", None)
    if llm is not None and hasattr(llm, "register_forward_pre_hook"):
        llm.register_forward_pre_hook(_before_step)
    return engine


def _before_step(module: Any, arguments: Any) -> None:
    checkpoint()


def _reason(error: Exception, checkout: Path, check: Callable[[], None]) -> EngineUnavailable | None:
    """What is missing, if that is why it could not be built; None if the error says it best itself."""
    if is_out_of_device_memory(error) or may_be_device_loss(error):
        return None
    try:
        check()
    except EngineUnavailable as reason:
        return reason
    first = _what_came_first(error)
    if isinstance(first, ImportError):
        return unimportable(checkout, first)
    if _no_cuda(first):
        return EngineUnavailable(
            f"Step-Audio-EditX computes on an NVIDIA GPU, and torch finds none here ({first}): check nvidia-smi "
            f"and the driver, or use the built-in engine (no --model-path)",
            f"Step-Audio-EditX 需要 NVIDIA GPU，而 torch 在此未找到（{first}）：请检查 nvidia-smi 与驱动，"
            f"或使用内置引擎（不写 --model-path）",
        )
    packages = unfit(checkout, first)
    if packages or first is error:
        return packages
    why, then = in_words(first), message_of(error)
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be built ({why.en}; what it tried after that failed as well: {then.en}): "
        f"check --model-path, --model-source and the connection to the hub",
        f"无法构建 Step-Audio-EditX（{why.zh}；随后的尝试也失败了：{then.zh}）：请检查 --model-path、"
        f"--model-source 以及与模型仓库的连接",
    )


def _what_came_first(error: BaseException) -> BaseException:
    """Where something failed, and what was tried instead wants a module, what failed."""
    first = error
    while isinstance(first, ImportError) and first.__context__ is not None:
        first = first.__context__
    return error if isinstance(first, ImportError) else first


def _no_cuda(error: BaseException) -> bool:
    import torch

    return not torch.cuda.is_available() and "cuda" in str(error).lower()
