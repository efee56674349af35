"""Builds the real engine from an unmodified Step-Audio-EditX checkout and its weights.

`generations` tells the two generations apart; `step_audio_facts` has what they share; `checkout` imports it;
`step_audio_weights` checks weights.
Not yet run with its real weights by this project: see docs/en/verification.md.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cancellation import checkpoint
from ..contracts import Engine
from ..errors import EngineUnavailable
from ..observability.error_classification import in_words, is_out_of_device_memory, may_be_device_loss, message_of
from ..sentences import Sentence
from .asr import DEFAULT_MODEL, Recognizer, unavailable
from .checkout import find_checkout, import_from, unimportable, unmet, unmet_advice, unusable
from .generations import VLLM, Generation, check_audio, check_flags, generation_of, own_arguments
from .step_audio_weights import check_model, check_weights, from_a_hub
from .text import spoken_by_step_audio
from .transformers_versions import check_head, unsuitable_transformers


def build(
    model_path: str,
    *,
    root: str | None = None,
    model_source: str = "auto",
    tts_model_id: str | None = None,
    managed: bool = True,
    **flags: Any,
) -> Engine:
    """Builds engine and tokenizer with the arguments that the public app of the checkout passes for the same flags.

    Args:
        flags: those of either generation's app, by the names of their variables; None: not given.
        managed: the engine is built so that it can leave the GPU: vLLM with its sleep mode, the vocoder without CUDA
            graphs unless ``cosyvoice_cuda_graph`` is true.

    Raises `EngineUnavailable` if the checkout or a requirement is missing, `InvalidInput` for a flag of the other
    generation; otherwise the checkout's own error.
    """
    checkout = find_checkout(root)
    generation = generation_of(checkout)
    check_flags(generation, flags)
    tts, tokenizers, loader = _import(checkout, generation, "tts", "tokenizer", "model_loader")
    given = {name: value for name, value in flags.items() if value is not None}
    values = {**generation.flags, **({"cosyvoice_cuda_graph": False} if managed else {}), **given}
    source = getattr(loader.ModelSource, model_source.upper())
    tokenizer_folder, model_folder = generation.folders(model_path, model_source, flags)
    tokenizer_arguments, arguments = _arguments(generation, values)
    engine = _build(
        lambda: tts.StepAudioTTS(
            model_folder,
            tokenizers.StepAudioTokenizer(tokenizer_folder, model_source=source, **tokenizer_arguments),
            model_source=source,
            tts_model_id=tts_model_id,
            **arguments,
        ),
        checkout,
        _weights_check(model_path, generation, model_source, tts_model_id, flags),
        loader if managed else None,
    )
    if not managed:  # otherwise `GPUManagedTTS` has them
        engine.check_text = spoken_by_step_audio  # type: ignore[attr-defined]
        engine.check_audio = functools.partial(check_audio, generation, values.get("max_model_len"))  # type: ignore[attr-defined]
    return engine


def build_tts(model_path: str, make_tokenizer: Callable[[], Any], root: str | None = None, **arguments: Any) -> Engine:
    """Builds StepAudioTTS, managed, with the arguments of its constructor in either generation.

    Calls ``make_tokenizer`` once the checkout's modules can be imported. Errors as for `build`.
    """
    checkout = find_checkout(root)
    generation = generation_of(checkout)
    arguments = own_arguments(generation, arguments)
    tts, loader = _import(checkout, generation, "tts", "model_loader")
    if "cosyvoice_cuda_graph" in generation.arguments:
        arguments = {"cosyvoice_cuda_graph": False, **arguments}
    return _build(
        lambda: tts.StepAudioTTS(model_path, make_tokenizer(), **arguments),
        checkout,
        lambda: _check_tts(model_path, arguments),
        loader,
    )


def checkout_now() -> str | None:
    """Returns the folder of the checkout that a load would use now; None without one."""
    try:
        return str(find_checkout())
    except EngineUnavailable:
        return None


def generation(root: str | None = None) -> Generation:
    """Returns the generation of the checkout. Raises `EngineUnavailable` without one, or for an unknown one."""
    return generation_of(find_checkout(root))


def audio_check(root: str | None = None, max_model_len: int | None = None) -> Callable[[str], None]:
    """Returns a function that raises `InvalidInput` for the path of a recording that is too long for the engine.

    ``max_model_len``: the engine's argument, if given. Without a checkout the function accepts everything.
    """
    found: list[Generation] = []  # once: the source is read for the first request only

    def check(path: str) -> None:
        if not found:
            try:
                found.append(generation(root))
            except EngineUnavailable:
                return  # the load raises the same error
        check_audio(found[0], max_model_len, path)

    return check


def _import(checkout: Path, generation: Generation, *names: str) -> list[ModuleType]:
    """Imports modules of the checkout; the first is ``tts``."""
    if generation is VLLM:
        os.environ["VLLM_ATTENTION_BACKEND"] = "TRITON_ATTN"  # as in the public app, before its imports
    modules = import_from(checkout, *names)
    if not generation.arguments <= inspect.signature(modules[0].StepAudioTTS).parameters.keys():
        raise EngineUnavailable(
            f"The checkout {checkout} was changed to {generation.name} after this program had imported it: restart the "
            f"program",
            f"代码目录 {checkout} 在本程序导入之后被换成了 {generation.name}：请重启程序",
        )
    return modules


def _arguments(generation: Generation, values: Mapping[str, Any]) -> tuple[dict[str, object], dict[str, object]]:
    """Returns the arguments of ``StepAudioTokenizer`` and of ``StepAudioTTS`` for the flags of the app."""
    quantization = values.get("quantization")
    if generation is VLLM:
        own = {name: values[name] for name in generation.flags if name in generation.arguments}
        return {}, {"quantization": quantization, **own}
    import torch

    return {"funasr_model_id": values["tokenizer_model_id"]}, {
        "quantization_config": quantization,
        "torch_dtype": getattr(torch, values["torch_dtype"]),
        "device_map": values["device_map"],
    }


def _weights_check(
    model_path: str, generation: Generation, model_source: str, tts_model_id: str | None, flags: Mapping[str, Any]
) -> Callable[[], None]:
    of_weights = {name: flags.get(name) for name in ("quantization", "tokenizer_model_id", "tokenizer_path")}
    return lambda: check_weights(
        model_path, generation=generation, model_source=model_source, tts_model_id=tts_model_id, **of_weights
    )


def build_recognizer(root: str | None = None) -> Callable[[str], str]:
    """Builds the model of the checkout's speech recognition, as a function from the path of a recording to its text."""
    (module,) = import_from(find_checkout(root), "whisper_wrapper")
    try:
        pipeline = module.WhisperWrapper().model
    except Exception as error:
        raise unavailable(DEFAULT_MODEL, error) from error
    return Recognizer(pipeline)


def shortcomings(
    model_path: str,
    root: str | None,
    *,
    model_source: str = "auto",
    tts_model_id: str | None = None,
    managed: bool = True,
    **flags: Any,
) -> list[Sentence]:
    """Checks flags, weights and requirements without loading; returns warnings, since loading may still succeed.

    Raises `EngineUnavailable` without a checkout, or for one of an unknown generation; `InvalidInput` for a flag or a
    model path of the other generation.
    """
    checkout = find_checkout(root)
    generation = generation_of(checkout)
    check_flags(generation, flags)
    check = _weights_check(model_path, generation, model_source, tts_model_id, flags)
    found = _shortcomings(checkout, generation, check)
    hub = from_a_hub(model_path, model_source, generation)
    graphs = [_CUDA_GRAPHS] if managed and flags.get("cosyvoice_cuda_graph") else []
    return [*([hub] if hub else []), *graphs, *found]


def tts_shortcomings(model_path: str, root: str | None = None, **arguments: Any) -> list[Sentence]:
    """Does the same for the arguments of `build_tts`; a missing checkout is a warning here."""
    try:
        checkout = find_checkout(root)
    except EngineUnavailable as error:
        return [message_of(error)]
    generation = generation_of(checkout)
    arguments = own_arguments(generation, arguments)
    graphs = [_CUDA_GRAPHS] if arguments.get("cosyvoice_cuda_graph") else []
    return [*graphs, *_shortcomings(checkout, generation, lambda: _check_tts(model_path, arguments))]


_CUDA_GRAPHS = Sentence(
    "The vocoder captures CUDA graphs (--cosyvoice-cuda-graph), which contain addresses of GPU memory: the engine can "
    "only be released, not offloaded after a request. Leave the flag out to free the GPU after each request, or give a "
    "short --gpu-idle-timeout to release it soon",
    "声码器会捕获 CUDA graph（--cosyvoice-cuda-graph），其中含有显存地址：引擎在请求之后无法卸载，只能释放。"
    "去掉该参数即可在每次请求后腾出 GPU；或设置较短的 --gpu-idle-timeout，使其尽快释放",
)


def _shortcomings(checkout: Path, generation: Generation, check: Callable[[], None]) -> list[Sentence]:
    packages = unmet(checkout)
    found = unsuitable_transformers(checkout, generation, packages)
    try:
        check()
    except EngineUnavailable as error:
        found.append(message_of(error))
    if advice := unmet_advice(checkout, packages):
        found.append(
            Sentence(f"Step-Audio-EditX may not load. {advice.en}", f"Step-Audio-EditX 可能无法加载。{advice.zh}")
        )
    return found


def _check_tts(model_path: str, arguments: Mapping[str, Any]) -> None:
    model = arguments.get("tts_model_id")
    check_model(
        str(model_path if model is None else model),
        model_source=arguments.get("model_source", "auto"),
        quantization=arguments.get("quantization_config") or arguments.get("quantization"),
    )


@contextmanager
def _with_sleep_mode(loader: ModuleType | None) -> Iterator[None]:
    """Lets the checkout build vLLM with its sleep mode, where the platform has one."""
    platforms = sys.modules.get("vllm.platforms")
    original = getattr(loader, "LLM", None)
    if original is None or platforms is None or not platforms.current_platform.is_sleep_mode_available():
        yield
        return
    loader.LLM = functools.partial(original, enable_sleep_mode=True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        loader.LLM = original  # type: ignore[union-attr]


def _build(
    make: Callable[[], Any], checkout: Path, check: Callable[[], None], loader: ModuleType | None = None
) -> Engine:
    """Returns the engine from ``make``, cancellable. Raises `EngineUnavailable` if it fails for a known reason.

    A cancellation ends a request at the language model's next step, unless that computes in another process (vLLM).
    """
    try:
        with _with_sleep_mode(loader):
            engine: Engine = make()
    except Exception as error:
        # Checked only after a failure: the checkout decides what it needs.
        if reason := _reason(error, checkout, check):
            raise reason from error
        raise
    check_head(engine)
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
