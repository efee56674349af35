"""Errors of devices, weights, snapshots and worker processes. Users import them from `residency.errors`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sentences import ResidencyError, Sentence


@dataclass(eq=False, repr=False)
class DeviceOutOfMemory(ResidencyError, MemoryError):
    """A move needed more device memory than available. Nothing was moved.

    ``holders``: processes that use memory of the device, according to the driver: (pid, bytes or None).
    """

    needed_bytes: int
    free_bytes: int | None
    device: str
    holders: tuple[tuple[int, int | None], ...] = ()

    def sentences(self) -> tuple[str, str]:
        name, free = Sentence.of(self.device), self.free_bytes
        held = [(pid, "?" if nbytes is None else f"{nbytes:,}") for pid, nbytes in self.holders]
        held_en = f" (held by {'; '.join(f'pid {pid}: {nbytes}' for pid, nbytes in held)})" if held else ""
        held_zh = f"（{'；'.join(f'进程 {pid}：{nbytes}' for pid, nbytes in held)}）" if held else ""
        return (
            f"{name.en} is out of memory: {self.needed_bytes:,} bytes needed, "
            f"{'unknown' if free is None else f'{free:,}'} free{held_en}. Release another model or "
            f"stop another program on it, then try again.",
            f"{name.zh} 显存不足：需要 {self.needed_bytes:,} 字节，"
            f"可用 {'未知' if free is None else f'{free:,} 字节'}{held_zh}。"
            f"请释放其他模型或停止占用显存的程序后重试。",
        )


class OverBudget(DeviceOutOfMemory):
    """A model needs more than the budget of device memory for all models. Nothing was moved."""

    def __init__(self, needed_bytes: int, free_bytes: int, budget_bytes: int, device: str) -> None:
        name = Sentence.of(device)
        ResidencyError.__init__(
            self,
            f"The budget of {name.en} is {budget_bytes:,} bytes, of which {free_bytes:,} are available, and "
            f"{needed_bytes:,} are needed. Raise it (--gpu-budget, or budget_bytes), or let other models be "
            f"offloaded (models with keep-warm -1 stay).",
            f"{name.zh} 的显存预算为 {budget_bytes:,} 字节，可用 {free_bytes:,}，需要 {needed_bytes:,}。"
            f"请调大预算（--gpu-budget 或 budget_bytes），或让其他模型可以被卸载（keep-warm 为 -1 的模型不会被卸载）。",
            needed_bytes,
            free_bytes,
            budget_bytes,
            device,
        )
        self.needed_bytes, self.free_bytes, self.budget_bytes = needed_bytes, free_bytes, budget_bytes
        self.device, self.holders = device, ()


@dataclass(eq=False, repr=False)
class DeviceUnavailable(ResidencyError):
    """The GPU cannot be used."""

    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (
            f"The GPU cannot be used: {reason.en}. Update its driver or torch, or set CUDA_VISIBLE_DEVICES= (empty) to "
            f"run on the CPU.",
            f"无法使用 GPU：{reason.zh}。请更新驱动或 torch，或设置 CUDA_VISIBLE_DEVICES=（空）改用 CPU。",
        )


class DeviceLost(DeviceUnavailable):
    """Permanent failure of the GPU, or of this process's CUDA context: every later CUDA call fails too."""

    def sentences(self) -> tuple[str, str]:
        return (
            f"The GPU has failed, and this process cannot use it any more: {self.reason}. Restart the app.",
            f"GPU 出现故障，本进程无法再使用它：{self.reason}。请重启应用。",
        )


@dataclass(eq=False, repr=False)
class CaptureUnderWay(ResidencyError, RuntimeError):
    """A move waited too long for another thread's CUDA graph capture on the GPU. Nothing was moved."""

    device: str
    en = (
        "A CUDA graph is being captured on {self.device}; moves wait until it is done, and this one has waited "
        "too long. Try again; if it is never done, restart the app."
    )
    zh = "{self.device} 上正在捕获 CUDA graph，搬移须等待其完成，本次已等待过久。请重试；若始终不结束，请重启应用。"


@dataclass(eq=False, repr=False)
class _OfTensors(ResidencyError):
    """An error of some tensors, by their paths in the engine."""

    paths: tuple[str, ...]

    def sentences(self) -> tuple[str, str]:
        return self.en.format(paths=", ".join(self.paths)), self.zh.format(paths="、".join(self.paths))


class SharedWeights(_OfTensors):
    """A model shares bytes with another managed model; a move of one would move bytes of the other."""

    en = (
        "These parts also belong to another managed model: {paths}. Register both as one model, or exclude them with "
        "skip."
    )
    zh = "以下部分也属于另一个受管理的模型：{paths}。请将两者注册为一个模型，或用 skip 排除它们。"


@dataclass(eq=False, repr=False)
class OnAnotherDevice(ResidencyError):
    """A part of an engine is on a GPU that is not the managed one."""

    where: str
    managed: str
    en = (
        "The engine has a part on {self.where}, and only {self.managed} is managed: place it on one GPU "
        "(--device-map cuda, not auto), or let the process see one (CUDA_VISIBLE_DEVICES=0)."
    )
    zh = (
        "引擎有一部分位于 {self.where}，而这里只管理 {self.managed}：请放在一块 GPU 上"
        "（--device-map cuda，而非 auto），或让进程只看到一块（CUDA_VISIBLE_DEVICES=0）。"
    )


class WeightsGone(_OfTensors):
    """A loader returned an engine that was released before; its tensors are empty."""

    en = (
        "The loader returned an engine whose weights were released: {paths}. Make the loader build a new engine, "
        "or pass parts that must survive a release as keep."
    )
    zh = "加载函数返回了权重已被释放的引擎：{paths}。请让它每次新建引擎，或用 keep 传入需要在释放后保留的部分。"


@dataclass(eq=False, repr=False)
class NotHandedOut(ResidencyError, TypeError):
    """An answer contains an object that cannot be copied and would read the engine's memory after the lease."""

    kind: str
    #: The module of its class, if that is known to the engine's worker process only.
    module: str | None = None

    def sentences(self) -> tuple[str, str]:
        if self.module is not None:
            return (
                f"The engine's answer contains a {self.kind}, a class of the module {self.module}, which only its "
                f"worker process has imported. Import this module here too, or return plain values.",
                f"引擎的返回值含有 {self.kind}，其类所在的模块 {self.module} 只在工作进程中导入过。"
                f"请在本进程中也导入该模块，或返回普通的值。",
            )
        return (
            f"The engine's answer contains a {self.kind}, which cannot be copied and would read memory that leaves "
            f"the device. Use it until the engine leaves: with tts.lease() as engine.",
            f"引擎的返回值含有 {self.kind}，它无法复制，且会读取将离开设备的内存。"
            f"请在 with tts.lease() as engine 中使用。",
        )


@dataclass(eq=False, repr=False)
class PartGone(ResidencyError, ReferenceError):
    """An object that the engine created but did not keep was used after the engine's release."""

    kind: str
    en = "This {self.kind} belongs to an engine that was released. Get a new one from the engine."
    zh = "此 {self.kind} 属于已释放的引擎。请从引擎重新获取。"


@dataclass(eq=False, repr=False)
class TensorAway(ResidencyError, RuntimeError):
    """A tensor of an engine was used while its bytes were not on the device.

    ``path``: its path in the engine. ``released``: the bytes were freed and cannot be restored; a new engine is needed.
    """

    path: str
    released: bool

    def sentences(self) -> tuple[str, str]:
        named = Sentence.of(self.path)
        if self.released:
            return (
                f"{named.en} was released with its engine and has no bytes any more. Take a new lease (with "
                f"manager.lease(name) as engine) and use the engine that it gives.",
                f"{named.zh} 已随其引擎释放，不再有数据。请重新获取租约（with manager.lease(name) as engine），"
                f"并使用由此得到的引擎。",
            )
        return (
            f"{named.en} is not on the device, because no request is using the model. Access it inside a lease: "
            f"with manager.lease(name) as engine.",
            f"{named.zh} 不在设备上，因为没有请求在使用该模型。请在租约内访问：with manager.lease(name) as engine。",
        )


class CapturedGraphs(_OfTensors):
    """An engine has captured CUDA graphs, which contain device addresses: it can be released, not offloaded."""

    en = (
        "The engine has captured CUDA graphs ({paths}), which contain the addresses of its weights: it cannot be "
        "offloaded, only released. Build it without them (enable_cuda_graph=False)."
    )
    zh = (
        "引擎已捕获 CUDA graph（{paths}），其中记录了权重的显存地址：只能释放，不能卸载到内存。"
        "请在构建引擎时关闭它（enable_cuda_graph=False）。"
    )


@dataclass(eq=False, repr=False)
class SnapshotUnusable(ResidencyError):
    """A snapshot cannot be written or read. The engine is then released or loaded without it."""

    name: str
    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (
            f"The snapshot of {self.name!r} cannot be used: {reason.en}.",
            f"{self.name!r} 的快照无法使用：{reason.zh}。",
        )


@dataclass(eq=False, repr=False)
class WorkerEnded(ResidencyError, RuntimeError):
    """A worker process of an engine has ended by itself. The next request loads the engine anew."""

    path: str
    en = (
        "A worker process of {self.path} has ended, and the engine cannot work without it. The next request loads "
        "the engine anew; the reason is in the log above, often that main memory was full."
    )
    zh = (
        "{self.path} 的工作进程已退出，引擎无法继续工作。下一个请求会重新加载引擎；原因请查看此前的日志，"
        "常见原因是内存不足。"
    )


@dataclass(eq=False, repr=False)
class WorkerDied(WorkerEnded):
    """The worker process of a model has ended or was ended, and with it its engine. The next request loads it anew.

    ``path``: name of the model. ``reason``: what is known of the cause, in both languages.
    """

    reason: Sentence

    def sentences(self) -> tuple[str, str]:
        return (
            f"The worker process of {self.path!r} has ended: {self.reason.en}. The next request starts a new one.",
            f"{self.path!r} 的工作进程已结束：{self.reason.zh}。下一个请求会启动新的进程。",
        )


@dataclass(eq=False, repr=False)
class SelfMoveFreedNothing(ResidencyError):
    """An object that moves itself has kept its GPU memory. It is back on the device, and can be released.

    ``remedy``: in English and Chinese, how it must be built; None if unknown.
    """

    path: str
    held_bytes: int
    remedy: tuple[str, str] | None = None

    def sentences(self) -> tuple[str, str]:
        en, zh = self.remedy or ("", "")
        return (
            f"{self.path} did not free its GPU memory: {self.held_bytes:,} bytes. It stays on the GPU until the "
            f"release after the idle timeout." + (f" To free it after each request, {en}." if en else ""),
            f"{self.path} 没有释放显存：{self.held_bytes:,} 字节。它会一直留在 GPU 上，直到空闲超时后被释放。"
            + (f"若要在每次请求后腾出显存，{zh}。" if zh else ""),
        )


@dataclass(eq=False, repr=False)
class SelfMoveFailed(ResidencyError):
    """An object that moves itself has raised an error in doing so."""

    path: str
    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (f"{self.path} cannot be moved: {reason.en}.", f"{self.path} 无法移动：{reason.zh}。")


@dataclass(eq=False, repr=False)
class CheckpointFailed(ResidencyError):
    """The driver could not checkpoint or restore a worker process.

    ``step``: the call that failed; ``start``: the helper process could not be started. ``reason`` includes the state of
    the worker and what to do next.
    """

    pid: int
    step: Literal["start", "lock", "checkpoint", "restore", "unlock"]
    reason: str

    def sentences(self) -> tuple[str, str]:
        reason = Sentence.of(self.reason)
        return (
            f"The driver's checkpoint of worker process {self.pid} failed ({self.step}): {reason.en}.",
            f"驱动对工作进程 {self.pid} 的检查点操作失败（{self.step}）：{reason.zh}。",
        )


@dataclass(eq=False, repr=False)
class RemoteError(ResidencyError):
    """An error of an engine in a worker process whose class cannot be imported here; its fields are attributes."""

    kind: str
    text: str
    en = "{self.kind}: {self.text}"
    zh = "{self.kind}：{self.text}"


class RemoteFrames(Exception):
    """The innermost cause of an error from a worker process: its traceback there. Not an error itself."""

    def __init__(self, frames: str) -> None:
        super().__init__(frames)

    def __str__(self) -> str:
        return f"\nTraceback in the worker process:\n{self.args[0]}"
