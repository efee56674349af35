"""Errors that people and programs can act on.

Every error says what to do next, keeps its facts as attributes and survives pickling (a worker process
hands it to its parent). Messages are written in English and Chinese.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from .sentences import Sentence


class ResidencyError(Exception):
    """Base of all errors raised by this project.

    ``en`` and ``zh`` are the message in English and in Chinese, ``str`` both: ``en / zh``. ``fields`` are the arguments
    of the subclass's own constructor.
    """

    def __init__(self, en: str, zh: str, *fields: object) -> None:
        super().__init__(f"{en} / {zh}")
        self.en = en
        self.zh = zh
        self._fields = fields

    def __reduce__(self) -> tuple[type[ResidencyError], tuple[object, ...]]:
        return type(self), self._fields


class UnknownModel(ResidencyError, KeyError):
    """No model of that name is registered."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(
            f"No model is called {name!r}; known: {', '.join(known) or 'none'}.",
            f"没有名为 {name!r} 的模型；已注册：{'、'.join(known) or '无'}。",
            name,
            known,
        )
        self.name = name
        self.known = known

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0])


class ModelExists(ResidencyError):
    """A model of that name is registered already."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"A model called {name!r} is registered already; choose another name or unregister({name!r}) first.",
            f"已注册名为 {name!r} 的模型；请换一个名称，或先调用 unregister({name!r})。",
            name,
        )
        self.name = name


@dataclass(frozen=True)
class Holder:
    """The request that has a model: the code that took the lease, its thread, and since how many seconds.

    ``waits_for`` is the thread of a request for the same model for which this code waits, with a time-out.
    """

    where: str
    thread: str
    held_s: float
    waits_for: str | None = None

    @property
    def en(self) -> str:
        waits = f", which waits for thread {self.waits_for}, which waits for the model" if self.waits_for else ""
        return f"held for {self.held_s:.3g} s by {self.where} (thread {self.thread}){waits}"

    @property
    def zh(self) -> str:
        waits = f"，且正在等待线程 {self.waits_for}，而该线程在等待此模型" if self.waits_for else ""
        return f"{self.where}（线程 {self.thread}）已占用 {self.held_s:.3g} 秒{waits}"


#: What a model is doing, by its state: in English most states say it themselves.
_DOING_ZH = {
    "released": "未加载",
    "loading": "加载中",
    "device": "使用中",
    "offloading": "正在离开设备",
    "host": "在内存中",
    "restoring": "正在返回设备",
    "releasing": "释放中",
}


def _doing(state: str) -> tuple[str, str]:
    return "in use" if state == "device" else state, _DOING_ZH.get(state, state)


class RequestTimeout(ResidencyError, TimeoutError):
    """A request did not get its model in the time it had. Nothing was harmed: what was being moved arrives.

    ``place`` is where it stood (1: served next), ``doing`` what the model was doing then (a state's name), ``holder``
    the request that had the model then, if one had it.
    """

    def __init__(self, name: str, waited_s: float, place: int, doing: str, holder: Holder | None = None) -> None:
        held_en, held_zh = (f"; {holder.en}", f"；{holder.zh}") if holder else ("", "")
        doing_en, doing_zh = _doing(doing)
        super().__init__(
            f"{name!r} did not become free within {waited_s:.3g} s ({doing_en}; place {place} in the queue{held_en}). "
            f"Try again, or allow more time (--gpu-wait-timeout, or timeout).",
            f"{waited_s:.3g} 秒内未能使用 {name!r}（{doing_zh}；排队第 {place} 位{held_zh}）。请重试，或延长等待时间"
            f"（--gpu-wait-timeout 或 timeout）。",
            name,
            waited_s,
            place,
            doing,
            holder,
        )
        self.name = name
        self.waited_s = waited_s
        self.place = place
        self.doing = doing
        self.holder = holder


class EventLoopBlocked(ResidencyError, RuntimeError):
    """A call would block the event loop in which the code that has the model goes on.

    ``call`` is what was called, ``holder`` the request that has the model.
    """

    def __init__(self, name: str, call: str, holder: Holder | None = None) -> None:
        held_en, held_zh = (f" ({holder.en})", f"（{holder.zh}）") if holder else ("", "")
        super().__init__(
            f"{call} would block this event loop, in which another task holds {name!r}{held_en}, for ever: write async "
            f"with for leases, and call this in a worker thread (asyncio.to_thread).",
            f"{call} 会永久阻塞当前事件循环，而持有 {name!r} 的另一个任务正运行于其中{held_zh}：请用 async with "
            f"获取租约，或在工作线程中调用（asyncio.to_thread）。",
            name,
            call,
            holder,
        )


class ModelBusy(ResidencyError):
    """A request that may not wait, or not behind that many, came when the model was in use or not on the device."""

    def __init__(self, name: str, waiting: int, doing: str, holder: Holder | None = None) -> None:
        held_en, held_zh = (f"; {holder.en}", f"；{holder.zh}") if holder else ("", "")
        doing_en, doing_zh = _doing(doing)
        super().__init__(
            f"{name!r} is busy ({doing_en}; {waiting} waiting{held_en}). Try again later.",
            f"{name!r} 正忙（{doing_zh}；{waiting} 个请求等待中{held_zh}），请稍后重试。",
            name,
            waiting,
            doing,
            holder,
        )
        self.name = name
        self.waiting = waiting
        self.doing = doing
        self.holder = holder


class RequestCancelled(ResidencyError):
    """A request was cancelled while it waited."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The request for {name!r} was cancelled while it waited.", f"对 {name!r} 的请求在等待时被取消。", name
        )
        self.name = name


class RequestStopped(ResidencyError):
    """A request was cancelled while it ran; see `residency.cancellation`."""

    def __init__(self) -> None:
        super().__init__(
            "The request was stopped, and nothing of it is kept; ask again if you want it.",
            "请求已停止，未保留任何结果；如仍需要，请重新提交。",
        )


class LeaseDeadlock(ResidencyError, RuntimeError):
    """A request would wait for ever: the code that has the model waits for the code that makes the request.

    ``holding`` are the models that the request's own code has or loads, ``holder`` is the request that has the model.
    """

    def __init__(self, name: str, holding: tuple[str, ...], holder: Holder | None = None) -> None:
        held_en, held_zh = (f" ({holder.en})", f"（{holder.zh}）") if holder else ("", "")
        if holding:
            en = (
                f"Waiting for {name!r} while holding {', '.join(holding)} would never end{held_en}: the request that "
                f"has it waits for those, or a loader asks for its own model. Take the leases in the same order "
                f"everywhere."
            )
            zh = f"持有 {'、'.join(holding)} 时等待 {name!r}{held_zh} 会造成死锁：请在各处以相同顺序获取租约。"
        else:
            en = (
                f"Waiting for {name!r}{held_en} would never end: the code that has it waits for this request, or is "
                f"continued by it. Leave that lease first, or make this request in its context "
                f"(contextvars.copy_context().run) to share it."
            )
            zh = (
                f"等待 {name!r}{held_zh} 会造成死锁：占用它的代码正在等待本请求，或需由本请求的代码继续执行。"
                f"请先退出该租约，或在其上下文中（contextvars.copy_context().run）发出请求以共享它。"
            )
        super().__init__(en, zh, name, holding, holder)
        self.name = name
        self.holding = holding
        self.holder = holder


class LoadTimeout(ResidencyError, TimeoutError):
    """A loader took longer than it may. What it still brings is thrown away; the next request loads anew."""

    def __init__(self, name: str, allowed_s: float) -> None:
        super().__init__(
            f"{name!r} was not loaded within {allowed_s:g} s. Look what its loader waits for (a download, a disk, a "
            f"lock), or allow more (--gpu-load-timeout, or load_timeout).",
            f"{name!r} 未能在 {allowed_s:g} 秒内加载完成。"
            f"请检查加载在等待什么（下载、磁盘、锁），或延长时限（--gpu-load-timeout 或 load_timeout）。",
            name,
            allowed_s,
        )
        self.name = name
        self.allowed_s = allowed_s


class ManagerClosed(ResidencyError):
    """The manager was closed; it serves no further requests."""

    def __init__(self) -> None:
        super().__init__(
            "The GPU manager is closed; make a new one or restart the app.",
            "GPU 管理器已关闭，请新建一个或重启应用。",
        )


class NotReady(ResidencyError):
    """The app starts, and its page does not answer yet."""

    def __init__(self) -> None:
        super().__init__("The app is still starting; try again in a moment.", "应用正在启动，请稍后重试。")


class TooManyListeners(ResidencyError):
    """As many listen to ``/gpu/events`` as may."""

    def __init__(self, most: int) -> None:
        super().__init__(
            f"{most} listeners are connected already, which is the limit: close some and try again, or poll "
            f"/gpu/status.",
            f"监听者已达 {most} 个：请关闭不需要的连接后重试，或改为轮询 /gpu/status。",
            most,
        )
        self.most = most


class SettingsConflict(ResidencyError):
    """The process's manager exists already, with other settings."""

    def __init__(self, setting: str, present: object, asked: object) -> None:
        super().__init__(
            f"The manager of this process already runs with {setting}={present!r}, not {asked!r}. Call "
            f"get_gpu_manager() without settings to share it, or close() it first.",
            f"本进程的管理器已以 {setting}={present!r} 运行，而不是 {asked!r}。"
            f"请不带参数调用 get_gpu_manager() 以共用它，或先调用 close()。",
            setting,
            present,
            asked,
        )
        self.setting = setting
        self.present = present
        self.asked = asked


class DeviceOutOfMemory(ResidencyError, MemoryError):
    """A move needed more device memory than there is. Nothing was moved.

    ``holders`` are the processes that hold memory of the device, as the driver says: (pid, bytes or None).
    """

    def __init__(
        self,
        needed_bytes: int,
        free_bytes: int | None,
        device: str,
        holders: tuple[tuple[int, int | None], ...] = (),
    ) -> None:
        free = "unknown" if free_bytes is None else f"{free_bytes:,}"
        held = [(pid, "?" if nbytes is None else f"{nbytes:,}") for pid, nbytes in holders]
        by = f" (held by {'; '.join(f'pid {pid}: {nbytes}' for pid, nbytes in held)})" if held else ""
        whose = f"（{'；'.join(f'进程 {pid}：{nbytes}' for pid, nbytes in held)}）" if held else ""
        name = Sentence.of(device)
        super().__init__(
            f"{name.en} is short of memory: {needed_bytes:,} bytes needed, {free} free{by}. Release another model or "
            f"stop another program on it, then try again.",
            f"{name.zh} 显存不足：需要 {needed_bytes:,} 字节，"
            f"可用 {'未知' if free_bytes is None else f'{free} 字节'}{whose}。"
            f"请释放其他模型或停止占用显存的程序后重试。",
            needed_bytes,
            free_bytes,
            device,
            holders,
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.device = device
        self.holders = holders


class OverBudget(DeviceOutOfMemory):
    """The models under management may not take so much of the device together. Nothing was moved."""

    def __init__(self, needed_bytes: int, free_bytes: int, budget_bytes: int, device: str) -> None:
        name = Sentence.of(device)
        ResidencyError.__init__(
            self,
            f"The budget of {name.en} is {budget_bytes:,} bytes, of which {free_bytes:,} are to be had, and "
            f"{needed_bytes:,} are needed. Raise it (--gpu-budget, or budget_bytes), or let other models leave "
            f"(keep-warm -1 keeps them).",
            f"{name.zh} 的显存预算为 {budget_bytes:,} 字节，可用 {free_bytes:,}，需要 {needed_bytes:,}。"
            f"请调大预算（--gpu-budget 或 budget_bytes），或让其他模型离开（keep-warm 为 -1 的模型不会离开）。",
            needed_bytes,
            free_bytes,
            budget_bytes,
            device,
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.budget_bytes = budget_bytes
        self.device = device
        self.holders = ()


class DeviceUnavailable(ResidencyError):
    """The GPU that was found cannot be used."""

    def __init__(self, reason: str) -> None:
        said = Sentence.of(reason)
        super().__init__(
            f"The GPU cannot be used: {said.en}. Update its driver or torch, or set CUDA_VISIBLE_DEVICES= (empty) to "
            f"run on the CPU.",
            f"无法使用 GPU：{said.zh}。请更新驱动或 torch，或设置 CUDA_VISIBLE_DEVICES=（空）改用 CPU。",
            reason,
        )
        self.reason = reason


class DeviceLost(DeviceUnavailable):
    """The GPU, or this process's use of it, has failed for good: CUDA answers nothing else to a process after that."""

    def __init__(self, reason: str) -> None:
        ResidencyError.__init__(
            self,
            f"The GPU has failed, and this process cannot use it any more: {reason}. Restart the app.",
            f"GPU 出现故障，本进程无法再使用它：{reason}。请重启应用。",
            reason,
        )
        self.reason = reason


class CaptureUnderWay(ResidencyError, RuntimeError):
    """A move had to wait for the GPU while another thread captured a CUDA graph on it. Nothing was moved."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"A CUDA graph is being captured on {device}; moves wait until it is done, and this one has waited too "
            f"long. Try again; if it is never done, restart the app.",
            f"{device} 上正在捕获 CUDA graph，搬移须等待其完成，本次已等待过久。请重试；若始终不结束，请重启应用。",
            device,
        )
        self.device = device


class SharedWeights(ResidencyError):
    """A model holds bytes that belong to another model too; moving one would take them from the other."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(
            f"These tensors are part of another model under management as well: {', '.join(paths)}. Register both as "
            f"one model, or keep them out with skip.",
            f"这些张量也属于另一个受管理的模型：{'、'.join(paths)}。请将两者注册为一个模型，或用 skip 排除它们。",
            paths,
        )
        self.paths = paths


class OnAnotherDevice(ResidencyError):
    """A part of an engine lies on a GPU that is not the managed one."""

    def __init__(self, where: str, managed: str) -> None:
        super().__init__(
            f"The engine has a part on {where}, and only {managed} is managed: place it on one GPU (--device-map cuda, "
            f"not auto), or let the process see one (CUDA_VISIBLE_DEVICES=0).",
            f"引擎有一部分位于 {where}，而这里只管理 "
            f"{managed}：请放在一块 GPU 上（--device-map cuda，而非 auto），"
            f"或让进程只看到一块（CUDA_VISIBLE_DEVICES=0）。",
            where,
            managed,
        )
        self.where = where
        self.managed = managed


class WeightsGone(ResidencyError):
    """A loader returned an engine that was released before: its tensors have no bytes any more."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(
            f"The loader returned an engine whose weights were released: {', '.join(paths)}. Let it build a new one, "
            f"or register what outlives a release as keep.",
            f"加载函数返回了权重已被释放的引擎：{'、'.join(paths)}。请让它每次新建引擎，"
            f"或用 keep 注册需要在释放后保留的部分。",
            paths,
        )
        self.paths = paths


class NotHandedOut(ResidencyError, TypeError):
    """An answer contains an object that cannot be copied and would read the engine's memory after the lease."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"The engine's answer contains a {kind}, which cannot be copied and would read memory that leaves the "
            f"device. Use it until the engine leaves: with tts.lease() as engine.",
            f"引擎的返回值含有 {kind}，它无法复制，且会读取将离开设备的内存。请在 with tts.lease() as engine 中使用。",
            kind,
        )
        self.kind = kind


class PartGone(ResidencyError, ReferenceError):
    """An object that the engine made and did not keep was used after that engine had been released."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"This {kind} was made by an engine that has been released since. Ask the engine for a new one.",
            f"此 {kind} 由已释放的引擎创建，已失效。请重新向引擎获取。",
            kind,
        )
        self.kind = kind


class TensorAway(ResidencyError, RuntimeError):
    """A tensor of an engine was used while its bytes were away. Nothing was harmed.

    ``path`` leads to it from the engine; ``released`` says that these bytes do not come back, only a new engine's.
    """

    def __init__(self, path: str, released: bool) -> None:
        named = Sentence.of(path)
        if released:
            en = (
                f"{named.en} was released with its engine and has no bytes any more. Take a new lease (with "
                f"manager.lease(name) as engine) and use the engine that it gives."
            )
            zh = (
                f"{named.zh} 已随其引擎释放，不再有数据。请重新获取租约（with manager.lease(name) as engine），"
                f"并使用由此得到的引擎。"
            )
        else:
            en = (
                f"{named.en} is away: its bytes are not on the device while nobody uses the model. Take a lease and "
                f"use it there: with manager.lease(name) as engine."
            )
            zh = (
                f"{named.zh} 的数据当前不在设备上：模型未被使用。请先获取租约，再在租约内使用："
                f"with manager.lease(name) as engine。"
            )
        super().__init__(en, zh, path, released)
        self.path = path
        self.released = released


class CapturedGraphs(ResidencyError):
    """An engine has captured CUDA graphs, which remember addresses on the device: it can be released, not offloaded."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(
            f"The engine has captured CUDA graphs ({', '.join(paths)}), which remember where its weights lie: it "
            f"cannot be offloaded, only released. Build it without them (enable_cuda_graph=False).",
            f"引擎已捕获 CUDA graph（{'、'.join(paths)}），其中记录了权重的显存地址：只能释放，不能卸载到内存。"
            f"请在构建引擎时关闭它（enable_cuda_graph=False）。",
            paths,
        )
        self.paths = paths


class SnapshotUnusable(ResidencyError):
    """A snapshot cannot be written or read. No reason to fail: the engine is released or loaded the normal way."""

    def __init__(self, name: str, reason: str) -> None:
        said = Sentence.of(reason)
        super().__init__(
            f"The snapshot of {name!r} cannot be used: {said.en}.",
            f"{name!r} 的快照无法使用：{said.zh}。",
            name,
            reason,
        )
        self.name = name
        self.reason = reason


Field = Literal["recording", "prompt_text", "target_text", "task", "sub_task"]
"""What a request for speech is made of: each has a control on the page."""


class InvalidInput(ResidencyError, ValueError):
    """Something a user gave cannot be used; the message says what to give instead, in both languages.

    ``field`` names which part of a request for speech that is; None if the error is about no single part.
    """

    def __init__(self, en: str, zh: str, field: Field | None = None) -> None:
        super().__init__(en, zh, en, zh, field)
        self.field = field


@contextmanager
def about(field: Field) -> Iterator[None]:
    """An `InvalidInput` that is raised within this block is about ``field``, unless it names another one."""
    try:
        yield
    except InvalidInput as error:
        if error.field is not None:
            raise
        raise InvalidInput(error.en, error.zh, field) from error


class NotAllowed(ResidencyError, PermissionError):
    """Somebody asked for what is not for everybody."""

    def __init__(self) -> None:
        super().__init__(
            "Only people on this machine, signed-in users (--auth user:password) and holders of the token "
            "(--control-token, sent as 'Authorization: Bearer TOKEN') may do this.",
            "只有本机用户、已登录用户（--auth user:password）或持有令牌者（--control-token，"
            "以请求头 'Authorization: Bearer TOKEN' 发送）可以执行此操作。",
        )


class ExtraMissing(ResidencyError, ImportError):
    """A part of this package needs a module that an extra of it brings, and that is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        command = f"pip install 'gpu-managed-tts[{extra}]'"
        super().__init__(
            f"The Python module {module!r} is missing, which comes with the extra {extra!r}: {command}, or pip install "
            f"'.[{extra}]' in this project's folder",
            f"缺少 Python 模块 {module!r}，它由附加依赖 {extra!r} 提供：请执行 {command}，"
            f"或在本项目目录中执行 pip install '.[{extra}]'",
            extra,
            module,
        )
        self.extra = extra
        self.module = module


class EngineUnavailable(ResidencyError):
    """The speech engine that was asked for is not installed or not where it should be."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en, zh, en, zh)
