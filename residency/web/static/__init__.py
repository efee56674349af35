"""Files that browsers load: scripts, a style sheet, and sample voices."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    """Returns the content of a script or style sheet."""
    return (FOLDER / name).read_text(encoding="utf-8")


def calling(name: str, call: str) -> str:
    """Returns a JavaScript function for ``js=`` of an event: it makes a call of a function in the script.

    ``call`` may contain ``...values``, the values of the event's inputs.
    """
    return f"(...values) => {{\n{text(name)}\nreturn {call};\n}}"
