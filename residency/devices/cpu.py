"""Machine without a GPU: device and host share one memory, so weights do not move and only release frees memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..contracts import DeviceKind, Memory, Telemetry

if TYPE_CHECKING:
    import torch


class CpuDevice:
    """Main memory as the device. `allocate` and `drop` are never called."""

    kind: DeviceKind = "cpu"
    name = "CPU"
    torch_device = "cpu"
    separate = False
    note: dict[str, str] | None = {  # noqa: RUF012 - never changed
        "en": "No GPU here: models run in main memory. Offload saves nothing; release frees main memory.",
        "zh": "本机没有 GPU：模型在内存中运行。卸载不会节省任何资源；释放可以腾出内存。",
    }

    def memory(self) -> Memory:
        return Memory()

    def held_by(self) -> Mapping[int, int] | None:
        return {}

    def worker_bytes(self, host_bytes: Mapping[int, int], awake: bool) -> tuple[int, int] | None:
        return 0, sum(host_bytes.values())

    def telemetry(self) -> Telemetry:
        return Telemetry()

    def ensure_usable(self) -> None:
        pass

    def is_usable(self) -> bool:
        return True

    def holds_tensor(self, tensor: torch.Tensor) -> bool:
        return False

    def holds_session(self, providers: Sequence[str]) -> bool:
        return False

    def charge(self, nbytes: int) -> None:
        pass

    def refund(self, nbytes: int) -> None:
        pass

    def allocate(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        raise AssertionError("the CPU holds nothing that could be moved")

    def drop(self, storage: torch.UntypedStorage) -> None:
        raise AssertionError("the CPU holds nothing that could be moved")

    def placing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def transfer(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def pin(self, raw: torch.Tensor) -> bool:
        return False

    def unpin(self, raw: torch.Tensor) -> None:
        pass

    def wait(self) -> None:
        pass

    def settle(self) -> None:
        pass
