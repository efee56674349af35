"""Runs the benchmarks of startup, overhead, panel and soak alternately in two checkouts; prints medians and ratios.

    python benchmarks/compare_trees.py OLD NEW [--rounds 3] [--only startup panel]

Both checkouts run with this Python. ``noise`` is the largest over the smallest value of all rounds of OLD, at least
1.05; a ratio (new/old) is within noise if it is not above that. Exits with 1 if one is.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

# Command, and the rows of its tables: name, and the position of the number to compare.
BENCHMARKS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "startup": (
        ("startup.py", "--repeat", "1"),
        {"app.py --help": 0, "page, built-in engine": 0, "app.py, until /readyz": 0, "start script, until /readyz": 0},
    ),
    "overhead": (
        ("overhead.py", "--leases", "10000", "--waiting", "1", "16", "--cold-share", "0.2"),
        {
            "lease, keep_warm=-1": 0, "lease, keep_warm=60": 0, "lease, keep_warm='auto'": 0, "lease inside a lease": 0,
            "nothing happens": 0, "16 waiting": 0, "a model loads": 0, "20,000 parameters in a list": 1,
            "200,000 small Python objects": 1,
        },
    ),
    "panel": (
        ("panel.py", "--seconds", "10", "--turns", "1"),
        {"no page": 0, "one page": 0, "five pages": 0, "one page, hidden": 0},
    ),
    "soak": (
        ("soak.py", "--requests", "2000"),
        {"for the model": 1, "status()": 1, "after 1,000 requests": 0},
    ),
}  # fmt: skip
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, {options.rounds} rounds", flush=True)
    print(f"{'':42}{'old':>10}{'new':>10}{'new/old':>9}{'noise':>9}")
    good = True
    for benchmark in options.only:
        command, rows = BENCHMARKS[benchmark]
        values: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
        for number in range(options.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                found = measured((options.old, options.new)[side], command, rows)
                for name, value in found.items():
                    values[name][side].append(value)
        for name, (old, new) in values.items():
            before, after = statistics.median(old), statistics.median(new)
            ratio, noise = (after / before, max(1.05, max(old) / min(old))) if min(old) > 0 else (1.0, 1.0)
            good &= ratio <= noise
            mark = "" if ratio <= noise else "  above noise"
            print(f"{benchmark:10}{name:32}{before:10.2f}{after:10.2f}{ratio:9.2f}{noise:9.2f}{mark}", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")
    return 0 if good else 1


def measured(tree: Path, command: tuple[str, ...], rows: dict[str, int]) -> dict[str, float]:
    """Runs a benchmark of a checkout; returns the numbers of the rows. A missed goal is no error."""
    path = ["benchmarks/" + command[0], *command[1:]]
    done = subprocess.run([sys.executable, *path], cwd=tree, capture_output=True, text=True, check=False)
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        name = re.split(r"\s{2,}", line.strip())[0]
        if name in rows and name not in found:
            numbers = _NUMBER.findall(line.strip()[len(name) :])
            found[name] = float(numbers[rows[name]].replace(",", ""))
    if missing := rows.keys() - found.keys():
        raise SystemExit(
            f"{tree}: {' '.join(path)} printed no {', '.join(missing)}\n{done.stdout}{done.stderr[-2000:]}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
