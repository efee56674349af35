"""Settings of torch on which results depend: a worker uses those of the manager's process, and a call its caller's."""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..modules import imported

if TYPE_CHECKING:
    import torch


def torch_settings() -> tuple[Any, ...] | None:
    """Returns the settings of this process; None if it has not imported torch."""
    if "torch" not in sys.modules:
        return None
    torch = importlib.import_module("torch")  # waits for an import in another thread
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), warn_only,
    )  # fmt: skip


def use(settings: tuple[Any, ...] | None) -> None:
    """Sets them in this process, where they differ."""
    if settings is None or settings == torch_settings():
        return
    torch = importlib.import_module("torch")
    threads, dtype, precision, deterministic, warn_only = settings
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@dataclass(frozen=True)
class CallSettings:
    """Those in which a call is made. ``autocast``: device types with their type of numbers."""

    gradients: bool
    inference: bool
    dtype: torch.dtype
    autocast: tuple[tuple[str, torch.dtype], ...]
    autocast_cache: bool

    @classmethod
    def here(cls) -> CallSettings | None:
        """Returns those of this thread; None if this process has not imported torch."""
        if (torch := imported("torch")) is None:
            return None
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        return cls(
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            tuple((kind, torch.get_autocast_dtype(kind)) for kind in on), torch.is_autocast_cache_enabled(),
        )  # fmt: skip

    def enter(self, stack: contextlib.ExitStack) -> None:
        """Uses them in this thread until ``stack`` is closed; the default type in the process, from now on."""
        torch = importlib.import_module("torch")
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if self.inference:
            stack.enter_context(torch.inference_mode())
        if torch.is_grad_enabled() != self.gradients:
            stack.enter_context(torch.set_grad_enabled(self.gradients))
        for kind, dtype in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self.autocast_cache))
