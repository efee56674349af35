"""The part of ``torch.cuda`` that `CudaDevice` uses, with two cards, for machines without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from residency.devices import captures


class FakeCuda:
    """Logs each call with the current card. ``fail`` is called at each, and may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.initialized = True
        self.available = True
        self.backend = "native"
        self.current = 0
        self.captured: set[int] = set()
        self.calls: list[tuple[str, int]] = []
        self.modes = [0]
        self.fail: Callable[[str], None] = lambda call: None
        self.busy = False
        self.on_stream: int | None = None
        self.given_streams = 0
        replaced: dict[str, Any] = {
            "is_initialized": lambda: self.initialized, "is_available": lambda: self.available, "device": self.device,
            "Stream": self.Stream, "Event": self.Event, "stream": self.stream, "MemPool": self.mem_pool,
            "use_mem_pool": self.use_mem_pool, "get_allocator_backend": lambda: self.backend,
            "synchronize": lambda: self.log("synchronize"), "empty_cache": lambda: self.log("empty_cache"),
            "is_current_stream_capturing": lambda: self.on_stream in self.captured,
            "current_stream": lambda: self.Stream(), "cudart": lambda: self,
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(captures, "_cudart", lambda: self)
        captures._streams.cache_clear()

    def log(self, call: str) -> None:
        self.calls.append((call, self.current))
        self.fail(call)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def Stream(self, device: int | None = None, priority: int = 0) -> FakeStream:
        self.log("Stream")
        self.given_streams += 1
        return FakeStream(self, self.given_streams % 32)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.on_stream = self.on_stream, stream.number
        try:
            yield
        finally:
            self.on_stream = before

    def Event(self) -> FakeCuda:
        return self

    def record(self, stream: FakeStream) -> None:
        self.log("record")

    def query(self) -> bool:
        self.log("query")
        return not self.busy

    def mem_pool(self) -> str:
        self.log("MemPool")
        if self.backend != "native":
            raise RuntimeError("cudaMallocAsync does not yet support createOrIncrefPool")
        return "a pool"

    @contextmanager
    def use_mem_pool(self, pool: str) -> Iterator[None]:
        self.log("use_mem_pool")
        yield

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.log("register")
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.log("unregister")
        return 0

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.modes.append(mode._obj.value)
        mode._obj.value = self.modes[-2]
        return 0


class FakeStream:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def synchronize(self) -> None:
        self.cuda.log("stream.synchronize")
