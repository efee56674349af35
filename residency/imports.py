"""Modules that other code may have imported."""

from __future__ import annotations

import sys
from typing import Any


def imported(name: str) -> Any:
    """Returns a module if its import has ended; None while another thread still imports it."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module
