from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime leaves a file in the temporary folder otherwise

from fakes import Workshop

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


#: Marked ``slow``, which `scripts/test --quick` leaves out: apps, browsers and other processes, engines that compute,
#: and campaigns of random lives.
SLOW = (
    "test_gpu_management.py", "tests/benchmarks", "tests/browser", "tests/engines/test_asr.py",
    "tests/engines/test_builtin.py", "tests/engines/test_edits.py", "tests/engines/test_miniature.py",
    "tests/engines/test_step_audio.py", "tests/engines/test_voice.py", "tests/gpu", "tests/residents/test_every_use.py",
    "tests/residents/test_snapshot_disk.py", "tests/residents/test_weights.py", "tests/scenarios", "tests/scripts",
    "tests/test_app.py", "tests/test_cancelled_jobs.py", "tests/test_documents.py", "tests/test_examples.py",
    "tests/test_faults.py", "tests/test_forking.py", "tests/test_hosts.py", "tests/test_interleavings.py",
    "tests/test_interrupts.py", "tests/test_logins.py", "tests/test_machine.py", "tests/test_malformed.py",
    "tests/test_proxies.py", "tests/test_safety.py", "tests/test_shutdown.py", "tests/test_step_audio_app.py",
    "tests/upstream", "tests/web/test_siege.py", "tests/web/test_subpath.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [Path(__file__).parents[1] / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker("slow")


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
    times as much as the move of a fake model. `test_outside` tests it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_manager, "sample", lambda device, trim=True, look_at_children=True: NO_SAMPLE)
        yield


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
