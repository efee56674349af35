"""Modules that others import: torch and numpy take seconds, and a thread may be importing them right now."""

from __future__ import annotations

import sys
from typing import Any


def imported(name: str) -> Any:
    """Returns a module whose import is complete; None if there is none. Never waits."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) is True else module
