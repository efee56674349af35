"""Measurement of one move: seconds, and peak memory of host and device."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from residency.contracts import Device
from residency.devices import CudaDevice, SimulatedDevice


@dataclass
class Row:
    """One measurement. Sizes in bytes; None if not applicable to the device.

    Attributes:
        nbytes: size of the move.
        host_extra: peak main memory during it, minus the use before it.
        host_peak, host_after: total main memory, minus the use of the process before any weights.
        device_peak: peak reserved on the device, likewise.
        allocated_after, reserved_after: of torch's allocator (or the simulated card's ledger) at the end.
    """

    name: str
    nbytes: int
    seconds: float
    host_extra: int
    host_peak: int
    host_after: int
    device_peak: int | None
    allocated_after: int | None
    reserved_after: int | None


class Ledger(SimulatedDevice):
    """Simulated card that records its peak use."""

    peak_bytes = 0

    def charge(self, nbytes: int) -> None:
        super().charge(nbytes)
        self.peak_bytes = max(self.peak_bytes, self.ledger_bytes)


class Meter:
    """Recorder of rows, for a dedicated process. Create it before any weights.

    Bytes of a simulated card are in main memory, too; they are subtracted from host values by its ledger.
    """

    def __init__(self, device: Device) -> None:
        self.rows: list[Row] = []
        self._ledger = device if isinstance(device, Ledger) else None
        self._cuda = isinstance(device, CudaDevice)
        self._base = self._resident()
        self._reserved_base, self._allocated_base = self._reserved(), self._allocated()

    @contextlib.contextmanager
    def measure(self, name: str, nbytes: int, arriving: int = 0) -> Iterator[None]:
        """Records a row for the block. ``arriving``: bytes that it allocates in main memory if there is no card."""
        before, on_ledger = self._resident(), self._on_ledger()
        if self._cuda:
            _cuda().synchronize()
            _cuda().reset_peak_memory_stats()
        if self._ledger:
            self._ledger.peak_bytes = on_ledger
        with PeakOfHost() as peak:
            start = time.perf_counter()
            yield
            if self._cuda:
                _cuda().synchronize()
            seconds = time.perf_counter() - start
        at_peak = max(on_ledger, self._on_ledger())
        self.rows.append(
            Row(
                name,
                nbytes,
                seconds,
                host_extra=max(0, peak.nbytes - before - (at_peak - on_ledger) - arriving),
                host_peak=max(0, peak.nbytes - self._base - at_peak - arriving),
                host_after=max(0, self._resident() - self._base - self._on_ledger() - arriving),
                device_peak=self._device_peak(),
                allocated_after=self._ledger.ledger_bytes if self._ledger else self._allocated(self._allocated_base),
                reserved_after=self._reserved(self._reserved_base),
            )
        )

    def _resident(self) -> int:
        if self._ledger:  # returns freed bytes of the simulated card, cached by malloc
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
        return resident_bytes()

    def _on_ledger(self) -> int:
        return self._ledger.ledger_bytes if self._ledger else 0

    def _allocated(self, base: int | None = 0) -> int | None:
        return int(_cuda().memory_allocated()) - (base or 0) if self._cuda else None

    def _reserved(self, base: int | None = 0) -> int | None:
        return int(_cuda().memory_reserved()) - (base or 0) if self._cuda else None

    def _device_peak(self) -> int | None:
        if self._ledger:
            return self._ledger.peak_bytes
        return int(_cuda().max_memory_reserved()) - (self._reserved_base or 0) if self._cuda else None


class PeakOfHost:
    """Peak resident main memory of a ``with`` block, as ``nbytes``.

    Linux records the peak, and it can be reset; on other systems a thread samples every millisecond.
    """

    nbytes = 0

    def __enter__(self) -> PeakOfHost:
        self._exact = _reset_peak()
        self._over = threading.Event()
        if not self._exact:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._exact:
            self._over.set()
            self._thread.join()
        self.nbytes = max(self.nbytes, resident_bytes(), _status("VmHWM") if self._exact else 0)

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.nbytes = max(self.nbytes, resident_bytes())


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmHWM") < resident_bytes() + (1 << 20)
    except (OSError, StopIteration):
        return False


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def _cuda() -> Any:
    import torch

    return torch.cuda
