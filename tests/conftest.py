from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime leaves a file in the temporary folder otherwise
# Threads of torch that wait for each other keep their cores busy, and other tests need these: without this, tests of an
# engine take four times the CPU time. Programs that tests start get it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fakes import Workshop
from markers import is_slow, marks_of

import gpu_manager
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.clock import ManualClock
from residency.observability.outside_memory import NO_SAMPLE

#: HYPOTHESIS_PROFILE=nightly: as many examples as a night has room for.
settings.register_profile("nightly", max_examples=10_000, deadline=None)
#: HYPOTHESIS_PROFILE=mutation: the same examples each time, and a failure is enough: it need not be small.
settings.register_profile("mutation", derandomize=True, database=None, deadline=None, phases=[Phase.generate])
if profile := os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile(profile)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow files out before they are imported, where ``scripts/test --quick`` leaves their tests out."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests, and run the slowest kinds first: a long file that begins last would keep one core at work."""
    marks = {item: marks_of(item.path, item.module, item.fixturenames) for item in items}
    for item in items:
        for mark in marks[item]:
            item.add_marker(mark)
    slowest = {path: max(len(marks[item]) for item in items if item.path == path) for path in {i.path for i in items}}
    items.sort(key=lambda item: -slowest[item.path])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and os.environ.get("HYPOTHESIS_PROFILE") == "mutation":
        os._exit(1)  # what a broken manager leaves behind may keep the test's end waiting


@pytest.fixture(autouse=True, scope="module")
def swift_collections() -> None:
    """Garbage collections within a test need not look at the hundreds of thousands of objects of other modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def unmeasured() -> Iterator[None]:
    """Managers do not measure this process and its children, where that is not what is tested.

    At the end of each move it costs milliseconds, with a browser or a server of forks among the children several
    times as much as the move of a fake model. `test_outside_memory` tests it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_manager, "sample", lambda device, trim=True, look_at_children=True: NO_SAMPLE)
        yield


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a recording in which somebody speaks."""
    hibari = pytest.importorskip("hibari")
    path = str(tmp_path_factory.mktemp("recording") / "prompt.wav")
    hibari.Hibari().save("Good morning, this is a short recording of my voice.", path, seed=1)
    return path


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(capacity_bytes=1 << 30)


@pytest.fixture
def manager(clock: ManualClock, workshop: Workshop, device: SimulatedDevice) -> Iterator[GPUResourceManager]:
    """A manager with fake residents and a hand-turned clock; ``tts`` is registered from the workshop."""
    with GPUResourceManager(device, clock=clock, adopt=workshop.adopt) as manager:
        manager.register("tts", workshop.load)
        yield manager
