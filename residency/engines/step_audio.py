"""The real engine: an unmodified Step-Audio-EditX checkout and its weights.

Its modules (``tts``, ``tokenizer``, ``config``, ``utils`` ...) are imported here and nowhere else, since their
names are everybody's names. Not yet run with real weights by this project: see GPU_MANAGEMENT.md.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contracts import Engine
from ..errors import EngineUnavailable

_REPOSITORY = "https://github.com/stepfun-ai/Step-Audio-EditX"


def find_checkout(root: str | None = None) -> Path | None:
    """The Step-Audio-EditX checkout: ``root``, ``STEP_AUDIO_ROOT``, the current folder or a sibling of it.

    A root that was named and is no checkout is `EngineUnavailable`, not passed over.
    """
    named = root or os.environ.get("STEP_AUDIO_ROOT")
    if named:
        if not _is_checkout(Path(named)):
            raise EngineUnavailable(
                f"{named} is no Step-Audio-EditX checkout (tts.py or stepvocoder/ is missing): git clone {_REPOSITORY}",
                f"{named} 不是 Step-Audio-EditX 代码目录（缺少 tts.py 与 stepvocoder/）：请 git clone {_REPOSITORY}",
            )
        return Path(named).resolve()
    here = Path.cwd()
    return next((place for place in (here, here.parent / "Step-Audio-EditX") if _is_checkout(place)), None)


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

    `EngineUnavailable` if the checkout or something that it needs is missing.
    """
    modules = _Modules(root)
    import torch

    source = modules.model_source(model_source)
    tokenizer_arguments = {"funasr_model_id": tokenizer_model_id} if tokenizer_model_id else {}
    tokenizer = modules.tokenizer.StepAudioTokenizer(
        os.path.join(model_path, "Step-Audio-Tokenizer"), model_source=source, **tokenizer_arguments
    )
    folder = "Step-Audio-EditX-AWQ-4bit" if quantization == "awq-4bit" else "Step-Audio-EditX"
    engine: Engine = modules.tts.StepAudioTTS(
        os.path.join(model_path, folder),
        tokenizer,
        model_source=source,
        tts_model_id=tts_model_id,
        quantization_config=quantization,
        torch_dtype=getattr(torch, torch_dtype),
        device_map=device_map,
    )
    return engine


def build_tts(model_path: str, make_tokenizer: Callable[[], Any], **arguments: Any) -> Engine:
    """StepAudioTTS as a program builds it itself; arguments that are None are left to its own defaults.

    ``make_tokenizer`` is called once the checkout's modules can be imported.
    """
    modules = _Modules(None)
    given = {name: value for name, value in arguments.items() if value is not None}
    engine: Engine = modules.tts.StepAudioTTS(model_path, make_tokenizer(), **given)
    return engine


class _Modules:
    """The checkout's modules, imported on first use."""

    def __init__(self, root: str | None) -> None:
        checkout = find_checkout(root)
        if checkout is not None and str(checkout) not in sys.path:
            # Last, so that nothing of ours or of a library is taken from there by accident.
            sys.path.append(str(checkout))
        try:
            self.tts = importlib.import_module("tts")
            self.tokenizer = importlib.import_module("tokenizer")
            self.model_loader = importlib.import_module("model_loader")
        except ModuleNotFoundError as error:
            if checkout is None:
                raise EngineUnavailable(
                    f"No Step-Audio-EditX checkout found: git clone {_REPOSITORY} and pass --step-audio-root DIR",
                    f"未找到 Step-Audio-EditX 代码：请 git clone {_REPOSITORY} 并指定 --step-audio-root DIR",
                ) from error
            raise EngineUnavailable(
                f"Step-Audio-EditX needs the Python module {error.name!r}: pip install -r {checkout}/requirements.txt",
                f"Step-Audio-EditX 缺少 Python 模块 {error.name!r}：请 pip install -r {checkout}/requirements.txt",
            ) from error

    def model_source(self, name: str) -> Any:
        return self.model_loader.ModelSource(name)


def _is_checkout(folder: Path) -> bool:
    return (folder / "tts.py").is_file() and (folder / "stepvocoder").is_dir()
