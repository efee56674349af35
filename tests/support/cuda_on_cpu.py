"""Lets code that says ``tensor.to("cuda")`` run where there is none: the CPU stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def pretend_cuda() -> None:
    """From now on, in this process, in all threads, tensors go to the CPU. Does nothing where CUDA is real.

    Functions that make tensors are left alone: replaced ones do not get on with the meta tensors of transformers.
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
