"""Builds the real engine from an unmodified Step-Audio-EditX checkout and its weights.

`step_audio_facts` has its modules, signatures and files; `checkout` imports it; `step_audio_weights` checks weights.
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
from . import step_audio_facts as facts
from .asr import DEFAULT_MODEL, Recognizer, unavailable
from .checkout import find_checkout, import_from, unimportable, unmet, unmet_advice, unusable
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
    """Builds engine and tokenizer with the arguments that the public app passes for the same flags.

    Raises `EngineUnavailable` if the checkout or a requirement is missing; otherwise the checkout's own error.
    """
    checkout = find_checkout(root)
    tts, tokenizers, loader = import_from(checkout, "tts", "tokenizer", "model_loader")
    import torch

    source = getattr(loader.ModelSource, model_source.upper())
    acoustic_model = {"funasr_model_id": tokenizer_model_id} if tokenizer_model_id else {}
    weights = {"tokenizer_model_id": tokenizer_model_id, "tts_model_id": tts_model_id, "quantization": quantization}
    return _build(
        lambda: tts.StepAudioTTS(
            os.path.join(model_path, model_folder(quantization)),
            tokenizers.StepAudioTokenizer(
                os.path.join(model_path, facts.TOKENIZER), model_source=source, **acoustic_model
            ),
            model_source=source,
            tts_model_id=tts_model_id,
            quantization_config=quantization,
            torch_dtype=getattr(torch, torch_dtype),
            device_map=device_map,
        ),
        checkout,
        lambda: check_weights(model_path, model_source=model_source, **weights),
    )


def build_tts(model_path: str, make_tokenizer: Callable[[], Any], **arguments: Any) -> Engine:
    """Builds StepAudioTTS with the arguments of its constructor.

    Calls ``make_tokenizer`` once the checkout's modules can be imported. Errors as for `build`.
    """
    checkout = find_checkout(None)
    (tts,) = import_from(checkout, "tts")
    return _build(
        lambda: tts.StepAudioTTS(model_path, make_tokenizer(), **arguments),
        checkout,
        lambda: _check_tts(model_path, arguments),
    )


def build_recognizer(root: str | None = None) -> Callable[[str], str]:
    """Builds the model of the checkout's speech recognition, as a function from the path of a recording to its text."""
    (module,) = import_from(find_checkout(root), "whisper_wrapper")
    try:
        pipeline = module.WhisperWrapper().model
    except Exception as error:
        raise unavailable(DEFAULT_MODEL, error) from error
    return Recognizer(pipeline)


def shortcomings(model_path: str, root: str | None, *, model_source: str = "auto", **weights: Any) -> list[Sentence]:
    """Checks weights and requirements without loading; returns warnings, since loading may still succeed.

    Raises `EngineUnavailable` without a checkout.
    """
    found = _shortcomings(root, lambda: check_weights(model_path, model_source=model_source, **weights))
    hub = from_a_hub(model_path, model_source)
    return [hub, *found] if hub else found


def tts_shortcomings(model_path: str, **arguments: Any) -> list[Sentence]:
    """Does the same for the arguments of `build_tts`; a missing checkout is a warning here."""
    try:
        return _shortcomings(None, lambda: _check_tts(model_path, arguments))
    except EngineUnavailable as error:
        return [message_of(error)]


def _shortcomings(root: str | None, check: Callable[[], None]) -> list[Sentence]:
    checkout = find_checkout(root)
    found = []
    try:
        check()
    except EngineUnavailable as error:
        found.append(message_of(error))
    if advice := unmet_advice(checkout, unmet(checkout)):
        found.append(
            Sentence(f"Step-Audio-EditX may not load. {advice.en}", f"Step-Audio-EditX 可能无法加载。{advice.zh}")
        )
    return found


def _check_tts(model_path: str, arguments: dict[str, Any]) -> None:
    model = arguments.get("tts_model_id")
    check_model(
        str(model_path if model is None else model),
        model_source=arguments.get("model_source", "auto"),
        quantization=arguments.get("quantization_config"),
    )


def _build(make: Callable[[], Any], checkout: Path, check: Callable[[], None]) -> Engine:
    """Returns the engine from ``make``, cancellable. Raises `EngineUnavailable` if it fails for a known reason.

    A cancellation ends a request at the language model's next step, unless that computes in another process (vLLM).
    """
    try:
        engine: Engine = make()
    except Exception as error:
        # Checked only after a failure: the checkout decides what it needs.
        if reason := _reason(error, checkout, check):
            raise reason from error
        raise
    llm: Any = getattr(engine, "llm", None)
    if hasattr(llm, "register_forward_pre_hook"):
        llm.register_forward_pre_hook(lambda module, arguments: checkpoint())
    return engine


def _reason(error: Exception, checkout: Path, check: Callable[[], None]) -> EngineUnavailable | None:
    """Returns the error to show if the cause is known; None if the original error is the clearest."""
    if is_out_of_device_memory(error) or may_be_device_loss(error):
        return None
    try:
        check()
    except EngineUnavailable as reason:
        return reason
    first = _root_cause(error)
    if isinstance(first, ImportError):
        return unimportable(checkout, first)
    import torch

    if not torch.cuda.is_available() and "cuda" in str(first).lower():
        return EngineUnavailable(
            f"Step-Audio-EditX computes on an NVIDIA GPU, and torch finds none here ({first}): check nvidia-smi "
            f"and the driver, or use the built-in engine (no --model-path)",
            f"Step-Audio-EditX 需要 NVIDIA GPU，而 torch 在此未找到（{first}）：请检查 nvidia-smi 与驱动，"
            f"或使用内置引擎（不写 --model-path）",
        )
    packages = unusable(checkout, first)
    if packages or first is error:
        return packages
    why, then = in_words(first), message_of(error)
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be built ({why.en}; its next attempt failed as well: {then.en}): "
        f"check --model-path, --model-source and the connection to the hub",
        f"无法构建 Step-Audio-EditX（{why.zh}；随后的尝试也失败了：{then.zh}）：请检查 --model-path、"
        f"--model-source 以及与模型仓库的连接",
    )


def _root_cause(error: BaseException) -> BaseException:
    """Returns the first error of the chain if a fallback after it failed with an `ImportError`."""
    first = error
    while isinstance(first, ImportError) and first.__context__ is not None:
        first = first.__context__
    return error if isinstance(first, ImportError) else first
