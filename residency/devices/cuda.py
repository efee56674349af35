"""Real GPU, through torch: sizes of models from torch's allocator, use by others from NVML.

Tested with a fake CUDA runtime only, not yet on a GPU: see docs/en/verification.md.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..contracts import Device, DeviceKind, Memory, Telemetry
from ..errors import CaptureUnderWay, DeviceLost, DeviceOutOfMemory, DeviceUnavailable, OnAnotherDevice
from ..locks import renewed_in_children
from ..modules import imported
from ..observability.error_classification import is_capture_under_way, is_out_of_device_memory
from ..sentences import Sentence
from .captures import during_captures, is_capturing
from .card_probes import CardProbe, NvmlProbe, NvmlUnavailable, TorchProbe

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

_ANSWERS_WITHIN_S = 5.0
"""Timeout of the health check; a device that is busy for longer counts as usable."""


class CudaDevice(Device):
    """The GPU ``cuda:index`` of torch, by default the first visible one.

    Creates no CUDA context before the first load. Independent of the calling thread's current card.
    """

    kind: DeviceKind = "cuda"
    separate = True
    note: dict[str, str] | None = None

    def __init__(self, name: str, probe: CardProbe, pinned_limit_bytes: int | None = None, index: int = 0) -> None:
        self.name = name
        self.index = index
        self.torch_device = f"cuda:{index}" if index else "cuda"
        self._probe = probe
        self.identity = probe.identity
        self.pinned_limit_bytes = pinned_limit_bytes
        self._pinned_bytes = 0
        # Reentrant: garbage collection may call `unpin` during `pin`.
        self._lock = renewed_in_children(threading.RLock())

    @classmethod
    def find(cls, pinned_limit_bytes: int | None = None) -> CudaDevice | None:
        """Finds the first visible GPU; returns None without one, or if torch cannot use it. Never raises.

        Logs a warning if a GPU seems to be present but is not used. Without NVML, the GPU is used, and its sizes are
        unknown until torch has a CUDA context.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
            return None
        reason = "NVML finds no such GPU"
        probe: CardProbe | None = None
        try:
            probe = NvmlProbe.find(visible)
        except NvmlUnavailable as error:
            reason = f"NVML cannot be asked: {error}"
            if _gpu_files() and _torch_has_cuda():
                logger.warning(
                    "%s. The GPU is used, its memory is unknown before the first load; in a container, add the "
                    "driver's utilities (NVIDIA_DRIVER_CAPABILITIES=compute,utility). / 无法访问 NVML：GPU 仍会使用，"
                    "但首次加载前显存大小未知；在容器中请设置 NVIDIA_DRIVER_CAPABILITIES=compute,utility。",
                    reason,
                )
                probe = TorchProbe()
        if probe is not None and _torch_has_cuda():
            return cls(probe.name, probe, pinned_limit_bytes)
        if probe is not None:
            reason = "the installed torch is a build without CUDA"
        if probe is not None or visible is not None or _gpu_files():
            logger.warning(
                "Running on the CPU although a GPU seems to be there (CUDA_VISIBLE_DEVICES=%s): %s. Check nvidia-smi "
                "and the build of torch, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU. / 检测到可能存在 GPU，"
                "但将使用 CPU：请检查 nvidia-smi 与 torch 版本，或设置 CUDA_VISIBLE_DEVICES=（空）以使用 CPU。",
                "not set" if visible is None else visible,
                reason,
            )
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process finds the same device with a probe of its own; ``pinned_limit_bytes`` holds for each."""
        return _found_again, (self.name, self.pinned_limit_bytes, self.index)

    def memory(self) -> Memory:
        return self._probe.memory()

    def held_by(self) -> Mapping[int, int] | None:
        """Returns None unless the driver lists this process: in a container it may list the host's pids, or none."""
        torch, own = imported("torch"), os.getpid()
        held = {pid: nbytes for pid, nbytes in self._probe.holders() if nbytes is not None}
        if own not in held:
            return None
        if torch is not None and torch.cuda.is_initialized():
            held[own] -= torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return held

    def holders(self) -> Sequence[tuple[int, int | None]]:
        return self._probe.holders()

    def bytes_of(self, pids: Collection[int]) -> int | None:
        held = [nbytes for pid, nbytes in self._probe.holders() if pid in pids]
        # In containers the driver may list the host's pids, or none.
        return sum(filter(None, held)) if held and None not in held else None

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        device_bytes = self.bytes_of(host_bytes)
        return None if device_bytes is None else (device_bytes, sum(host_bytes.values()))

    def telemetry(self) -> Telemetry:
        return self._probe.telemetry()

    def ensure_usable(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                Sentence(
                    f"torch {torch.__version__} does not see {self.name}",
                    f"torch {torch.__version__} 未发现 {self.name}",
                )
            )
        error = self._answer()
        if error is None:
            return
        if is_out_of_device_memory(error):
            raise DeviceOutOfMemory(1, self.memory().free_bytes, self.name, self._probe.holders()) from error
        raise DeviceLost(str(error).partition("\n")[0]) from error

    def is_usable(self) -> bool:
        if not _in_use():
            return True
        error = self._answer()
        return error is None or is_out_of_device_memory(error)

    def _answer(self) -> RuntimeError | None:
        """Runs a health check; returns the error, or None.

        Runs it twice: a harmless error is reported once, the loss of the device by every call. Records an event on
        a new stream, which needs no memory and does not wait for running work or captures.
        """
        found = None
        for _ in range(2):
            try:
                with self._here() as cuda:
                    stream, event = cuda.Stream(priority=-1), cuda.Event()
                    event.record(stream)
                    until_s = time.monotonic() + _ANSWERS_WITHIN_S
                    while not event.query() and time.monotonic() < until_s:
                        time.sleep(0.001)
                return None
            except RuntimeError as error:
                found = error
        return None if is_capture_under_way(found) else found

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        if tensor.is_cuda and tensor.device.index != self.index:
            # Streams and memory pools belong to one device.
            raise OnAnotherDevice(str(tensor.device), f"cuda:{self.index}")
        return tensor.is_cuda

    def holds_session(self, providers: Sequence[str]) -> bool:
        return "CUDAExecutionProvider" in providers or "TensorrtExecutionProvider" in providers

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        import torch

        try:
            torch.UntypedStorage.resize_(storage, nbytes)  # also for a guarded storage
        except RuntimeError as error:
            if not is_out_of_device_memory(error):
                raise
            raise DeviceOutOfMemory(nbytes, self.memory().free_bytes, self.name, self._probe.holders()) from error

    def drop(self, storage: torch.UntypedStorage) -> None:
        import torch

        torch.UntypedStorage.resize_(storage, 0)

    @contextlib.contextmanager
    def placing(self) -> Iterator[Any]:
        """Allocates from a separate pool, so that freed memory leaves no segments."""
        with self._here() as cuda:
            if cuda.get_allocator_backend() == "native":
                pool = cuda.MemPool()
                with cuda.use_mem_pool(pool):
                    yield pool
            else:  # cudaMallocAsync has no such pools, and allocates in stream order
                yield None
                cuda.current_stream().synchronize()

    @contextlib.contextmanager
    def transfer(self) -> Iterator[Any]:
        """Uses a separate stream, so that other models do not wait; high priority, since captures use the default."""
        with self._here() as cuda:
            stream = cuda.Stream(priority=-1)
            try:
                with cuda.stream(stream):
                    yield stream
            finally:
                stream.synchronize()

    def pin(self, raw: torch.Tensor) -> bool:
        """Registers the pages in place (``cudaHostRegister``); returns false, with a warning, beyond the limit."""
        nbytes = len(raw)
        with self._lock:
            if self.pinned_limit_bytes is not None and self._pinned_bytes + nbytes > self.pinned_limit_bytes:
                refused = f"the limit of {self.pinned_limit_bytes:,} bytes is reached"
            else:
                with self._here() as cuda:
                    code = int(cuda.cudart().cudaHostRegister(raw.data_ptr(), nbytes, 0))
                if code == 0:
                    self._pinned_bytes += nbytes
                    return True
                refused = f"CUDA error {code}"
        logger.warning("No more main memory is pinned (%s): restores will be slower.", refused)
        return False

    def unpin(self, raw: torch.Tensor) -> None:
        with self._lock:
            with self._here() as cuda:
                cuda.cudart().cudaHostUnregister(raw.data_ptr())
            self._pinned_bytes -= len(raw)

    def wait(self) -> None:
        """Waits for the whole card, since torch does not record the streams used by an engine.

        Raises `CaptureUnderWay` during the capture of a CUDA graph on the card: CUDA does not allow it.
        """
        if _in_use():
            with self._unless_capturing() as cuda:
                cuda.synchronize()

    def settle(self) -> None:
        """Empties torch's cache, which contains the temporary memory of all engines.

        During a capture, the cache is kept until the next call.
        """
        if not _in_use():
            return
        try:
            with self._unless_capturing() as cuda:
                if cuda.get_allocator_backend() != "native":
                    cuda.synchronize()  # cudaMallocAsync frees in the order of streams
                cuda.empty_cache()
        except CaptureUnderWay:
            logger.info("A CUDA graph is being captured: cached memory is returned to the driver at the next move.")

    @contextlib.contextmanager
    def _unless_capturing(self) -> Iterator[Any]:
        """Like `_here`; raises `CaptureUnderWay` if the card captures a CUDA graph."""
        with self._here() as cuda:
            if is_capturing(self.index):
                raise CaptureUnderWay(self.name)
            try:
                yield cuda
            except RuntimeError as error:
                if not is_capture_under_way(error):
                    raise
                # The capture began just now, or is not on a stream of torch.
                raise CaptureUnderWay(self.name) from error

    @contextlib.contextmanager
    def _here(self) -> Iterator[Any]:
        """Yields ``torch.cuda`` with the managed card as current device, also during captures by other threads."""
        import torch

        with torch.cuda.device(self.index), during_captures():
            yield torch.cuda


def _in_use() -> bool:
    """Returns whether torch has initialized CUDA in this process."""
    torch = imported("torch")
    return torch is not None and torch.cuda.is_initialized()


def _gpu_files() -> list[str]:
    """Returns the driver's GPU device files, of Linux and of WSL2."""
    return glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/dxg")


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _found_again(name: str, pinned_limit_bytes: int | None, index: int) -> CudaDevice:
    found = CudaDevice.find(pinned_limit_bytes)
    if found is None:
        raise DeviceUnavailable(Sentence(f"the worker process does not see {name}", f"工作进程未发现 {name}"))
    return CudaDevice(name, found._probe, pinned_limit_bytes, index)
