"""The real engine: an unmodified Step-Audio-EditX checkout and its weights. See `checkout` for how it is imported.

Not yet run with its real weights by this project: see GPU_MANAGEMENT.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contracts import Engine
from ..errors import EngineUnavailable
from . import requirements
from .asr import DEFAULT_MODEL, unavailable
from .checkout import find_checkout, import_from, not_found, unimportable

_TOKENIZER_FILES = ("linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx")
_VOCODER = "CosyVoice-300M-25Hz"
_VOCODER_FILES = ("cosyvoice.yaml", "flow.pt", "hift.pt", "campplus.onnx")
_POINTER = b"version https://git-lfs"


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
            os.path.join(model_path, _folder(quantization)),
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
    """StepAudioTTS as a program builds it itself; arguments that are None are left to its own defaults.

    ``make_tokenizer`` is called once the checkout's modules can be imported. Errors as for `build`.
    """
    checkout = _checkout(None)
    given = {name: value for name, value in arguments.items() if value is not None}
    (tts,) = import_from(checkout, "tts")

    def engine() -> Engine:
        built: Engine = tts.StepAudioTTS(model_path, make_tokenizer(), **given)
        return built

    return _explained(engine, checkout, lambda: _check_llm(given.get("tts_model_id", model_path)))


def build_recognizer(root: str | None = None) -> Callable[[str], str]:
    """The checkout's own speech recognition: a function from an audio file to what is said in it."""
    checkout = _checkout(root)
    (module,) = import_from(checkout, "whisper_wrapper")
    try:
        recognizer: Callable[[str], str] = module.WhisperWrapper()
    except Exception as error:
        raise unavailable(DEFAULT_MODEL, error) from error
    return recognizer


def shortcomings(model_path: str, root: str | None, **weights: Any) -> list[str]:
    """What is not as it should be, in sentences, before anything is loaded: it may work all the same.

    `EngineUnavailable` without a checkout.
    """
    checkout = _checkout(root)
    found = []
    try:
        check_weights(model_path, **weights)
    except EngineUnavailable as error:
        found.append(str(error))
    if others := requirements.unmet(checkout / "requirements.txt"):
        found.append(
            f"Not as Step-Audio-EditX asks for / 与 Step-Audio-EditX 的要求不符: {'; '.join(map(str, others))}. "
            f"If it does not load / 若无法加载: pip install -r {checkout}/requirements.txt"
        )
    return found


def check_weights(
    model_path: str,
    *,
    model_source: str = "auto",
    tokenizer_model_id: str | None = None,
    tts_model_id: str | None = None,
    quantization: str | None = None,
) -> None:
    """`EngineUnavailable` if weights that should be on this machine are not there, or only as git-lfs pointers."""
    folder = Path(model_path)
    if model_source not in ("auto", "local") or not (folder.is_absolute() or folder.exists()):
        return  # the id of a hub
    tokenizer = folder / "Step-Audio-Tokenizer"
    _check_folder(tokenizer, (*_TOKENIZER_FILES, *([tokenizer_model_id] if tokenizer_model_id else [])))
    _check_llm(str(folder / _folder(quantization)) if tts_model_id is None else tts_model_id)


def _checkout(root: str | None) -> Path:
    checkout = find_checkout(root)
    if checkout is None:
        raise not_found()
    return checkout


def _explained(make: Callable[[], Engine], checkout: Path, check: Callable[[], None]) -> Engine:
    """What ``make`` builds. If it fails for want of something, the error says what, and what to do."""
    try:
        return make()
    except ImportError as error:
        raise unimportable(checkout, error) from error
    except Exception as error:
        try:
            # Only now: the checkout knows best what it needs.
            check()
        except EngineUnavailable as reason:
            raise reason from error
        if _no_cuda(error):
            raise EngineUnavailable(
                f"Step-Audio-EditX computes on an NVIDIA GPU, and torch finds none here ({error}): check nvidia-smi "
                f"and the driver, or use the built-in engine (no --model-path)",
                f"Step-Audio-EditX 需要 NVIDIA GPU，而 torch 在此未找到（{error}）：请检查 nvidia-smi 与驱动，"
                f"或使用内置引擎（不写 --model-path）",
            ) from error
        raise


def _no_cuda(error: Exception) -> bool:
    import torch

    return not torch.cuda.is_available() and "cuda" in str(error).lower()


def _check_llm(model: str) -> None:
    folder = Path(model)
    if folder.is_absolute() or folder.exists():
        _check_folder(folder, ("config.json", *(f"{_VOCODER}/{name}" for name in _VOCODER_FILES)))


def _folder(quantization: str | None) -> str:
    return "Step-Audio-EditX-AWQ-4bit" if quantization == "awq-4bit" else "Step-Audio-EditX"


def _check_folder(folder: Path, wanted: tuple[str, ...]) -> None:
    download = f"hf download stepfun-ai/{folder.name} --local-dir {folder}"
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        what = ", ".join(missing) if folder.is_dir() else "the whole folder / 整个目录"
        raise EngineUnavailable(
            f"The weights in {folder} are missing or incomplete ({what}): {download}",
            f"{folder} 中的权重缺失或不完整（{what}）：请 {download}",
        )
    files = [folder / name for name in wanted] + list(folder.glob("*.safetensors"))
    pointers = [file.name for file in files if file.is_file() and _is_pointer(file)]
    if pointers:
        raise EngineUnavailable(
            f"The weights in {folder} were cloned without git-lfs ({', '.join(pointers)} hold only a reference): "
            f"git lfs install && git -C {folder} lfs pull",
            f"{folder} 中的权重是在没有 git-lfs 的情况下克隆的（{', '.join(pointers)} 只是引用）："
            f"请 git lfs install && git -C {folder} lfs pull",
        )


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER
