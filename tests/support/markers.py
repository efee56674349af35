"""Marks tests: ``app`` and ``browser`` by the names used in the module and its fixtures, ``slow`` also by path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import app_process
import fork_server
import miniature_checkout
import script_project

ROOT = Path(__file__).resolve().parents[2]

#: Test modules with one of these objects start whole programs.
STARTERS = (
    app_process.ForkedApp, app_process.RunningApp, app_process.run_app, fork_server.ForkedProcess, miniature_checkout,
    miniature_checkout.run, script_project.Project,
)  # fmt: skip

#: Slow for other reasons: computing engines, other processes, many random cases.
SLOW = (
    "test_gpu_management.py", "tests/app", "tests/benchmarks", "tests/browser", "tests/engines/test_asr.py",
    "tests/engines/test_builtin.py", "tests/engines/test_edits.py", "tests/engines/test_voice.py", "tests/gpu",
    "tests/memory/test_every_use.py", "tests/memory/test_snapshot_disk.py", "tests/memory/test_weights.py",
    "tests/neighbors/test_discovery.py", "tests/neighbors/test_real_servers.py",
    "tests/scenarios", "tests/scheduling/test_fault_injection.py", "tests/scheduling/test_interleavings.py",
    "tests/scheduling/test_interrupts.py", "tests/scheduling/test_state_machine.py", "tests/scripts",
    "tests/test_documents.py", "tests/test_examples.py", "tests/upstream", "tests/web/test_subpath.py", "tests/workers",
)  # fmt: skip


def is_slow(path: Path) -> bool:
    return any(path.is_relative_to(ROOT / place) for place in SLOW)


def marks_of(path: Path, module: ModuleType, fixtures: Iterable[str]) -> set[str]:
    """Returns the marks of a test in ``module`` at ``path`` that uses ``fixtures``, also indirectly."""
    marks = set()
    if "browser" in fixtures:
        marks |= {"browser", "app", "slow"}
    if any(value is starter for value in vars(module).values() for starter in STARTERS):
        marks |= {"app", "slow"}
    if is_slow(path):
        marks.add("slow")
    return marks
