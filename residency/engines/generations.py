"""The two generations of the public Step-Audio-EditX, as data, and the one of a checkout, from its source.

They differ in the arguments of ``tts.StepAudioTTS``, in the flags of their app and in the folders of their weights.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from ..errors import EngineUnavailable, InvalidInput
from ..observability.error_classification import message_of
from . import step_audio_facts as facts

Method = TypeVar("Method", bound=Callable[..., Any])
#: Folders with the tokenizer and the model, from the flags' values.
Folders = tuple[str, str]


@dataclass(frozen=True)
class Generation:
    """One generation of Step-Audio-EditX.

    Attributes:
        name, name_zh: for messages.
        arguments: those of ``StepAudioTTS`` that the other generation lacks.
        edit: names of the five arguments of its ``edit``.
        flags: those of its app that the other lacks, as names of variables, and their defaults there.
        quantizations: choices of ``--quantization``.
        context_tokens: largest number of tokens of a prompt and its answer.
        hub_id: example of a model path on a hub.
        clone_appends: a clone continues the history of the page, instead of starting a new one.
        tags: tags of sounds that its guide lists beside those of the older generation, without brackets.
    """

    name: str
    name_zh: str
    arguments: frozenset[str]
    edit: tuple[str, ...]
    flags: Mapping[str, Any]
    quantizations: tuple[str, ...]
    context_tokens: int
    folders: Callable[[str, str, Mapping[str, Any]], Folders]
    hub_id: str
    clone_appends: bool = False
    tags: tuple[str, ...] = ()


def _folders_below(model_path: str, model_source: str, flags: Mapping[str, Any]) -> Folders:
    model = facts.MODEL_BY_QUANTIZATION.get(flags.get("quantization") or "", facts.MODEL)
    return f"{model_path}/{facts.TOKENIZER}", f"{model_path}/{model}"


def _folders_beside(model_path: str, model_source: str, flags: Mapping[str, Any]) -> Folders:
    """Looks for the tokenizer beside the model, then in it; on a hub, beside it."""
    beside, inside = Path(model_path).parent / facts.TOKENIZER, Path(model_path) / facts.TOKENIZER
    on_a_hub = model_source in ("huggingface", "modelscope") or not Path(model_path).exists()
    found = beside if on_a_hub or beside.exists() else inside
    return flags.get("tokenizer_path") or str(found), model_path


TRANSFORMERS = Generation(
    name="Step-Audio-EditX of 2025 (transformers)",
    name_zh="2025 年版 Step-Audio-EditX（transformers）",
    arguments=frozenset({"quantization_config", "torch_dtype", "device_map"}),
    edit=("input_audio_path", "audio_text", "edit_type", "edit_info", "text"),
    flags=MappingProxyType(
        {"tokenizer_model_id": facts.ACOUSTIC_MODEL, "torch_dtype": "bfloat16", "device_map": "cuda"}
    ),
    quantizations=("int4", "int8", "awq-4bit"),
    context_tokens=8192,
    folders=_folders_below,
    hub_id=facts.HUB,
)

VLLM = Generation(
    name="Step-Audio-EditX of 2026 (vLLM)",
    name_zh="2026 年版 Step-Audio-EditX（vLLM）",
    arguments=frozenset({
        "quantization", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "enforce_eager", "dtype",
        "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "cosyvoice_dtype", "cosyvoice_cuda_graph",
    }),
    edit=("prompt_wav_path", "prompt_text", "edit_type", "edit_info", "target_text"),
    flags=MappingProxyType({
        "tokenizer_path": None,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 3072,
        "dtype": "bfloat16",
        "enforce_eager": False,
        "kv_cache_dtype": None,
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "cosyvoice_dtype": "float32",
        "cosyvoice_cuda_graph": True,
    }),
    quantizations=("awq", "gptq", "fp8"),
    context_tokens=8192,
    folders=_folders_beside,
    hub_id=f"{facts.HUB}/{facts.MODEL}",
    clone_appends=True,
    tags=("sigh", "inhale", "laugh", "chuckle", "exhale", "clears throat", "snort", "giggle", "cough", "breath"),
)  # fmt: skip

GENERATIONS = (TRANSFORMERS, VLLM)

_AUDIO_TOKENS_PER_S = 125 / 3
"""Tokens for a second of a recording: 16.7 linguistic and 25 acoustic ones."""

_TEXT_TOKENS = 192
"""Tokens of the instructions and a short text."""


def generation_of(checkout: Path) -> Generation:
    """Recognizes a checkout by the arguments in its source; imports nothing of it.

    Raises `EngineUnavailable`, with the difference, if it is of neither generation.
    """
    file = checkout / "tts.py"
    try:
        arguments, edit = _signatures(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = message_of(error)
        raise EngineUnavailable(
            f"{file} cannot be read ({reason.en}): clone the checkout again",
            f"无法读取 {file}（{reason.zh}）：请重新克隆代码",
        ) from error
    for generation in GENERATIONS:
        if generation.arguments <= arguments and edit[: len(generation.edit)] == generation.edit:
            return generation
    nearest = min(GENERATIONS, key=lambda generation: len(generation.arguments - arguments))
    missing = ", ".join(sorted(nearest.arguments - arguments)) or f"edit({', '.join(nearest.edit)})"
    other = ", ".join(sorted(arguments - nearest.arguments - set(facts.COMMON_ARGUMENTS))) or f"edit({', '.join(edit)})"
    raise EngineUnavailable(
        f"{checkout} is of no known generation of Step-Audio-EditX. The nearest is {nearest.name}; its StepAudioTTS "
        f"has {missing}, this one has {other}. Check out the public version: git clone {facts.REPOSITORY}",
        f"{checkout} 不属于任何已知的 Step-Audio-EditX 版本。最接近的是 {nearest.name_zh}：其 StepAudioTTS "
        f"有 {missing}，而此处为 {other}。请使用公开版本：git clone {facts.REPOSITORY}",
    )


def check_flags(generation: Generation, given: Mapping[str, Any]) -> None:
    """Raises `InvalidInput` for given flags (names and values; None: not given) of the other generation."""
    other = _other(generation)
    foreign = [name for name, value in given.items() if value is not None and name in other.flags]
    if foreign:
        named = ", ".join(f"--{'no-' * (given[name] is False)}{name.replace('_', '-')}" for name in foreign)
        raise InvalidInput(
            f"{named}: only {other.name} has this, and the checkout is {generation.name}. Leave it out",
            f"{named}：仅 {other.name_zh}支持，而当前代码是 {generation.name_zh}。请去掉",
        )
    quantization = given.get("quantization")
    if quantization is not None and quantization not in generation.quantizations:
        choices = ", ".join(generation.quantizations)
        raise InvalidInput(
            f"--quantization {quantization}: {generation.name} has {choices}",
            f"--quantization {quantization}：{generation.name_zh}仅支持 {choices}",
        )


def own_arguments(generation: Generation, given: Mapping[str, Any]) -> dict[str, object]:
    """Returns the given arguments of ``StepAudioTTS`` without defaults of the other generation.

    Raises `InvalidInput` for other arguments of the other generation.
    """
    other = _other(generation)
    foreign = {name: value for name, value in given.items() if name in other.arguments}
    if named := ", ".join(name for name, value in foreign.items() if _DEFAULTS.get(name, _DEFAULTS) != value):
        own = ", ".join(sorted(generation.arguments))
        raise InvalidInput(
            f"{named}: only StepAudioTTS of {other.name} takes this, and the checkout is {generation.name}, which "
            f"takes {own}",
            f"{named}：仅 {other.name_zh}的 StepAudioTTS 支持，而当前代码是 {generation.name_zh}，其参数为 {own}",
        )
    return {name: value for name, value in given.items() if name not in foreign}


#: Defaults in the signature of `GPUManagedTTS`, which is that of the older generation.
_DEFAULTS = {"quantization_config": None, "device_map": "cuda"}


def known_arguments(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the given arguments; raises TypeError for one that ``StepAudioTTS`` of no generation has."""
    known = frozenset().union(*(generation.arguments for generation in GENERATIONS))
    if unknown := ", ".join(given.keys() - known):
        raise TypeError(f"unexpected keyword argument {unknown}; StepAudioTTS has {', '.join(sorted(known))}")
    return given


def with_names_of_both(edit: Method) -> Method:
    """Decorator for ``edit`` with the older names of its arguments: accepts the newer ones too."""
    older = dict(zip(VLLM.edit, TRANSFORMERS.edit, strict=True))

    @functools.wraps(edit)
    def renamed(self: Any, *arguments: Any, **named: Any) -> Any:
        translated = {older.get(name, name): value for name, value in named.items()}
        if len(translated) < len(named):
            raise TypeError(f"edit() got the same argument by two names: {', '.join(named)}")
        return edit(self, *arguments, **translated)

    return cast(Method, renamed)


def check_audio(generation: Generation, max_model_len: int | None, path: str) -> None:
    """Raises `InvalidInput` if the tokens of a recording alone fill the context. Ignores unreadable files."""
    import soundfile

    context_tokens = max_model_len or generation.context_tokens
    longest_s = (context_tokens - _TEXT_TOKENS) / _AUDIO_TOKENS_PER_S
    try:
        audio_s = soundfile.info(path).duration
    except (RuntimeError, OSError, TypeError):
        return
    if audio_s > longest_s:
        more = generation is VLLM and context_tokens < generation.context_tokens
        raise InvalidInput(
            f"The recording has {audio_s:.0f} s, and the language model takes {longest_s:.0f} s at most (a context of "
            f"{context_tokens:,} tokens): shorten it{' or raise --max-model-len' if more else ''}",
            f"录音长 {audio_s:.0f} 秒，而语言模型最多接受 {longest_s:.0f} 秒（上下文为 {context_tokens:,} 个 token）："
            f"请剪短{'，或调大 --max-model-len' if more else ''}",
        )


def _other(generation: Generation) -> Generation:
    return VLLM if generation is TRANSFORMERS else TRANSFORMERS


def _signatures(source: bytes) -> tuple[frozenset[str], tuple[str, ...]]:
    """Returns the arguments of ``StepAudioTTS`` and of its ``edit``, without ``self``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "StepAudioTTS":
            methods = {each.name: each.args for each in node.body if isinstance(each, ast.FunctionDef)}
            names = {
                name: tuple(argument.arg for argument in [*methods[name].args, *methods[name].kwonlyargs][1:])
                for name in ("__init__", "edit")
                if name in methods
            }
            return frozenset(names.get("__init__", ())), names.get("edit", ())
    raise ValueError("no class StepAudioTTS")
