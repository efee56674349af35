"""Exports the manager's status and history as Prometheus metrics, computed on each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ...status_types import ModelStatus
from ..shared.protocols import Manager

OUTCOMES = ("ok", "error", "timeout", "busy", "cancelled", "refused", "failed")
MOVES = (("released", "gpu"), ("gpu", "cpu"), ("cpu", "gpu"), ("cpu", "released"), ("gpu", "released"))
MOVES_HERE = (("released", "cpu"), ("cpu", "released"))
"""Moves if device and host share one memory."""
STATES = ("gpu", "cpu", "released", "moving")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(manager: Manager) -> bytes:
    """Returns all metrics in Prometheus's text format; sizes in bytes, times in seconds."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Books(manager))
    return generate_latest(registry)


class _Books:
    def __init__(self, manager: Manager) -> None:
        self._status, self._history = manager.status(), manager.history()["models"]

    def collect(self) -> Iterator[Metric]:
        device, host, models = self._status["device"], self._status["host"], self._status["models"]
        for name, help_text, value in (
            ("gpu_free_bytes", "Memory of the GPU that nobody uses.", device["free_bytes"]),
            ("gpu_total_bytes", "Memory of the GPU.", device["total_bytes"]),
            ("process_gpu_bytes", "Memory of the GPU that this process holds.", device["process_bytes"]),
            ("gpu_outside_bytes", "Memory of the GPU that models hold beyond the books.", device["outside_bytes"]),
            ("host_outside_bytes", "Main memory that models hold beyond the books.", host["outside_bytes"]),
            ("gpu_power_watts", "What the GPU draws.", device["power_w"]),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"gpu_manager_{name}", help_text, value)
        yield self._gauge(
            "model_state", "1 for the state that the model is in, 0 for the others.", ("model", "state"),
            (((of, state), model["state"] == state) for of, model in models.items() for state in STATES),
        )  # fmt: skip
        for name, help_text, values in (
            ("device_bytes", "What the model holds of the GPU's memory.", self._each(lambda of: of["device_bytes"])),
            ("host_bytes", "What the model holds of main memory.", self._each(lambda of: of["host_bytes"])),
            ("running_requests", "Requests that use the model now.", self._each(lambda of: of["leases"])),
            ("waiting_requests", "Requests that wait for the model.", self._each(lambda of: of["waiting"])),
            ("outside_bytes", "Held by the process and its children beyond the books.",
             self._each(lambda of: of["outside_bytes"])),
        ):  # fmt: skip
            yield self._gauge(name, help_text, ("model",), values)
        yield self._histogram("move_seconds", "How long moves took.")
        yield self._histogram("request_wait_seconds", "How long requests waited until they had the model.")
        moves = CounterMetricFamily(
            "gpu_manager_moves", "Moves that have ended.", labels=("model", "from", "to", "outcome")
        )
        requests = CounterMetricFamily("gpu_manager_requests", "Requests that have ended.", labels=("model", "outcome"))
        for name, past in self._history.items():
            # Includes counts of 0, since Prometheus detects no increase in a series that begins with 1.
            possible = MOVES_HERE if device["kind"] == "cpu" else MOVES
            counts = {(*ends, outcome): 0 for ends in possible for outcome in ("ok", "failed")}
            for move in past["totals"]["moves"]:
                counts[move["from"], move["to"], move["outcome"]] = move["count"]
            for labels, count in counts.items():
                moves.add_metric((name, *labels), count)
            for outcome, count in (dict.fromkeys(OUTCOMES, 0) | past["totals"]["requests"]).items():
                requests.add_metric((name, outcome), count)
        yield moves
        yield requests

    def _each(self, value: Callable[[ModelStatus], float | None]) -> Iterator[tuple[tuple[str], float]]:
        """Yields the value of each model for which it is known."""
        for name, model in self._status["models"].items():
            if (known := value(model)) is not None:
                yield (name,), known

    def _gauge(
        self, name: str, help_text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
    ) -> Metric:
        gauge = GaugeMetricFamily(f"gpu_manager_{name}", help_text, labels=labels)
        for of, value in values:
            gauge.add_metric(of, value)
        return gauge

    def _histogram(self, name: Literal["move_seconds", "request_wait_seconds"], help_text: str) -> Metric:
        histogram = HistogramMetricFamily(f"gpu_manager_{name}", help_text, labels=("model",))
        for model, past in self._history.items():
            measured = past["totals"][name]
            histogram.add_metric(
                (model,), [(str(bound), float(count)) for bound, count in measured["buckets"]], measured["sum"]
            )
        return histogram
