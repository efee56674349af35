"""Runs code with ``tensor.to("cuda")`` on machines without CUDA, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def pretend_cuda() -> None:
    """Redirects tensors from CUDA to the CPU in all threads of this process, permanently. No effect with real CUDA.

    Does not replace functions that create tensors: that breaks the meta tensors of transformers.
    """
    if torch.cuda.is_available():
        return
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *_, **__: self


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(*arguments: Any, **keywords: Any) -> Any:
        if isinstance(keywords.get("device"), int):
            keywords["device"] = "cuda"
        return function(*map(_cpu, arguments), **{name: _cpu(value) for name, value in keywords.items()})

    return replaced


def _cpu(value: Any) -> Any:
    named = isinstance(value, str) and value.split(":")[0] == "cuda"
    return torch.device("cpu") if named or (isinstance(value, torch.device) and value.type == "cuda") else value
