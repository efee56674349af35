"""A real GPU, through torch. Its allocator keeps the books; NVML is asked for what others use.

Not yet run on a GPU by this project's own tests: see GPU_MANAGEMENT.md.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contracts import DeviceKind, Memory, Probe
from ..errors import DeviceOutOfMemory, DeviceUnavailable

if TYPE_CHECKING:
    import torch


class CudaDevice:
    """The GPU that torch calls ``cuda`` (device 0 of those visible). No CUDA context before the first load."""

    kind: DeviceKind = "cuda"
    torch_device = "cuda"
    separate = True
    note: dict[str, str] | None = None

    def __init__(self, name: str, probe: Probe) -> None:
        self.name = name
        self._probe = probe

    @classmethod
    def find(cls) -> CudaDevice | None:
        """The first visible GPU, if there is one and the installed torch could use it; never raises."""
        from ..probes import NvmlProbe

        probe = NvmlProbe.find()
        if probe is None or not _torch_has_cuda():
            return None
        return cls(probe.name, probe)

    def memory(self) -> Memory:
        return self._probe.memory()

    def ensure_usable(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(f"torch {torch.__version__} does not see {self.name}")

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
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
            raise DeviceOutOfMemory(nbytes, self.memory().free_bytes, self.name) from error

    def drop(self, storage: torch.UntypedStorage) -> None:
        storage.resize_(0)

    def settle(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
