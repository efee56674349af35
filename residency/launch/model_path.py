"""Checks the folder of the weights, or the id of a model on a hub, before a start."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InvalidInput

_HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


def check_model_path(model_path: str | None, source: str) -> None:
    """Raises `InvalidInput` if local weights are missing; accepts a possible hub id unless the source is local."""
    if model_path is None:
        raise InvalidInput(
            "--engine step-audio needs --model-path, the folder with Step-Audio-Tokenizer and Step-Audio-EditX (for a "
            "checkout of 2026: the folder Step-Audio-EditX itself); leave --engine out to use the built-in engine",
            "--engine step-audio 需要 --model-path（包含 Step-Audio-Tokenizer 和 Step-Audio-EditX 的目录；"
            "2026 版代码则为 Step-Audio-EditX 目录本身）；不写 --engine 则使用内置引擎",
        )
    if source in ("huggingface", "modelscope") and Path(model_path).is_absolute():
        raise InvalidInput(
            f"--model-path {model_path} is a folder, and --model-source {source} takes the id of a hub: leave "
            f"--model-source out, or give an id (stepfun-ai, or stepfun-ai/Step-Audio-EditX for a checkout of 2026)",
            f"--model-path {model_path} 是目录，而 --model-source {source} 需要模型仓库 ID：请去掉 --model-source，"
            f"或给出 ID（stepfun-ai；2026 版代码则为 stepfun-ai/Step-Audio-EditX）",
        )
    if source in ("auto", "local") and not may_be_hub_id(model_path, source) and not _is_readable(model_path):
        raise InvalidInput(
            f"--model-path {model_path} is not a readable folder. Download stepfun-ai/Step-Audio-Tokenizer and "
            f"stepfun-ai/Step-Audio-EditX into it (hf download; for a checkout of 2026, name the folder "
            f"Step-Audio-EditX itself), give --model-source huggingface or "
            f"modelscope if it is the id of a hub, or leave --model-path out to use the built-in engine",
            f"--model-path {model_path} 不是可读的目录。请把 stepfun-ai/Step-Audio-Tokenizer 和 "
            f"stepfun-ai/Step-Audio-EditX 下载到其中（2026 版代码请指定 Step-Audio-EditX 目录本身）；"
            f"如果它是模型仓库的 ID，请加上 --model-source huggingface 或 modelscope；不写 --model-path 则使用内置引擎",
        )


def may_be_hub_id(model_path: str, source: str) -> bool:
    """Returns whether a model path that is no folder may be the id of a hub: an owner, or ``owner/model``."""
    return source == "auto" and not os.path.exists(model_path) and bool(re.fullmatch(_HUB_ID, model_path))


def _is_readable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)
