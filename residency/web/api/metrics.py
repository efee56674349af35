"""Exports the manager's status and history as Prometheus metrics, computed on each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..shared.protocols import Manager

OUTCOMES = ("ok", "error", "timeout", "busy", "cancelled", "refused", "failed")
MOVES = (("released", "gpu"), ("gpu", "cpu"), ("cpu", "gpu"), ("cpu", "released"), ("gpu", "released"))
MOVES_HERE = (("released", "cpu"), ("cpu", "released"))
"""Moves if device and host share one memory."""
STATES = ("gpu", "cpu", "released", "moving")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


_OF_ONE_MODEL = (
    ("device_bytes", "device_bytes", "GPU memory of the model."),
    ("host_bytes", "host_bytes", "Main memory of the model."),
    ("running_requests", "leases", "Requests that use the model now."),
    ("waiting_requests", "waiting", "Requests that wait for the model."),
    ("outside_bytes", "outside_bytes", "Memory that the model uses and no move frees."),
)
"""Metric, field of `ModelStatus`, and description."""
_OF_ONE_WORKER = (
    ("worker_device_bytes", "device_bytes", "GPU memory of the model's worker process; 0 without one."),
    ("worker_context_bytes", "context_bytes", "GPU memory of the worker process beyond the model."),
)
"""The same for `WorkerStatus`."""
_HISTOGRAMS = (
    ("move_seconds", "Duration of moves."),
    ("request_wait_seconds", "Time from a request until it had the model."),
)


def exposition(manager: Manager) -> bytes:
    """Returns all metrics in Prometheus's text format; sizes in bytes, times in seconds. Omits unknown values."""
    return generate_latest(_Collector(manager))


def families(manager: Manager) -> Iterator[Metric]:
    """Returns the same as objects."""
    return _Collector(manager).collect()


class _Collector(Collector):
    def __init__(self, manager: Manager) -> None:
        self._status, self._history = manager.status(), manager.history()["models"]

    def collect(self) -> Iterator[Metric]:
        device, host = self._status["device"], self._status["host"]
        models = self._status["models"]
        for name, help_text, value in (
            ("gpu_free_bytes", "Unused memory of the GPU.", device["free_bytes"]),
            ("gpu_total_bytes", "Memory of the GPU.", device["total_bytes"]),
            ("process_gpu_bytes", "GPU memory of this process.", device["process_bytes"]),
            ("gpu_outside_bytes", "GPU memory that models use and no move frees.", device["outside_bytes"]),
            ("host_outside_bytes", "Main memory that models use and no move frees.", host["outside_bytes"]),
            ("gpu_power_watts", "Power that the GPU draws.", device["power_w"]),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"gpu_manager_{name}", help_text, value)
        states = GaugeMetricFamily(
            "gpu_manager_model_state", "1 for the state of the model, 0 for the others.", labels=("model", "state")
        )
        for name, model in models.items():
            for state in STATES:
                states.add_metric((name, state), model["state"] == state)
        yield states
        if (energy_wh := device["energy_wh"]) is not None:
            yield CounterMetricFamily("gpu_manager_gpu_watt_hours", "Energy that the GPU has drawn.", energy_wh)
        for metric, field, help_text in _OF_ONE_MODEL:
            gauge = GaugeMetricFamily(f"gpu_manager_{metric}", help_text, labels=("model",))
            for name, model in models.items():
                if (value := model[field]) is not None:  # type: ignore[literal-required]
                    gauge.add_metric((name,), value)
            yield gauge
        if (sharing := self._status["sharing"]) is not None:
            yield CounterMetricFamily(
                "gpu_manager_yields", "Times that models left the GPU for other processes.", sharing["yields"]
            )
            waiting = sum(not move["claimed"] for move in sharing["queue"])
            yield GaugeMetricFamily(
                "gpu_manager_room_waiting", "Moves and processes that wait for GPU memory.", waiting
            )
        yield from self._workers()
        yield from self._past()

    def _workers(self) -> Iterator[Metric]:
        isolated = self._status["isolation"] == "process"
        for metric, field, help_text in _OF_ONE_WORKER:
            gauge = GaugeMetricFamily(f"gpu_manager_{metric}", help_text, labels=("model",))
            for name, model in self._status["models"].items():
                worker = model["worker"]
                value = worker[field] if worker else 0  # type: ignore[literal-required]
                if isolated and value is not None:
                    gauge.add_metric((name,), value)
            yield gauge

    def _past(self) -> Iterator[Metric]:
        moves = CounterMetricFamily("gpu_manager_moves", "Ended moves.", labels=("model", "from", "to", "outcome"))
        requests = CounterMetricFamily("gpu_manager_requests", "Ended requests.", labels=("model", "outcome"))
        given_back = CounterMetricFamily(
            "gpu_manager_given_back_byte_hours", "Size of the model minus its GPU memory, by time.", labels=("model",)
        )
        histograms = {
            name: HistogramMetricFamily(f"gpu_manager_{name}", help_text, labels=("model",))
            for name, help_text in _HISTOGRAMS
        }
        possible = MOVES_HERE if self._status["device"]["kind"] == "cpu" else MOVES
        for name, past in self._history.items():
            totals = past["totals"]
            # Includes counts of 0, since Prometheus detects no increase in a series that begins with 1.
            counts = {(*ends, outcome): 0 for ends in possible for outcome in ("ok", "failed")}
            counts |= {(move["from"], move["to"], move["outcome"]): move["count"] for move in totals["moves"]}
            for labels, count in counts.items():
                moves.add_metric((name, *labels), count)
            for outcome, count in (dict.fromkeys(OUTCOMES, 0) | totals["requests"]).items():
                requests.add_metric((name, outcome), count)
            if (byte_hours := totals["given_back_byte_hours"]) is not None:
                given_back.add_metric((name,), byte_hours)
            for metric, histogram in histograms.items():
                measured = totals[metric]  # type: ignore[literal-required]
                buckets = [(str(bound), float(count)) for bound, count in measured["buckets"]]
                histogram.add_metric((name,), buckets, measured["sum"])
        yield from (*histograms.values(), moves, requests, given_back)
