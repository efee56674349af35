"""Measures offload and restore of weights, relative to the machine's limits, and their memory.

    python benchmarks/restore.py --size 1GB
    python benchmarks/restore.py --size 16GB --device cuda --json restore.json

Two tables, measured in one run: moves between device and host, and reads of files into ready weights (with a warm page
cache), with the limit (raw link and raw read) and other libraries. The last table lists the project's goals. Every
repetition is a separate process; all first repetitions precede all second ones. Prints medians (of memory: maxima). A
GB is 2**30 bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _disk, _files, _moves
from benchmarks._children import Job, Unavailable, in_child
from benchmarks._goals import print_goals
from benchmarks._material import Plan
from benchmarks._tables import Line, lines_of, print_table
from residency.launch.values import size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=size_bytes, default="1GB", help="of the weights, and of each of three files (1GB; up to 40GB)")
    add("--tensors", type=int, default=300, help="how many tensors they are (300), for the moves")
    add("--small-tensors", type=int, default=50_000, help="how many tensors of 1 KB (50000)")
    add("--device", choices=["auto", "cpu", "cuda", "simulated"], default="auto", help="auto: cuda if there is one")
    add("--repeat", type=int, default=5, help="how often everything is measured (5)")
    add("--folder", type=Path, help="where the files are written, and removed again (the system's temporary folder)")
    add("--json", type=Path, metavar="FILE", help="write all values there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # deletes the files
    with tempfile.TemporaryDirectory(prefix="restore-", dir=options.folder) as folder:
        plan = Plan(options.size, max(1, options.tensors), max(1, options.small_tensors), options.device, folder)
        try:
            about = in_child(_moves.describe, plan)
        except Unavailable as error:
            parser.error(str(error))
        plan = replace(plan, device=about["device"])
        result = run(plan, about, max(1, options.repeat))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def run(plan: Plan, about: dict[str, str], repeat: int) -> dict[str, object]:
    header = (
        f"{datetime.date.today()}, {about['name']}, {processor()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {about['torch']}, load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{header}\n{plan.size:,} bytes, {repeat} repetitions, {_disk.read_threads()} reading threads", flush=True)
    move_jobs, disk_jobs = _moves.jobs(plan), _disk.jobs(plan)
    moves, disk = lines_of(move_jobs), {_files.WRITTEN: Line(_files.WRITTEN), **lines_of(disk_jobs)}
    measure(plan, move_jobs, moves, repeat)
    print_table(f"moves between device and host ({plan.device})", moves)
    for preparation in _files.PREPARATIONS:
        try:
            disk[_files.WRITTEN].rows += in_child(preparation, plan) or []
        except Unavailable as error:
            disk[_files.WRITTEN].reason = disk[_files.WRITTEN].reason or str(error)
    measure(plan, disk_jobs, disk, repeat)
    print_table("from disk, page cache warm", disk)
    goals = print_goals(plan, {**moves, **disk})
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}")
    tables = {"moves": moves, "disk": disk}
    return {
        "header": header,
        "plan": {key: value for key, value in asdict(plan).items() if key != "folder"},
        **{name: [line.as_json(lines) for line in lines.values()] for name, lines in tables.items()},
        "must_reach": goals,
    }


def measure(plan: Plan, jobs: Sequence[Job], lines: dict[str, Line], repeat: int) -> None:
    """Runs all jobs ``repeat`` times; skips unavailable ones after their first failure."""
    jobs = list(jobs)
    for _ in range(repeat):
        for job in tuple(jobs):
            try:
                for row in in_child(job.work, plan):
                    lines[row.name].rows.append(row)
            except Unavailable as error:
                jobs.remove(job)
                for name in job.names:
                    lines[name].reason = str(error)
    for line in lines.values():
        if not line.rows and line.reason is None:
            line.reason = "nothing moves: device and host are one memory"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
