"""A Step-Audio-EditX checkout, unmodified: where it is, and its modules in this process.

Its top-level modules (``tts``, ``utils``, ``config`` ...) have everybody's names. So those come from it alone, from the
first load on, whenever it imports them; on ``sys.path`` it comes last, and no other module is taken for one of its.
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

#: The modules and packages at its top level, its app and scripts left out.
_NAMES = (
    "config", "funasr_detach", "model_loader", "quantization", "stepvocoder", "tokenizer", "tts", "utils",
    "whisper_wrapper",
)  # fmt: skip
_OURS = Path(__file__).resolve().parents[2]

_importing = renewed_in_children(threading.Lock())


def find_checkout(root: str | None = None) -> Path | None:
    """The checkout: ``root``, the one that this process uses already, ``STEP_AUDIO_ROOT``, or one nearby.

    Nearby is the current folder, the folder of this project, and ``Step-Audio-EditX`` beside either. A root that was
    named and is no checkout is `EngineUnavailable`, not passed over.
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
    nearby = [here, _OURS, *(place.parent / "Step-Audio-EditX" for place in (here, _OURS))]
    return used or next((place.resolve() for place in nearby if _is_checkout(place)), None)


def not_found() -> EngineUnavailable:
    """No checkout, and how to get one."""
    return EngineUnavailable(
        f"No Step-Audio-EditX checkout found: git clone {REPOSITORY} and give its folder as --step-audio-root or "
        f"STEP_AUDIO_ROOT",
        f"未找到 Step-Audio-EditX 代码：请 git clone {REPOSITORY}，并用 --step-audio-root 或 STEP_AUDIO_ROOT "
        f"指定其目录",
    )


def import_from(checkout: Path, *names: str) -> list[ModuleType]:
    """The checkout's modules of these names. `EngineUnavailable` says what is missing, and what gets it."""
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
        importlib.invalidate_caches()  # what was missing a moment ago may have been installed meanwhile
        try:
            return [importlib.import_module(name) for name in names]
        except Exception as error:
            # Whatever it is: what a checkout needs fails in its own ways when it is missing or of another version.
            raise unimportable(checkout, error) from error


def install_command(checkout: Path) -> str:
    """What installs what the checkout asks for."""
    return f"pip install -r {shlex.quote(str(checkout / 'requirements.txt'))}"


def unfit(checkout: Path, error: BaseException) -> EngineUnavailable | None:
    """Whether an error may come from packages that are missing or of another version, and what to do.

    The checkout passes over parts of its own that cannot be imported, and stumbles over their absence later. Errors
    that are raised on purpose say it better themselves; packages of another version show in misuse only.
    """
    if isinstance(error, (ValueError, OSError, MemoryError, ResidencyError)):
        return None
    others = requirements.unmet(checkout / "requirements.txt")
    if not isinstance(error, (AttributeError, LookupError, NameError, TypeError)):
        others = [each for each in others if each.installed is None]
    if not others:
        return None
    others.sort(key=lambda each: each.installed is not None)  # what is missing first
    install, listed, why = install_command(checkout), requirements.listed(others), in_words(error)
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be built ({why.en}). Not as it asks for: {listed.en}. {install}, and restart "
        f"this program: what could not be imported is not tried again",
        f"无法构建 Step-Audio-EditX（{why.zh}）。与其要求不符：{listed.zh}。请 {install}，然后重启本程序"
        f"（导入失败的部分不会重试）",
    )


def unimportable(checkout: Path, error: BaseException) -> EngineUnavailable:
    """What an error at an import means, in sentences, and what to do."""
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
    # Not all of them again: that would replace a torch that fits this machine's driver.
    again = "pip install --force-reinstall --no-deps"
    return EngineUnavailable(
        f"Step-Audio-EditX cannot be imported ({why.en}). "
        + (f"Not as it asks for: {others.en}. {install}" if others else f"{again} the package that this comes from"),
        f"无法导入 Step-Audio-EditX（{why.zh}）。"
        + (f"与其要求不符：{others.zh}。请 {install}" if others else f"请对出错的软件包执行 {again}"),
    )


class _Finder(MetaPathFinder):
    """Finds the modules of these names in the checkout, whatever else is on the path."""

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
    """The checkout whose ``tts`` the program has imported itself."""
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
