"""Tables of medians of all repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._children import Job
from ._meter import Row

GB, MB = 1 << 30, 1 << 20
_HEAD = ("bytes", "seconds", "GB/s", "of limit", "host +MB", "device MB", "after: allocated/reserved")
_WIDTH = 45


@dataclass
class Line:
    """All repetitions of one row, or the reason for their absence."""

    name: str
    limit: str | None = None
    rows: list[Row] = field(default_factory=list)
    reason: str | None = None

    @property
    def nbytes(self) -> int:
        return self.rows[-1].nbytes

    @property
    def seconds(self) -> float:
        return statistics.median(row.seconds for row in self.rows)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds

    def most(self, what: str) -> int | None:
        """Returns the maximum of a field of `Row` over all repetitions; None if unknown."""
        values = [getattr(row, what) for row in self.rows]
        return max((value for value in values if value is not None), default=None)

    def as_json(self, lines: Mapping[str, Line]) -> dict[str, Any]:
        if not self.rows:
            return {"name": self.name, "reason": self.reason}
        return {
            "name": self.name, "bytes": self.nbytes, "seconds": self.seconds, "of_limit": of_limit(self, lines),
            "all_seconds": [row.seconds for row in self.rows],
            **{what: self.most(what) for what in ("host_extra", "host_peak", "host_after", "device_peak",
                                                  "allocated_after", "reserved_after")},
        }  # fmt: skip


def lines_of(jobs: Iterable[Job]) -> dict[str, Line]:
    lines = {}
    for job in jobs:
        for index, name in enumerate(job.names):
            lines[name] = Line(name, job.limits[index] if index < len(job.limits) else None)
    return lines


def of_limit(line: Line, lines: Mapping[str, Line]) -> float | None:
    limit = lines.get(line.limit or "")
    return line.rate / limit.rate if limit and limit.rows and line.rows and limit is not line else None


def print_table(title: str, lines: Mapping[str, Line]) -> None:
    print(
        f"\n{title}\n" + f"{'':{_WIDTH}}{_HEAD[0]:>15}" + "".join(f"{head:>10}" for head in _HEAD[1:6]), f" {_HEAD[6]}"
    )
    for line in lines.values():
        if not line.rows:
            print(f"{line.name:{_WIDTH}}  {line.reason}")
            continue
        ratio = of_limit(line, lines)
        print(
            f"{line.name:{_WIDTH}}{line.nbytes:15,}{line.seconds:10.4f}{line.rate / GB:10.2f}"
            f"{'' if ratio is None else f'{ratio:.2f}':>10}{_mb(line.most('host_extra')):>10}"
            f"{_mb(line.most('device_peak')):>10}"
            f"  {_mb(line.most('allocated_after'))}/{_mb(line.most('reserved_after'))}"
        )


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / MB:,.0f}"
