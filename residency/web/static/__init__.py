"""Files that browsers load: scripts, a style sheet, and the recordings of the sample voices."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    """The content of a script or style sheet."""
    return (FOLDER / name).read_text(encoding="utf-8")
