"""Loads engines in worker processes: what a manager with process isolation uses in place of a plain load."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, get_args

from ..contracts import Device, ProcessCheckpoints
from ..devices import SimulatedDevice
from ..devices.observed import ObservedDevice
from ..devices.simulated_checkpoints import SimulatedCheckpoints
from ..errors import InvalidInput, LoadTimeout, WorkerDied
from ..memory import Resident
from ..memory.self_moving import registered
from ..random_state import RandomState
from ..sentences import Sentence
from .calls import Load, Setup
from .checkpoints import DriverCheckpoints
from .logs import levels
from .messages import pickled
from .process import HANGS_AFTER_S, KILLED_WITHIN_S, WorkerProcess
from .remote_engine import RemoteEngine
from .resident import WorkerResident
from .residue import ProcessResidue
from .spawner import Spawner, check_system
from .torch_settings import torch_settings

logger = logging.getLogger(__name__)


IsolationMode = Literal["none", "process"]

Residue = Literal["keep", "checkpoint", "auto"]
"""What becomes of the memory that an offloaded worker holds beyond its weights; ``auto``: checkpointed if possible."""


def isolation_for(mode: IsolationMode, device: Device, snapshot_dir: object, residue: Residue) -> Isolation | None:
    """Returns the isolation of a manager; None for ``none``. Raises `InvalidInput`."""
    for name, value, known in (("isolation", mode, IsolationMode), ("residue", residue, Residue)):
        if value not in get_args(known):
            *first, last = get_args(known)
            raise InvalidInput(
                f"{name} is {', '.join(first)} or {last}, not {value!r}",
                f"{name} 只能是 {'、'.join(first)} 或 {last}，而不是 {value!r}",
            )
    if mode == "none" and residue == "checkpoint":
        raise InvalidInput(
            '--gpu-residue checkpoint (residue="checkpoint") needs --gpu-isolation process (isolation="process"): '
            "add it, or use auto",
            '--gpu-residue checkpoint（residue="checkpoint"）需要 --gpu-isolation process（isolation="process"）：'
            "请加上它，或使用 auto",
        )
    if mode == "none":
        return None
    if snapshot_dir is not None:
        raise InvalidInput(
            "With process isolation a release ends the engine's process, so that no snapshot can be loaded into it: "
            "leave out --gpu-snapshot-dir (snapshot_dir), or use --gpu-isolation none",
            "使用进程隔离时，释放会结束引擎的进程，快照无法再加载到其中："
            "请去掉 --gpu-snapshot-dir（snapshot_dir），或使用 --gpu-isolation none",
        )
    return Isolation(device, _checkpoints(residue, device))


def _checkpoints(residue: Residue, device: Device) -> ProcessCheckpoints | None:
    """Returns the checkpoints of processes on a device; None without. Raises `InvalidInput` if they are required."""
    if residue == "keep":
        return None
    checkpoints: ProcessCheckpoints | None = None
    if isinstance(device, SimulatedDevice):
        checkpoints = SimulatedCheckpoints(device)
    elif device.kind == "cuda":
        checkpoints = DriverCheckpoints()
    missing = _NO_CARD if checkpoints is None else checkpoints.unavailable()
    if missing is None:
        return checkpoints
    if residue == "checkpoint":
        reason = Sentence.of(missing)
        raise InvalidInput(
            f"Worker processes cannot be checkpointed: {reason.en}. Or use --gpu-residue auto",
            f"无法为工作进程创建检查点：{reason.zh}。或使用 --gpu-residue auto",
        )
    if checkpoints is not None:
        logger.info("The CUDA context of an offloaded worker process stays on the device: %s", missing)
    return None


_NO_CARD = Sentence("the models run on the CPU", "模型在 CPU 上运行")


class Isolation:
    """Starts a worker process for each load.

    Only the workers use ``device``; ``observed`` is the manager's view of it.
    """

    def __init__(
        self, device: Device, checkpoints: ProcessCheckpoints | None = None, hangs_after_s: float = HANGS_AFTER_S
    ) -> None:
        check_system()
        self._device = device
        self._checkpoints = checkpoints
        self.observed = ObservedDevice(device)
        #: The workers in which models are being loaded, by name.
        self.loading: dict[str, WorkerProcess] = {}
        self._hangs_after_s = hangs_after_s
        self._spawner = Spawner()
        self._spawner.start()
        threading.Thread(target=_import_torch, name="gpu-import-torch", daemon=True).start()

    def loader(
        self, name: str, load: Callable[[], Any], skip: tuple[str, ...], timeout_s: float, keep: Any
    ) -> Callable[[], RemoteEngine]:
        """Returns a loader that builds the engine of ``load`` in a worker; see `GPUResourceManager.register`."""
        if keep is not None:
            raise InvalidInput(
                "A model in a worker process cannot use an object of this process (keep, or a ready audio_tokenizer): "
                'pass a function that builds it, or use isolation="none"',
                "工作进程中的模型无法使用本进程中的对象（keep，或已创建的 audio_tokenizer）："
                '请传入创建它的函数，或使用 isolation="none"',
            )
        _check_loader(name, load)
        random_state = RandomState()

        def start() -> RemoteEngine:
            _check_loader(name, load)  # by now it may refer to more
            return self._start(Load(name, load, self._device, skip, random_state), timeout_s)

        return start

    def _start(self, ask: Load, timeout_s: float) -> RemoteEngine:
        """Starts a worker and loads an engine there. After an error, the worker has ended."""
        worker = WorkerProcess(ask.name, self._spawner, self._hangs_after_s)
        too_long = Sentence("its load took too long", "加载时间过长")
        timer = threading.Timer(min(timeout_s, threading.TIMEOUT_MAX), worker.kill, [too_long])
        timer.daemon = True
        self.loading[ask.name] = worker
        try:
            timer.start()
            worker.ask(_setup())
            worker.ask(ask)
        except BaseException as error:
            worker.kill(Sentence("its load failed", "加载失败"))
            worker.finish(KILLED_WITHIN_S)
            if isinstance(error, WorkerDied) and error.reason == too_long:
                raise LoadTimeout(ask.name, timeout_s) from None
            raise
        finally:
            timer.cancel()
            if self.loading.get(ask.name) is worker:
                del self.loading[ask.name]
        return RemoteEngine(worker)

    def adopt(
        self, engine: RemoteEngine, device: Device, managed: Any, ended: Callable[[Any], object] = id
    ) -> Resident:
        """Returns the memory of an engine of a worker; see `residency.memory.adopt`.

        ``ended`` is called with ``managed``, in another thread, if the worker ends.
        """
        engine._worker.on_end = partial(ended, managed)
        worker, checkpoints = engine._worker, self._checkpoints
        return WorkerResident(worker, ProcessResidue(worker, checkpoints, device) if checkpoints else None)

    def close(self) -> None:
        """Ends the fork server, and with it all workers. Idempotent."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._spawner.close()


def _check_loader(name: str, load: Callable[[], Any]) -> None:
    """Raises `InvalidInput` for a loader that cannot be sent to a worker."""
    try:
        pickled(load)
    except Exception as error:
        raise InvalidInput(
            f"The loader of {name!r} cannot be sent to a worker process ({error}): let it refer to nothing that "
            f'belongs to this process (locks, files, models), or use isolation="none"',
            f"{name!r} 的加载函数无法发送到工作进程（{error}）：请不要让它引用属于本进程的对象（锁、文件、模型），"
            f'或使用 isolation="none"',
        ) from error


def _setup() -> Setup:
    return Setup(
        dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv), levels(), dict(registered), torch_settings()
    )


def _import_torch() -> None:
    """Results contain tensors; the import takes seconds, which the first request need not wait for."""
    with suppress(ImportError):
        import torch  # noqa: F401
