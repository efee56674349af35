from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from worker_engines import Engine, Gate

from gpu_manager import GPUResourceManager, SimulatedDevice
from tts_gpu_managed import GPUManagedTTS

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def isolated() -> Iterator[GPUResourceManager]:
    """A manager of worker processes, for a module: its fork server takes a second to start."""
    with GPUResourceManager(SimulatedDevice(1 << 30), isolation="process", keep_warm=-1) as manager:
        yield manager


@pytest.fixture
def new_gate(tmp_path: Path) -> Iterator[Callable[[], Gate]]:
    """Makes gates in a folder of the test."""
    with ExitStack() as made:

        def make() -> Gate:
            gate = Gate(tmp_path, f"gate-{next(_numbers)}")
            made.callback(gate.free)
            return gate

        yield make


@pytest.fixture
def gate(new_gate: Callable[[], Gate]) -> Gate:
    return new_gate()


@pytest.fixture
def tts(isolated: GPUResourceManager) -> Iterator[GPUManagedTTS]:
    """An engine in a worker process."""
    engine = GPUManagedTTS(None, manager=isolated, load=Engine, name=f"tts-{next(_numbers)}")
    yield engine
    engine.close()


@pytest.fixture
def another(isolated: GPUResourceManager) -> Iterator[Callable[..., GPUManagedTTS]]:
    """Makes further engines in worker processes."""
    with ExitStack() as made:

        def make(load: Callable[[], Any] = Engine, **settings: Any) -> GPUManagedTTS:
            engine = GPUManagedTTS(None, manager=isolated, load=load, name=f"tts-{next(_numbers)}", **settings)
            made.callback(engine.close)
            return engine

        yield make
