"""Applies the edits from docs/en/library.md that add the manager to another app."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def edits() -> list[str]:
    """Returns the blocks of the section, each a diff without headers."""
    text = (ROOT / "docs/en/library.md").read_text(encoding="utf-8")
    section = text.split("## Seven edits to an existing app\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^   ```diff\n(.*?)^   ```", section, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def edited(program: str) -> str:
    """Returns the program after all edits; each must match exactly one place."""
    for edit in edits():
        lines = edit.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        places = [match.start() for match in re.finditer(f"^{re.escape(before)}", program, re.MULTILINE)]
        assert len(places) == 1, f"{len(places)} places for:\n{edit}"
        program = program[: places[0]] + after + program[places[0] + len(before) :]
    return program
