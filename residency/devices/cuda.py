"""A real GPU, through torch. Its allocator keeps the books; NVML is asked for what others use.

Not yet run on a GPU by this project's own tests: see GPU_MANAGEMENT.md.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..contracts import DeviceKind, Memory, Telemetry
from ..errors import DeviceLost, DeviceOutOfMemory, DeviceUnavailable, OnAnotherDevice

if TYPE_CHECKING:
    import torch

    from ..probes import NvmlProbe


logger = logging.getLogger(__name__)


class CudaDevice:
    """The GPU that torch calls ``cuda`` (device 0 of those visible). No CUDA context before the first load."""

    kind: DeviceKind = "cuda"
    torch_device = "cuda"
    separate = True
    note: dict[str, str] | None = None

    def __init__(self, name: str, probe: NvmlProbe, pinned_limit_bytes: int | None = None) -> None:
        self.name = name
        self._probe = probe
        self._pinned_limit_bytes = pinned_limit_bytes
        self._pinned_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def find(cls, pinned_limit_bytes: int | None = None) -> CudaDevice | None:
        """The first visible GPU, if there is one and the installed torch could use it; never raises."""
        from ..probes import NvmlProbe

        probe = NvmlProbe.find()
        if probe is None or not _torch_has_cuda():
            return None
        return cls(probe.name, probe, pinned_limit_bytes)

    def memory(self) -> Memory:
        return self._probe.memory()

    def held_by(self) -> Mapping[int, int] | None:
        """None unless the driver lists this process: in a container it may tell other process numbers, or none."""
        torch, own = sys.modules.get("torch"), os.getpid()
        held = {pid: nbytes for pid, nbytes in self._probe.holders() if nbytes is not None}
        if own not in held:
            return None
        if torch is not None and torch.cuda.is_initialized():
            held[own] -= torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return held

    def telemetry(self) -> Telemetry:
        return self._probe.telemetry()

    def ensure_usable(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(f"torch {torch.__version__} does not see {self.name}")
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error).partition("\n")[0]) from error

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        if tensor.is_cuda and tensor.device.index != 0:
            raise OnAnotherDevice(str(tensor.device), "cuda:0")  # streams and pools of memory are of one device
        return tensor.is_cuda

    def holds_session(self, providers: Sequence[str]) -> bool:
        return "CUDAExecutionProvider" in providers or "TensorrtExecutionProvider" in providers

    def charge(self, nbytes: int) -> None:
        pass

    def refund(self, nbytes: int) -> None:
        pass

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        import torch

        try:
            storage.resize_(nbytes)
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(nbytes, self.memory().free_bytes, self.name, self._probe.holders()) from error

    def drop(self, storage: torch.UntypedStorage) -> None:
        storage.resize_(0)

    @contextmanager
    def transfer(self) -> Iterator[Any]:
        """Copies on a stream of their own into a pool of their own, so that what is freed leaves no segment behind."""
        import torch

        pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.use_mem_pool(pool), torch.cuda.stream(stream):
                yield pool
        finally:
            stream.synchronize()

    def pin(self, raw: torch.Tensor) -> bool:
        """Registers the pages as they lie (``cudaHostRegister``); within ``pinned_limit_bytes``, else warns once."""
        with self._lock:
            if self._pinned_limit_bytes is not None and self._pinned_bytes + len(raw) > self._pinned_limit_bytes:
                refused = f"the limit of {self._pinned_limit_bytes:,} bytes is reached"
            elif (code := int(_cudart().cudaHostRegister(raw.data_ptr(), len(raw), 0))) != 0:
                refused = f"CUDA error {code}"
            else:
                self._pinned_bytes += len(raw)
                return True
        logger.warning("Main memory is not pinned any further (%s): restores will be slower.", refused)
        return False

    def unpin(self, raw: torch.Tensor) -> None:
        with self._lock:
            _cudart().cudaHostUnregister(raw.data_ptr())
            self._pinned_bytes -= len(raw)

    def settle(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
