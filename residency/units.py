"""Sizes as text. A GB is 2**30 bytes: on the page, in the log, in tables and in every setting."""

from __future__ import annotations

UNITS_BYTES = {"TB": 1 << 40, "GB": 1 << 30, "MB": 1 << 20, "KB": 1 << 10}
"""Binary units, as for graphics cards: one of 48 GB has 48 * 2**30 bytes."""


def readable_bytes(nbytes: int | None) -> str:
    """Formats as ``1.25 GB``; ``?`` if unknown."""
    if nbytes is None:
        return "?"
    for unit, size in UNITS_BYTES.items():
        if nbytes >= size:
            number = nbytes / size
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{nbytes} B"


def readable_rate(bytes_per_s: float) -> str:
    """Formats as ``24.5 GB/s``; always in GB, so that moves are comparable."""
    rate = bytes_per_s / UNITS_BYTES["GB"]
    if 0 < rate < 0.01:
        return "< 0.01 GB/s"
    return f"{rate:.2g} GB/s" if rate < 10 else f"{rate:.0f} GB/s"
