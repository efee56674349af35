"""The map of rooms in CONTRIBUTING.md tells what each folder may import; this holds the code to it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORY = ["app", "tts_gpu_managed", "gpu_manager"]  # each may import those after it, never before
#: Names that a Step-Audio-EditX checkout owns.
FOREIGN = {"config", "utils", "tts", "tokenizer", "model_loader", "whisper_wrapper", "quantization", "stepvocoder",
           "funasr_detach"}  # fmt: skip
MODULES = sorted((ROOT / "residency").rglob("*.py"))


@cache
def rooms() -> dict[str, set[str]]:
    """The map: a folder, as a dotted name, and those that it may import. Its own files it may import anyway."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(residency/[a-z/]*)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {
        _room_name(room): {_room_name(name) for name in re.findall(r"`([a-z/]+)`", allowed)} for room, allowed in rows
    }


def _room_name(folder: str) -> str:
    return folder.removeprefix("residency/").strip("/").replace("/", ".")


def room_of(module: str) -> str:
    """The innermost room of a module of the package; the empty name is that of the files directly in it."""
    parts = module.split(".")[1:]
    while parts and ".".join(parts) not in rooms():
        parts.pop()
    return ".".join(parts)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of all modules, and of what is imported from them, at any depth, also for types only."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports."""
    known = {name_of(each) for each in MODULES}
    found = {name if name in known else name.rpartition(".")[0] for name in imports(path)}
    return frozenset(found & known - {name_of(path), "residency"})


def test_every_folder_is_on_the_map() -> None:
    folders = {_room_name(str(path.parent.relative_to(ROOT))) for path in MODULES}
    assert {folder for folder in folders if room_of(f"residency.{folder}.x") == ""} == {"residency"}
    assert set(rooms()) >= {"", "observability", "devices", "memory", "engines", "scheduling", "launch", "web"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_what_the_map_allows(path: Path) -> None:
    room = room_of(name_of(path) + (".x" if path.name == "__init__.py" else ""))
    strangers = {name for name in imported_modules(path) if room_of(f"{name}.x") not in {room, "", *rooms()[room]}}
    assert not strangers, f"{room or 'residency'} may not import {strangers}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even for types. A package stands for its ``__init__.py``, which collects what is in it."""
    TopologicalSorter({name_of(path): imported_modules(path) for path in MODULES}).prepare()


def test_the_package_knows_nothing_of_the_root() -> None:
    for path in MODULES:
        assert not {name.split(".")[0] for name in imports(path)} & set(STORY), path


def test_root_modules_import_downwards() -> None:
    for index, name in enumerate(STORY):
        above = set(STORY[:index])
        assert not {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")} & above, name


def test_no_module_takes_a_name_of_the_checkout() -> None:
    assert not {path.stem for path in ROOT.glob("*.py")} & FOREIGN
    assert not {path.name for path in ROOT.iterdir() if path.is_dir()} & FOREIGN


def test_files_and_functions_are_short() -> None:
    """As CONTRIBUTING says: at most 350 lines in a file, and 60 in a function."""
    programs = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.name.startswith(".")]
    sources = [path for path in (ROOT / "residency").rglob("*") if path.suffix in {".py", ".js", ".css"}]
    long = {}
    for path in [*sources, *programs, *ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        if (lines := text.count("\n")) > 350:
            long[name] = lines
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    if (lines := node.end_lineno - node.lineno + 1) > 60:
                        long[f"{name}: {node.name}"] = lines
    assert not long, "split these"


def test_the_app_imports_nothing_of_ray_serve() -> None:
    script = (
        "import sys, app\n"
        "app.choose_engine(app.parse([]))\n"
        "from residency.web import page\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'ray' or name == 'residency.cluster']\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_importing_the_library_brings_no_torch_no_gpu_and_no_logging_setup() -> None:
    script = (
        "import logging, sys, importlib, pkgutil, residency\n"
        "import gpu_manager, tts_gpu_managed\n"
        "for module in pkgutil.walk_packages(residency.__path__, 'residency.'):\n"
        "    if '.web' not in module.name and '.cluster' not in module.name: importlib.import_module(module.name)\n"
        "assert not {'torch', 'transformers', 'gradio', 'onnxruntime'} & set(sys.modules), sorted(sys.modules)\n"
        "assert not logging.getLogger().handlers\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
