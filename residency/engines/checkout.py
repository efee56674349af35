"""Finds an unmodified Step-Audio-EditX checkout and imports its modules.

Its top-level modules have common names (``tts``, ``utils``, ``config`` ...). From the first load on, an import hook
resolves exactly these to the checkout. The checkout is last on ``sys.path``, so that it hides no other module.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from ..errors import EngineUnavailable, ResidencyError
from ..locks import renewed_in_children
from ..observability.error_classification import in_words
from . import requirements

REPOSITORY = "https://github.com/stepfun-ai/Step-Audio-EditX"

#: Top-level modules and packages of the checkout, without its app and scripts.
_NAMES = (
    "config", "funasr_detach", "model_loader", "quantization", "stepvocoder", "tokenizer", "tts", "utils",
    "whisper_wrapper",
)  # fmt: skip
_PROJECT = Path(__file__).resolve().parents[2]

_importing = renewed_in_children(threading.Lock())


def find_checkout(root: str | None = None) -> Path | None:
    """Finds the checkout: ``root``, the one imported by this process, ``STEP_AUDIO_ROOT``, or one nearby.

    Nearby: the current folder, the folder of this project, and ``Step-Audio-EditX`` beside either. Raises
    `EngineUnavailable` if ``root`` or ``STEP_AUDIO_ROOT`` names a folder that is no checkout.
    """
    used = _used()
    named = root or ("" if used else os.environ.get("STEP_AUDIO_ROOT"))
    if named:
        folder = Path(named).expanduser()
        if not _is_checkout(folder):
            raise EngineUnavailable(
                f"{named} is no Step-Audio-EditX checkout (tts.py or stepvocoder/ is missing): git clone {REPOSITORY}",
                f"{named} 不是 Step-Audio-EditX 代码目录（缺少 tts.py 或 stepvocoder/）：请 git clone {REPOSITORY}",
            )
        return folder.resolve()
    here = Path.cwd()
    nearby = [here, _PROJECT, *(place.parent / "Step-Audio-EditX" for place in (here, _PROJECT))]
    return used or next((place.resolve() for place in nearby if _is_checkout(place)), None)


def require_checkout(root: str | None) -> Path:
    """Returns `find_checkout`, or raises `EngineUnavailable` if there is none."""
    if checkout := find_checkout(root):
        return checkout
    raise EngineUnavailable(
        f"No Step-Audio-EditX checkout found: git clone {REPOSITORY} and give its folder as --step-audio-root or "
        f"STEP_AUDIO_ROOT",
        f"未找到 Step-Audio-EditX 代码：请 git clone {REPOSITORY}，并用 --step-audio-root 或 STEP_AUDIO_ROOT "
        f"指定其目录",
    )


def import_from(checkout: Path, *names: str) -> list[ModuleType]:
    """Imports modules of the checkout. Raises `EngineUnavailable` with the missing requirements and the command."""
    with _importing:
        for name in _NAMES:
            if (there := sys.modules.get(name)) and not _is_of(there, checkout):
                raise EngineUnavailable(
                    f"Step-Audio-EditX has a module {name!r}, and this program has imported another one of that name "
                    f"({_origin(there) or 'from nowhere'}): rename that one, or start the engine in a program without",
                    f"Step-Audio-EditX 有名为 {name!r} 的模块，而本程序已导入另一个同名模块"
                    f"（{_origin(there) or '来源不明'}）：请将其改名，或在没有该模块的程序中启动引擎",
                )
        _make_importable(checkout)
        importlib.invalidate_caches()  # for packages installed since the last attempt
        try:
            return [importlib.import_module(name) for name in names]
        except Exception as error:
            # Any exception: missing or unsuitable dependencies fail in many ways.
            raise unimportable(checkout, error) from error


def install_command(checkout: Path) -> str:
    return f"pip install -r {shlex.quote(str(checkout / 'requirements.txt'))}"


def unfit(checkout: Path, error: BaseException) -> EngineUnavailable | None:
    """Returns the error to show if missing or unsuitable packages may be the cause; None otherwise.

    The checkout ignores failed imports of its own parts and fails later, at their use. Errors raised on purpose are
    clearer unchanged. Other versions of packages cause only errors of misuse, such as `TypeError`.
    """
    if isinstance(error, (ValueError, OSError, MemoryError, ResidencyError)):
        return None
    others = requirements.unmet(checkout / "requirements.txt")
    if not isinstance(error, (AttributeError, LookupError, NameError, TypeError)):
        others = [each for each in others if each.installed is None]
    if not others:
        return None
    others.sort(key=lambda each: each.installed is not None)  # missing ones first
    install, listed, why = install_command(checkout), requirements.listed(others), in_words(error)
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be built ({why.en}). Not as it asks for: {listed.en}. {install}, and restart "
        f"this program: what could not be imported is not tried again",
        f"无法构建 Step-Audio-EditX（{why.zh}）。与其要求不符：{listed.zh}。请 {install}，然后重启本程序"
        f"（导入失败的部分不会重试）",
    )


def unimportable(checkout: Path, error: BaseException) -> EngineUnavailable:
    """Returns the error to show for a failed import, with the command that fixes it."""
    install = install_command(checkout)
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.split(".")[0] in _NAMES:
        return EngineUnavailable(
            f"The Step-Audio-EditX checkout {checkout} is incomplete, {missing} is missing: git clone {REPOSITORY}",
            f"Step-Audio-EditX 代码目录 {checkout} 不完整，缺少 {missing}：请重新 git clone {REPOSITORY}",
        )
    if missing:
        return EngineUnavailable(
            f"Step-Audio-EditX needs the Python module {missing!r}: {install}",
            f"Step-Audio-EditX 缺少 Python 模块 {missing!r}：请 {install}",
        )
    others = requirements.listed(requirements.unmet(checkout / "requirements.txt"))
    why = in_words(error)
    # Reinstall one package only: all of them would replace a torch that matches this machine's driver.
    again = "pip install --force-reinstall --no-deps"
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be imported ({why.en}). "
        + (f"Not as it asks for: {others.en}. {install}" if others else f"{again} the package that this comes from"),
        f"无法导入 Step-Audio-EditX（{why.zh}）。"
        + (f"与其要求不符：{others.zh}。请 {install}" if others else f"请对出错的软件包执行 {again}"),
    )


class _Finder(MetaPathFinder):
    """Import hook: finds the modules in `_NAMES` in the checkout only."""

    def __init__(self, checkout: Path) -> None:
        self.folder = str(checkout)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder]) if path is None and name in _NAMES else None


def _make_importable(checkout: Path) -> None:
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _Finder(checkout))
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))


def _used() -> Path | None:
    """Returns the checkout from which ``tts`` was imported."""
    origin = _origin(sys.modules.get("tts"))
    return origin.parent if origin and _is_checkout(origin.parent) else None


def _is_of(module: ModuleType, checkout: Path) -> bool:
    origin = _origin(module)
    return origin is not None and origin.is_relative_to(checkout)


def _origin(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return Path(file).resolve() if file else None


def _is_checkout(folder: Path) -> bool:
    return (folder / "tts.py").is_file() and (folder / "stepvocoder").is_dir()
