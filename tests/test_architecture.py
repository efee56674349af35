"""Imports tell the architecture; this holds them to it. Every arrow points one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOT_MODULES = ["app", "tts_gpu_managed", "gpu_manager"]  # each may import those after it, never before

#: Modules of residency/ in layers: one may import those of the layers before its own.
PURE_LAYERS = [["addresses", "callers", "latches", "locks", "sentences", "units"], ["errors"],
               ["contracts", "clock", "diagnosis", "randomness", "progress", "events", "lifetime", "parts", "signals",
                "cancellation"],
               ["adaptive", "extras", "handout", "history", "outside"], ["states", "policies", "certificates"],
               ["settings", "planning", "leasing", "lost", "moving", "monitor"], ["status", "reports", "cli"],
               ["dispatch"], ["deadlocks", "steering"], ["admission"]]  # fmt: skip
CONCRETE = ["devices", "residents", "probes", "engines", "web"]
#: What a concrete folder may import besides itself. devices may look through probes: NVML names the card.
SHARED = {"addresses", "cancellation", "contracts", "states", "errors", "extras", "diagnosis", "locks", "outside",
          "progress", "sentences", "units"}  # fmt: skip
ALSO = {"devices": {"probes"}}
#: Names that a Step-Audio-EditX checkout owns.
FOREIGN = {"config", "utils", "tts", "tokenizer", "model_loader", "whisper_wrapper", "quantization", "stepvocoder",
           "funasr_detach"}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports at any depth, those for type checking left out."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def within_package(path: Path) -> set[str]:
    """The parts of residency/ (modules or folders) that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("residency.")}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / "residency" / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", CONCRETE)
def test_concrete_parts_know_only_the_contracts(folder: str) -> None:
    assert files(folder)
    for path in files(folder):
        strangers = within_package(path) - SHARED - {folder} - ALSO.get(folder, set())
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_the_words_of_the_house_are_layered() -> None:
    below: set[str] = set()
    for layer in PURE_LAYERS:
        for name in layer:
            strangers = within_package(ROOT / "residency" / f"{name}.py") - below
            assert not strangers, f"residency/{name}.py imports {strangers}"
        below |= set(layer)
    modules = {path.stem for path in (ROOT / "residency").glob("*.py")} - {"__init__"}
    assert modules == below, "a new module wants a layer"


def test_the_package_knows_nothing_of_the_root() -> None:
    for path in (ROOT / "residency").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & set(ROOT_MODULES), path


def test_root_modules_import_downwards() -> None:
    for index, name in enumerate(ROOT_MODULES):
        above = set(ROOT_MODULES[:index])
        assert not {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")} & above, name


def test_no_module_takes_a_name_of_the_checkout() -> None:
    assert not {path.stem for path in ROOT.glob("*.py")} & FOREIGN
    assert not {path.name for path in ROOT.iterdir() if path.is_dir()} & FOREIGN


def test_importing_the_library_brings_no_torch_no_gpu_and_no_logging_setup() -> None:
    script = (
        "import logging, sys, importlib, pkgutil, residency\n"
        "import gpu_manager, tts_gpu_managed\n"
        "for module in pkgutil.walk_packages(residency.__path__, 'residency.'):\n"
        "    if '.web' not in module.name: importlib.import_module(module.name)\n"
        "assert not {'torch', 'transformers', 'gradio', 'onnxruntime'} & set(sys.modules), sorted(sys.modules)\n"
        "assert not logging.getLogger().handlers\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
