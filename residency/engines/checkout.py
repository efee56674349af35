"""Finds an unmodified Step-Audio-EditX checkout, imports its modules, and compares its requirements.

Its top-level modules have common names (``tts``, ``utils``, ``config`` ...). From the first load on, an import hook
resolves exactly these to the checkout. The checkout is last on ``sys.path``, so that it hides no other module.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from packaging.requirements import InvalidRequirement, Requirement

from ..errors import EngineUnavailable, ResidencyError, pip_install
from ..locks import renewed_in_children
from ..observability.error_classification import in_words
from ..sentences import Sentence
from .step_audio_facts import LANDMARKS, MODULES, REPOSITORY

_PROJECT = Path(__file__).resolve().parents[2]

_importing = renewed_in_children(threading.Lock())

#: Unmet requirements with the installed versions, None if the package is missing.
Unmet = dict[str, str | None]


def find_checkout(root: str | None = None) -> Path:
    """Finds the checkout: ``root``, the one imported by this process, ``STEP_AUDIO_ROOT``, or one nearby.

    Nearby: the current folder, the folder of this project, and ``Step-Audio-EditX`` beside either. Raises
    `EngineUnavailable` if there is none, or ``root`` or ``STEP_AUDIO_ROOT`` names a folder that is no checkout.
    """
    imported = _origin(sys.modules.get("tts"))
    used = imported.parent if imported and _is_checkout(imported.parent) else None
    named = root or (None if used else os.environ.get("STEP_AUDIO_ROOT"))
    here = Path.cwd()
    nearby = [here, _PROJECT, *(place.parent / "Step-Audio-EditX" for place in (here, _PROJECT))]
    for place in [Path(named).expanduser()] if named else [used] if used else nearby:
        if _is_checkout(place):
            return place.resolve()
    en, zh = (f" in {named}", f"{named} 中") if named else ("", "")
    raise EngineUnavailable(
        f"No Step-Audio-EditX checkout (with {' and '.join(LANDMARKS)}) found{en}: git clone {REPOSITORY} and give its "
        f"folder as --step-audio-root or STEP_AUDIO_ROOT",
        f"{zh}未找到 Step-Audio-EditX 代码（含 {' 和 '.join(LANDMARKS)}）：请 git clone {REPOSITORY}，"
        f"并用 --step-audio-root 或 STEP_AUDIO_ROOT 指定其目录",
    )


def import_from(checkout: Path, *names: str) -> list[ModuleType]:
    """Imports modules of the checkout. Raises `EngineUnavailable` with the missing requirements and the command."""
    with _importing:
        for name in MODULES:
            origin = _origin(sys.modules.get(name))
            if sys.modules.get(name) and not (origin and origin.is_relative_to(checkout)):
                if other := next(filter(_is_checkout, origin.parents if origin else ()), None):
                    raise EngineUnavailable(
                        f"This process has loaded the Step-Audio-EditX in {other}, and that in {checkout} has modules "
                        f"of the same names: start it in another process",
                        f"本进程已加载 {other} 中的 Step-Audio-EditX，而 {checkout} 中的模块与其同名："
                        f"请在另一个进程中启动后者",
                    )
                raise EngineUnavailable(
                    f"Step-Audio-EditX has a module {name!r}, and this program has imported another one of that name "
                    f"({origin or 'unknown file'}): rename that one, or start the engine in a program without it",
                    f"Step-Audio-EditX 有名为 {name!r} 的模块，而本程序已导入另一个同名模块"
                    f"（{origin or '来源不明'}）：请将其改名，或在没有该模块的程序中启动引擎",
                )
        _make_importable(checkout)
        importlib.invalidate_caches()  # for packages installed since the last attempt
        try:
            return [importlib.import_module(name) for name in names]
        except Exception as error:
            # Any exception: missing or unsuitable dependencies fail in many ways.
            raise unimportable(checkout, error) from error


def unimportable(checkout: Path, error: BaseException) -> EngineUnavailable:
    """Returns the error to show for a failed import, with the command that fixes it."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.split(".")[0] in MODULES:
        return EngineUnavailable(
            f"The Step-Audio-EditX checkout {checkout} is incomplete, {missing} is missing: git clone {REPOSITORY}",
            f"Step-Audio-EditX 代码目录 {checkout} 不完整，缺少 {missing}：请重新 git clone {REPOSITORY}",
        )
    if missing:
        install = _install_command(checkout)
        return EngineUnavailable(
            f"Step-Audio-EditX needs the Python module {missing!r}: {install}",
            f"Step-Audio-EditX 缺少 Python 模块 {missing!r}：请运行 {install}",
        )
    # Reinstall one package only: all of them would replace a torch that matches this machine's driver.
    again = f"{pip_install()} --force-reinstall --no-deps"
    advice = unmet_advice(checkout, unmet(checkout)) or Sentence(
        f"Run {again} with the package that raised it", f"请对出错的软件包运行 {again}"
    )
    why = in_words(error)
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be imported ({why.en}). {advice.en}",
        f"无法导入 Step-Audio-EditX（{why.zh}）。{advice.zh}",
    )


def unusable(checkout: Path, error: BaseException) -> EngineUnavailable | None:
    """Returns the error to show if missing or unsuitable packages may be the cause; None otherwise.

    Errors raised on purpose are clearer unchanged. Other versions of packages cause only errors of misuse, such as
    `TypeError`.
    """
    if isinstance(error, (ValueError, OSError, MemoryError, ResidencyError)):
        return None
    packages = unmet(checkout)
    if not isinstance(error, (AttributeError, LookupError, NameError, TypeError)):
        packages = {name: installed for name, installed in packages.items() if installed is None}
    advice, why = unmet_advice(checkout, packages), in_words(error)
    if advice is None:
        return None
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be built ({why.en}). {advice.en}, and restart this program: it does not repeat "
        f"failed imports",
        f"无法构建 Step-Audio-EditX（{why.zh}）。{advice.zh}，然后重启本程序（导入失败的部分不会重试）",
    )


def unmet(checkout: Path) -> Unmet:
    """Compares the checkout's requirements with the installed packages; returns missing packages first.

    No file with requirements, no requirements.
    """
    found: Unmet = {}
    for requirement in requirements(checkout):
        installed = installed_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            found[f"{requirement.name}{requirement.specifier}"] = installed
    return dict(sorted(found.items(), key=lambda item: item[1] is not None))


def requirements(checkout: Path) -> Iterator[Requirement]:
    """Yields the checkout's requirements for this system. Skips options and links."""
    for line in _requirements(checkout):
        try:
            requirement = Requirement(line.split(" #")[0].strip())
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def unmet_advice(checkout: Path, packages: Unmet) -> Sentence | None:
    """Returns unmet requirements, such as ``torch==2.1 (2.0)``, and the command that installs them; None if empty."""
    en = "; ".join(f"{name} ({installed or 'missing'})" for name, installed in packages.items())
    zh = "；".join(f"{name}（{installed or '未安装'}）" for name, installed in packages.items())
    install = _install_command(checkout)
    if whisper := next((name for name in packages if name.startswith("openai-whisper")), None):
        # Its setup.py imports pkg_resources, which setuptools no longer has.
        pip = pip_install()
        install = f'{pip} "setuptools<81" wheel && {pip} --no-build-isolation "{whisper}" && {install}'
    return Sentence(f"Unmet requirements: {en}. Run {install}", f"未满足的依赖：{zh}。请运行 {install}") if en else None


def _requirements(checkout: Path) -> list[str]:
    """Returns the lines of requirements.txt; without one, the dependencies in pyproject.toml, with Python first."""
    if (file := checkout / "requirements.txt").is_file():
        return file.read_text(encoding="utf-8").splitlines()
    if not (file := checkout / "pyproject.toml").is_file():
        return []
    if sys.version_info < (3, 11):  # no tomllib; the checkout needs 3.12
        return ["python>=3.12"]
    import tomllib  # type: ignore[import-not-found]

    with suppress(OSError, ValueError):
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        return [f"python{project.get('requires-python', '')}", *project.get("dependencies", ())]
    return []


def installed_version(name: str) -> str | None:
    """Returns the version of a package, or of ``python``; None if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _install_command(checkout: Path) -> str:
    """Returns the command that installs the requirements; pip cannot read them in pyproject.toml, uv can."""
    file = checkout / "requirements.txt"
    if by_uv := not file.is_file():
        file = checkout / "pyproject.toml"
    return f"{pip_install(by_uv)} -r {shlex.quote(str(file))}"


class _Finder(MetaPathFinder):
    """Import hook: finds the modules in `MODULES` in the checkout only."""

    folder = ""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder]) if path is None and name in MODULES else None


_finder = _Finder()


def _make_importable(checkout: Path) -> None:
    _finder.folder = str(checkout)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if _finder.folder not in sys.path:
        sys.path.append(_finder.folder)


def _origin(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return Path(file).resolve() if file else None


def _is_checkout(folder: Path) -> bool:
    return all((folder / name).exists() for name in LANDMARKS)
