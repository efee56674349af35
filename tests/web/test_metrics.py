from __future__ import annotations

import pytest
from fakes import Workshop
from prometheus_client.parser import text_string_to_metric_families

from gpu_manager import CpuDevice, GPUResourceManager
from residency.clock import ManualClock
from residency.contracts import Telemetry
from residency.web.api.metrics import exposition


def samples(manager: GPUResourceManager) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus reads."""
    families = text_string_to_metric_families(exposition(manager).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"gpu_manager_{name}", frozenset(({"model": "tts"} | labels).items())


def test_what_has_happened_is_counted(manager: GPUResourceManager) -> None:
    for _ in range(2):
        with manager.lease("tts"):
            pass
    seen = samples(manager)
    assert seen[key("requests_total", outcome="ok")] == 2
    assert seen[key("moves_total", **{"from": "released", "to": "gpu", "outcome": "ok"})] == 1
    assert seen[key("moves_total", **{"from": "gpu", "to": "cpu", "outcome": "ok"})] == 2
    assert seen[key("move_seconds_count")] == 4
    assert seen[key("move_seconds_bucket", le="+Inf")] == 4
    assert seen[key("request_wait_seconds_count")] == 2


def test_what_has_not_happened_yet_is_zero(manager: GPUResourceManager) -> None:
    seen = samples(manager)
    assert seen[key("requests_total", outcome="timeout")] == 0
    assert seen[key("moves_total", **{"from": "cpu", "to": "gpu", "outcome": "failed"})] == 0


def test_what_is_now_is_shown(manager: GPUResourceManager, workshop: Workshop) -> None:
    with manager.lease("tts"):
        seen = samples(manager)
        assert seen[key("model_state", state="gpu")] == 1
        assert seen[key("model_state", state="cpu")] == 0
        assert seen[key("device_bytes")] == workshop.nbytes
        assert seen[key("running_requests")] == 1
        free_bytes = seen["gpu_manager_gpu_free_bytes", frozenset()]
    assert samples(manager)[key("device_bytes")] == 0
    assert samples(manager)[key("host_bytes")] == workshop.nbytes
    assert free_bytes <= samples(manager)["gpu_manager_gpu_free_bytes", frozenset()]


def test_what_nobody_knows_is_left_out() -> None:
    with GPUResourceManager(CpuDevice()) as manager:
        assert not {name for name, _ in samples(manager)} & {
            "gpu_manager_gpu_free_bytes",
            "gpu_manager_gpu_power_watts",
        }


def test_what_was_given_back_is_a_counter(manager: GPUResourceManager, workshop: Workshop, clock: ManualClock) -> None:
    assert samples(manager)[key("given_back_byte_hours_total")] == 0
    with manager.lease("tts"):
        pass
    clock.advance(1800)
    assert samples(manager)[key("given_back_byte_hours_total")] == workshop.nbytes / 2
    with GPUResourceManager(CpuDevice(), adopt=workshop.adopt) as on_cpu:
        on_cpu.register("tts", workshop.load)
        assert key("given_back_byte_hours_total") not in samples(on_cpu)


def test_the_energy_of_the_card_is_a_counter_if_it_is_known(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [name for name, _ in samples(manager) if "watt" in name]
    monkeypatch.setattr(manager.device, "telemetry", lambda: Telemetry(None, 60.0, 12.5))
    assert samples(manager)["gpu_manager_gpu_watt_hours_total", frozenset()] == 12.5


def test_workers_have_sizes_of_their_own(manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name, _ in samples(manager) if "worker" in name], "not without isolation"
    status = manager.status()
    status["isolation"] = "process"
    status["models"]["tts"]["worker"] = {
        "pid": 7, "device_bytes": 900, "host_bytes": 5, "context_bytes": 400, "checkpointed": False,
        "last_offload": None,
    }  # fmt: skip
    monkeypatch.setattr(manager, "status", lambda: status)
    assert samples(manager)[key("worker_device_bytes")] == 900
    assert samples(manager)[key("worker_context_bytes")] == 400
    status["models"]["tts"]["worker"].update(device_bytes=None, context_bytes=None)
    assert not [name for name, _ in samples(manager) if "worker" in name], "unknown"
    status["models"]["tts"]["worker"] = None
    assert samples(manager)[key("worker_device_bytes")] == samples(manager)[key("worker_context_bytes")] == 0
