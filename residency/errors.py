"""Errors that people and programs can act on.

Every error says what to do next, keeps its facts as attributes and survives pickling (a worker process
hands it to its parent). Messages that reach the page are written in English and Chinese.
"""

from __future__ import annotations


class ResidencyError(Exception):
    """Base of all errors raised by this project. Its fields are the arguments of its constructor."""

    def __init__(self, message: str, *fields: object) -> None:
        super().__init__(message)
        self._fields = fields

    def __reduce__(self) -> tuple[type[ResidencyError], tuple[object, ...]]:
        return type(self), self._fields


class UnknownModel(ResidencyError, KeyError):
    """No model of that name is registered."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(
            f"No model is called {name!r}; known: {', '.join(known) or 'none'}. / "
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
            f"A model called {name!r} is registered already; choose another name or unregister({name!r}) first.", name
        )
        self.name = name


class RequestTimeout(ResidencyError, TimeoutError):
    """A request did not get its model in the time it had. Nothing was harmed: what was being moved arrives.

    ``place`` is where it stood (1: served next), ``doing`` what the model was doing then (a state's name).
    """

    def __init__(self, name: str, waited_s: float, place: int, doing: str) -> None:
        super().__init__(
            f"{name!r} was not to be had within {waited_s:.3g} s ({doing}; place {place} in the queue). Try again, or "
            f"allow more time. / {waited_s:.3g} 秒内未能使用 {name!r}（{doing}；排队第 {place} 位）。"
            f"请重试，或延长等待时间。",
            name,
            waited_s,
            place,
            doing,
        )
        self.name = name
        self.waited_s = waited_s
        self.place = place
        self.doing = doing


class ModelBusy(ResidencyError):
    """A request that may not wait, or not behind that many, came when the model was in use or not on the device."""

    def __init__(self, name: str, waiting: int, doing: str) -> None:
        super().__init__(
            f"{name!r} is busy ({doing}; {waiting} waiting). Try again later. / "
            f"{name!r} 正忙（{doing}；{waiting} 个请求等待中），请稍后重试。",
            name,
            waiting,
            doing,
        )
        self.name = name
        self.waiting = waiting
        self.doing = doing


class RequestCancelled(ResidencyError):
    """A request was cancelled while it waited."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The request for {name!r} was cancelled while it waited. / 对 {name!r} 的请求在等待时被取消。", name
        )
        self.name = name


class LeaseDeadlock(ResidencyError, RuntimeError):
    """A request would wait for somebody who waits for who makes it, for ever."""

    def __init__(self, name: str, holding: tuple[str, ...]) -> None:
        super().__init__(
            f"Waiting for {name!r} while holding {', '.join(holding)} would be waiting for ever: who has it waits for "
            f"those, or a loader asks for its own model. Take the leases in the same order everywhere. / "
            f"持有 {'、'.join(holding)} 时等待 {name!r} 会造成死锁：请在各处以相同顺序获取租约。",
            name,
            holding,
        )
        self.name = name
        self.holding = holding


class LoadTimeout(ResidencyError, TimeoutError):
    """A loader took longer than it may. What it still brings is thrown away; the next request loads anew."""

    def __init__(self, name: str, allowed_s: float) -> None:
        super().__init__(
            f"{name!r} was not loaded within {allowed_s:g} s. Look what its loader waits for (a download, a disk, a "
            f"lock), or allow more (--gpu-load-timeout, or load_timeout). / "
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
            "The GPU manager is closed; make a new one or restart the app. / GPU 管理器已关闭，请新建一个或重启应用。"
        )


class SettingsConflict(ResidencyError):
    """The process's manager exists already, with other settings."""

    def __init__(self, setting: str, present: object, asked: object) -> None:
        super().__init__(
            f"The manager of this process already runs with {setting}={present!r}, not {asked!r}. Call "
            f"get_gpu_manager() without settings to share it, or close() it first.",
            setting,
            present,
            asked,
        )
        self.setting = setting
        self.present = present
        self.asked = asked


def _names(device: str) -> tuple[str, str]:
    """The name of a device in English and in Chinese: a simulated card has two."""
    english, _, chinese = device.partition(" / ")
    return english, chinese or english


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
        english, chinese = _names(device)
        super().__init__(
            f"{english} is short of memory: {needed_bytes:,} bytes needed, {free} free{by}. Release another model or "
            f"stop another program on it, then try again. / {chinese} 显存不足：需要 {needed_bytes:,} 字节，"
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
        english, chinese = _names(device)
        ResidencyError.__init__(
            self,
            f"The budget of {english} is {budget_bytes:,} bytes, of which {free_bytes:,} are to be had, and "
            f"{needed_bytes:,} are needed. Raise it (--gpu-budget, or budget_bytes), or let other models leave "
            f"(keep-warm -1 keeps them). / "
            f"{chinese} 的显存预算为 {budget_bytes:,} 字节，可用 {free_bytes:,}，需要 {needed_bytes:,}。"
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
        super().__init__(
            f"The GPU cannot be used: {reason}. Update its driver or torch, or set CUDA_VISIBLE_DEVICES= (empty) to "
            f"run on the CPU. / 无法使用 GPU：{reason}。请更新驱动或 torch，"
            f"或设置 CUDA_VISIBLE_DEVICES=（空）改用 CPU。",
            reason,
        )
        self.reason = reason


class DeviceLost(DeviceUnavailable):
    """The GPU, or this process's use of it, has failed for good: CUDA answers nothing else to a process after that."""

    def __init__(self, reason: str) -> None:
        ResidencyError.__init__(
            self,
            f"The GPU has failed, and this process cannot use it any more: {reason}. Restart the app. / "
            f"GPU 出现故障，本进程无法再使用它：{reason}。请重启应用。",
            reason,
        )
        self.reason = reason


class SharedWeights(ResidencyError):
    """A model holds bytes that belong to another model too; moving one would take them from the other."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(
            f"These tensors are part of another model under management as well: {', '.join(paths)}. Register both as "
            f"one model, or keep them out with skip.",
            paths,
        )
        self.paths = paths


class OnAnotherDevice(ResidencyError):
    """A part of an engine lies on a GPU that is not the managed one."""

    def __init__(self, where: str, managed: str) -> None:
        super().__init__(
            f"The engine has a part on {where}, and only {managed} is managed: place it on one GPU (--device-map cuda, "
            f"not auto), or let the process see one (CUDA_VISIBLE_DEVICES=0). / 引擎有一部分位于 {where}，而这里只管理 "
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
            paths,
        )
        self.paths = paths


class TensorAway(ResidencyError, RuntimeError):
    """A tensor of an engine was used while its bytes were away. Nothing was harmed.

    ``path`` leads to it from the engine; ``released`` says that these bytes do not come back, only a new engine's.
    """

    def __init__(self, path: str, released: bool) -> None:
        if released:
            message = (
                f"{path} was released with its engine and has no bytes any more. Take a new lease (with "
                f"manager.lease(name) as engine) and use the engine that it gives. / "
                f"{path} 已随其引擎释放，不再有数据。请重新获取租约（with manager.lease(name) as engine），"
                f"并使用由此得到的引擎。"
            )
        else:
            message = (
                f"{path} is away: its bytes are not on the device while nobody uses the model. Take a lease and use it "
                f"there: with manager.lease(name) as engine. / "
                f"{path} 的数据当前不在设备上：模型未被使用。请先获取租约，再在租约内使用："
                f"with manager.lease(name) as engine。"
            )
        super().__init__(message, path, released)
        self.path = path
        self.released = released


class CapturedGraphs(ResidencyError):
    """An engine has captured CUDA graphs, which remember addresses on the device: it can be released, not offloaded."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        super().__init__(
            f"The engine has captured CUDA graphs ({', '.join(paths)}), which remember where its weights lie: it "
            f"cannot be offloaded, only released. Build it without them (enable_cuda_graph=False). / "
            f"引擎已捕获 CUDA graph（{'、'.join(paths)}），其中记录了权重的显存地址：只能释放，不能卸载到内存。"
            f"请在构建引擎时关闭它（enable_cuda_graph=False）。",
            paths,
        )
        self.paths = paths


class SnapshotUnusable(ResidencyError):
    """A snapshot cannot be written or read. No reason to fail: the engine is released or loaded the normal way."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"The snapshot of {name!r} cannot be used: {reason}. / {name!r} 的快照无法使用：{reason}。", name, reason
        )
        self.name = name
        self.reason = reason


class InvalidInput(ResidencyError, ValueError):
    """Something a user gave cannot be used; the message says what to give instead, in both languages."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(f"{en} / {zh}", en, zh)
        self.en = en
        self.zh = zh


class NotAllowed(ResidencyError, PermissionError):
    """Somebody asked for what is not for everybody."""

    def __init__(self) -> None:
        super().__init__(
            "Only people on this machine, signed-in users (--auth user:password) and holders of the token "
            "(--control-token, sent as 'Authorization: Bearer TOKEN') may do this. / "
            "只有本机用户、已登录用户（--auth user:password）或持有令牌者（--control-token，"
            "以请求头 'Authorization: Bearer TOKEN' 发送）可以执行此操作。"
        )


class EngineUnavailable(ResidencyError):
    """The speech engine that was asked for is not installed or not where it should be."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(f"{en} / {zh}", en, zh)
        self.en = en
        self.zh = zh
