"""Files that browsers load: scripts, a style sheet, and sample voices."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    """Returns the content of a script or style sheet."""
    return (FOLDER / name).read_text(encoding="utf-8")
