"""Lets code that says ``"cuda"`` run where there is none: the CPU stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "randn", "rand", "linspace", "randint")


def pretend_cuda() -> None:
    """From now on, in this process, in all threads, the device ``cuda`` is the CPU. Does nothing where CUDA is real."""
    if torch.cuda.is_available():
        return
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *_, **__: self
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(*arguments: Any, **keywords: Any) -> Any:
        return function(*map(_cpu, arguments), **{name: _cpu(value) for name, value in keywords.items()})

    return replaced


def _cpu(value: Any) -> Any:
    named = isinstance(value, str) and value.split(":")[0] == "cuda"
    return torch.device("cpu") if named or (isinstance(value, torch.device) and value.type == "cuda") else value
