"""Settings of torch for a whole process, on which results depend: a worker uses the manager's."""

from __future__ import annotations

import importlib
import sys
from typing import Any


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
