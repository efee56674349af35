"""Mutation testing of the manager: finds small code changes that no test detects.

Run by ``scripts/mutate``; needs Python 3.11 or newer. Works in ``.mutation/``, a copy of the tree, and resumes: killed
mutants of unchanged functions stay killed, survivors are tested again. Arguments are names of mutants
(``residency.scheduling.planner.*``), by default all; ``--report`` tests none. ``[tool.mutmut]`` in ``pyproject.toml``
selects files and tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
COPY = ROOT / ".mutation"
SURVIVED, NOT_TRIED, TIMEOUT, KILLED = "survived", "not tried", "timeout", "killed"

#: mutmut skips decorated functions; in the copy, a property calls a plain method.
_PROPERTY = re.compile(r"^( +)@property\n\1def (\w+)\(self\)( -> [^\n]+:\n(?:(?: *\n)*\1 +[^\n]*\n)+)", re.MULTILINE)


def copy_tree(files: list[str]) -> None:
    """Updates the copy; unchanged files keep their modification time."""
    tracked = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    names = {name for name in tracked.split("\0") if name and (ROOT / name).exists()}
    for old in (path for path in COPY.rglob("*.py") if "mutants" not in path.parts):
        if str(old.relative_to(COPY)) not in names:
            old.unlink()
    for name in names:
        content = (ROOT / name).read_bytes()
        if name in files:
            content = _PROPERTY.sub(
                r"\1def read_\2(self)\3\1\2 = property(lambda self: self.read_\2())\n\n", content.decode()
            ).encode()
        copied = COPY / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        if not copied.exists() or copied.read_bytes() != content:
            copied.write_bytes(content)
            (COPY / "mutants" / name).unlink(missing_ok=True)


def verdicts(file: str) -> dict[str, str]:
    """Returns the verdict on each mutant of a file."""
    meta = COPY / "mutants" / f"{file}.meta"
    codes = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
    words = {0: SURVIVED, None: NOT_TRIED, 5: SURVIVED, 33: SURVIVED, 24: TIMEOUT, -24: TIMEOUT, 36: TIMEOUT}
    return {mutant: words.get(code, KILLED) for mutant, code in codes.items()}


def difference(mutant: str) -> str:
    """Returns the change of a mutant in one line."""
    shown = subprocess.run(["mutmut", "show", mutant], cwd=COPY, text=True, capture_output=True).stdout
    lines = [line for line in shown.splitlines() if line[:1] in "-+" and not line.startswith(("---", "+++"))]
    return "  ".join(f"{line[0]} {' '.join(line[1:].split())}" for line in lines)


def report(files: list[str]) -> None:
    row = "{:26}{:>9}{:>9}{:>10}{:>9}{:>11}{:>9}".format
    print(row("file", "mutants", "killed", "survived", "timeout", "not tried", "score"))
    total = Counter[str]()
    by_file = {file: verdicts(file) for file in files}
    for file, found in by_file.items():
        counts = Counter(found.values())
        total += counts
        print(row(file, *_columns(counts)))
    print(row("all", *_columns(total)))
    for found in by_file.values():
        for mutant, verdict in found.items():
            if verdict == SURVIVED:
                print(f"\n{mutant.replace('ǁ', '.')}\n    {difference(mutant)}")


def _columns(counts: Counter[str]) -> tuple[object, ...]:
    tried = counts.total() - counts[NOT_TRIED]
    score = f"{100 * (counts[KILLED] + counts[TIMEOUT]) / tried:.1f} %" if tried else "-"
    return counts.total(), counts[KILLED], counts[SURVIVED], counts[TIMEOUT], counts[NOT_TRIED], score


def main(arguments: list[str]) -> int:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]["only_mutate"]
    if arguments != ["--report"]:
        COPY.mkdir(exist_ok=True)
        copy_tree(files)
        environment = os.environ | {"HYPOTHESIS_PROFILE": "mutation", "PYTHONDONTWRITEBYTECODE": ""}
        survivors = [mutant for file in files for mutant, verdict in verdicts(file).items() if verdict == SURVIVED]
        command = ["mutmut", "run", "--max-children", str(3 * (os.cpu_count() or 1))]  # some only wait
        subprocess.run([*command, *arguments], cwd=COPY, env=environment)
        if survivors and not arguments:
            subprocess.run([*command, *survivors], cwd=COPY, env=environment)
    report(files)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
