"""The manager's metrics through Ray, whose agent on each machine exports them for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import Metric
from ray.util import metrics as ray_metrics

from ..web.api.metrics import families
from ..web.shared.protocols import Manager


class RayMetrics:
    """The metrics of one replica: counters and gauges of ``/metrics``; of histograms their count and sum.

    Ray adds labels for the replica and its machine. Not thread-safe.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._series: dict[str, Any] = {}
        self._counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def update(self) -> None:
        """Passes the current values on."""
        for family in families(self._manager):
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                self._pass_on(family, sample.name, dict(sample.labels), float(sample.value))

    def _pass_on(self, family: Metric, name: str, labels: dict[str, str], value: float) -> None:
        kind = ray_metrics.Gauge if family.type == "gauge" else ray_metrics.Counter
        # Ray adds the suffix of counters itself.
        name = name.removesuffix("_total")
        if name not in self._series:
            self._series[name] = kind(name, description=family.documentation, tag_keys=tuple(labels))
        if kind is ray_metrics.Gauge:
            self._series[name].set(value, tags=labels)
            return
        key = (name, tuple(labels.items()))
        before = self._counted.get(key, 0.0)
        self._counted[key] = value
        if increase := value - before if value >= before else value:  # less: it has begun at 0 again
            self._series[name].inc(increase, tags=labels)
