"""This project's errors: messages in English and Chinese with the next step; details as attributes. Can be pickled."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from .memory_errors import (
    CapturedGraphs,
    CaptureUnderWay,
    CheckpointFailed,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceUnavailable,
    NotHandedOut,
    OnAnotherDevice,
    OverBudget,
    PartGone,
    RemoteError,
    SelfMoveFailed,
    SelfMoveFreedNothing,
    SharedWeights,
    SnapshotUnusable,
    TensorAway,
    WeightsGone,
    WorkerDied,
    WorkerEnded,
)
from .neighbor_errors import NeighborRefused, NeighborUnreachable
from .sentences import Holder, ResidencyError, Sentence

__all__ = ["CaptureUnderWay", "CapturedGraphs", "CheckpointFailed", "DeviceLost", "DeviceOutOfMemory",
           "DeviceUnavailable", "EngineUnavailable", "EventLoopBlocked", "ExtraMissing", "Field", "Holder",
           "InvalidInput", "LeaseDeadlock", "LoadTimeout", "ManagerClosed", "ModelBusy", "ModelExists",
           "NeighborRefused", "NeighborUnreachable", "NotAllowed", "NotHandedOut", "NotReady", "OnAnotherDevice",
           "OverBudget", "PartGone", "RemoteError",
           "RequestCancelled", "RequestStopped", "RequestTimeout", "ResidencyError", "SelfMoveFailed",
           "SelfMoveFreedNothing", "SettingsConflict", "SharedWeights", "SnapshotUnusable", "TensorAway",
           "TooManyListeners", "UnknownModel", "WeightsGone", "WorkerDied", "WorkerEnded", "about", "needing",
           "pip_install", "require"]  # fmt: skip


@dataclass(eq=False, repr=False)
class UnknownModel(ResidencyError, KeyError):
    """No model of that name is registered."""

    name: str
    known: tuple[str, ...]

    def sentences(self) -> tuple[str, str]:
        return (
            f"No model is called {self.name!r}; known: {', '.join(self.known) or 'none'}.",
            f"没有名为 {self.name!r} 的模型；已注册：{'、'.join(self.known) or '无'}。",
        )

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0])


@dataclass(eq=False, repr=False)
class ModelExists(ResidencyError):
    """A model of that name is registered already."""

    name: str
    en = "A model called {self.name!r} is registered already; choose another name or unregister({self.name!r}) first."
    zh = "已注册名为 {self.name!r} 的模型；请换一个名称，或先调用 unregister({self.name!r})。"


_STATES_ZH = {
    "released": "未加载", "loading": "加载中", "device": "使用中", "offloading": "卸载中",
    "host": "在内存中", "restoring": "恢复中", "releasing": "释放中",
}  # fmt: skip


def _activity(state: str, holder: Holder | None, more_en: str, more_zh: str) -> tuple[str, str]:
    """Returns, in brackets and both languages, a model's state, ``more``, and the code that uses it."""
    held_en, held_zh = (f"; {holder.en}", f"；{holder.zh}") if holder else ("", "")
    state_en = "in use" if state == "device" else state
    return f"({state_en}; {more_en}{held_en})", f"（{_STATES_ZH.get(state, state)}；{more_zh}{held_zh}）"


def _in_brackets(holder: Holder | None) -> tuple[str, str]:
    return (f" ({holder.en})", f"（{holder.zh}）") if holder else ("", "")


@dataclass(eq=False, repr=False)
class RequestTimeout(ResidencyError, TimeoutError):
    """A request did not get its model in time. The current move continues.

    ``place``: place in the queue (1: next). ``doing``: state of the model. ``holder``: the request that used the model.
    ``card``: how much room lacks on a card that other processes use, and how much each holds; empty otherwise.
    """

    name: str
    waited_s: float
    place: int
    doing: str
    holder: Holder | None = None
    card: str = ""

    def sentences(self) -> tuple[str, str]:
        card = Sentence.of(self.card)
        place = f"place {self.place} in the queue", f"排队第 {self.place} 位"
        en, zh = _activity(self.doing, self.holder, *place)
        return (
            f"Timed out after {self.waited_s:.3g} s waiting for {self.name!r} {en}{card and f': {card.en}'}. Try "
            f"again, or raise the limit (--gpu-wait-timeout, or timeout).",
            f"等待 {self.name!r} 超过 {self.waited_s:.3g} 秒{zh}{card and f'：{card.zh}'}。"
            f"请重试，或调大上限（--gpu-wait-timeout 或 timeout）。",
        )


@dataclass(eq=False, repr=False)
class EventLoopBlocked(ResidencyError, RuntimeError):
    """``call`` would block the event loop that the code of ``holder``, which uses the model, needs to continue."""

    name: str
    call: str
    holder: Holder | None = None

    def sentences(self) -> tuple[str, str]:
        held_en, held_zh = _in_brackets(self.holder)
        return (
            f"{self.call} would deadlock: another task of this event loop holds {self.name!r}{held_en}. Use `async "
            f"with` for leases, and call this in a worker thread (asyncio.to_thread).",
            f"{self.call} 会造成死锁：当前事件循环中的另一个任务正占用 {self.name!r}{held_zh}。请用 async "
            f"with 获取租约，并在工作线程中进行此调用（asyncio.to_thread）。",
        )


@dataclass(eq=False, repr=False)
class ModelBusy(ResidencyError):
    """The model is in use or not on the device, and the request must not wait or the queue is full."""

    name: str
    waiting: int
    doing: str
    holder: Holder | None = None

    def sentences(self) -> tuple[str, str]:
        waiting = f"{self.waiting} waiting", f"{self.waiting} 个请求等待中"
        en, zh = _activity(self.doing, self.holder, *waiting)
        return f"{self.name!r} is busy {en}. Try again later.", f"{self.name!r} 正忙{zh}，请稍后重试。"


@dataclass(eq=False, repr=False)
class RequestCancelled(ResidencyError):
    """A request was cancelled while it waited."""

    name: str
    en = "The request for {self.name!r} was cancelled while it waited."
    zh = "对 {self.name!r} 的请求在等待时被取消。"


class RequestStopped(ResidencyError):
    """A request was cancelled while it ran; see `residency.cancellation`."""

    en = "The request was stopped and its result discarded. Submit it again if you still need it."
    zh = "请求已停止，结果已丢弃。如仍需要，请重新提交。"


@dataclass(eq=False, repr=False)
class LeaseDeadlock(ResidencyError, RuntimeError):
    """A request would wait forever: the code that uses the model waits for the code that makes the request.

    ``holding``: models that the requesting code uses or loads. ``holder``: the request that uses the model.
    """

    name: str
    holding: tuple[str, ...]
    holder: Holder | None = None

    def sentences(self) -> tuple[str, str]:
        held_en, held_zh = _in_brackets(self.holder)
        if self.holding:
            return (
                f"Deadlock: this code holds {', '.join(self.holding)} and waits for {self.name!r}{held_en}, whose "
                f"holder waits for one of those (or a loader requests its own model). Take leases in the same order "
                f"everywhere.",
                f"死锁：此代码占用 {'、'.join(self.holding)}，同时等待 {self.name!r}{held_zh}，而后者的占用者正在等待"
                f"前者（或加载函数请求了自己的模型）。请在各处以相同顺序获取租约。",
            )
        return (
            f"Deadlock: the holder of {self.name!r}{held_en} waits for this request, or can continue only from this "
            f"code. End that lease first, or make this request in its context (contextvars.copy_context().run) to "
            f"share it.",
            f"死锁：{self.name!r} 的占用者{held_zh}正在等待本请求，或只能由此代码继续执行。"
            f"请先结束该租约，或在其上下文中（contextvars.copy_context().run）发出请求以共享它。",
        )


@dataclass(eq=False, repr=False)
class LoadTimeout(ResidencyError, TimeoutError):
    """A loader exceeded its time limit. A late engine is discarded; the next request starts a new load."""

    name: str
    allowed_s: float
    en = (
        "{self.name!r} was not loaded within {self.allowed_s:g} s. Check what its loader is waiting for (a download, "
        "a disk, a lock), or raise the limit (--gpu-load-timeout, or load_timeout)."
    )
    zh = (
        "{self.name!r} 未能在 {self.allowed_s:g} 秒内加载完成。请检查加载函数在等待什么（下载、磁盘、锁），"
        "或调大上限（--gpu-load-timeout 或 load_timeout）。"
    )


class ManagerClosed(ResidencyError):
    """The manager is closed and accepts no requests."""

    en = "The GPU manager is closed; make a new one or restart the app."
    zh = "GPU 管理器已关闭，请新建一个或重启应用。"


class NotReady(ResidencyError):
    """The app is starting; its page does not respond yet."""

    en = "The app is still starting; try again in a moment."
    zh = "应用正在启动，请稍后重试。"


@dataclass(eq=False, repr=False)
class TooManyListeners(ResidencyError):
    """``/gpu/events`` has reached its maximum of listeners."""

    most: int
    en = (
        "{self.most} listeners are connected already, which is the limit: close some and try again, or poll "
        "/gpu/status."
    )
    zh = "监听者已达 {self.most} 个：请关闭不需要的连接后重试，或改为轮询 /gpu/status。"


@dataclass(eq=False, repr=False)
class SettingsConflict(ResidencyError):
    """The manager of this process already exists with other settings."""

    setting: str
    present: object
    asked: object
    en = (
        "The manager of this process already runs with {self.setting}={self.present!r}, not {self.asked!r}. Call "
        "get_gpu_manager() without settings to share it, or close() it first."
    )
    zh = (
        "本进程的管理器已以 {self.setting}={self.present!r} 运行，而不是 {self.asked!r}。"
        "请不带参数调用 get_gpu_manager() 以共用它，或先调用 close()。"
    )


Field = Literal["recording", "prompt_text", "target_text", "task", "sub_task", "voice", "voice_name"]
"""The parts of a speech request, and of a voice that is stored; each has a control on the page."""


class InvalidInput(ResidencyError, ValueError):
    """Invalid user input; the message contains what to enter instead, in both languages.

    ``field``: the part of a speech request with the error; None if it is no single part.
    """

    def __init__(self, en: str, zh: str, field: Field | None = None) -> None:
        super().__init__(en, zh, en, zh, field)
        self.field = field


@contextmanager
def about(field: Field) -> Iterator[None]:
    """Sets ``field`` on an `InvalidInput` raised in this block, unless it has one."""
    try:
        yield
    except InvalidInput as error:
        if error.field is not None:
            raise
        raise InvalidInput(error.en, error.zh, field) from error


class NotAllowed(ResidencyError, PermissionError):
    """The caller has no permission for this operation."""

    en = (
        "This is allowed only from this machine, for signed-in users (--auth user:password), or with the token "
        "(--control-token, sent as 'Authorization: Bearer TOKEN')."
    )
    zh = (
        "此操作只允许从本机执行、由已登录用户（--auth user:password）执行，或凭令牌执行（--control-token，"
        "以请求头 'Authorization: Bearer TOKEN' 发送）。"
    )


@dataclass(eq=False, repr=False)
class ExtraMissing(ResidencyError, ImportError):
    """A module of an optional extra, which a plain ``pip install`` omits, is not installed."""

    extra: str
    module: str
    en = (
        "The Python module {self.module!r} is missing, which comes with the extra {self.extra!r}: {self.install} "
        "'gpu-managed-tts[{self.extra}]', or {self.install} '.[{self.extra}]' in this project's folder"
    )
    zh = (
        "缺少 Python 模块 {self.module!r}，它由附加依赖 {self.extra!r} 提供：请执行 {self.install} "
        "'gpu-managed-tts[{self.extra}]'，或在本项目目录中执行 {self.install} '.[{self.extra}]'"
    )

    @property
    def install(self) -> str:
        return pip_install()


def pip_install(by_uv: bool = False) -> str:
    """Returns the command that installs packages in this environment: by uv, if it has no pip or ``by_uv``."""
    if not by_uv and importlib.util.find_spec("pip") is not None:
        return "pip install"
    return f"uv pip install --python {shlex.quote(sys.executable)}"


def require(extra: str, *modules: str) -> None:
    """Raises `ExtraMissing` unless all these top-level modules of an extra can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ExtraMissing(extra, module)


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Raises `ExtraMissing` for a module that is not installed, in a block that imports modules of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "app", "gpu_manager", "residency", "tts_gpu_managed"):
            raise
        raise ExtraMissing(extra, module) from error


class EngineUnavailable(ResidencyError):
    """The requested speech engine is not installed or was not found."""
