"""How long an idle model stays where it is. Pure: no clock, no locks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from .adaptive import AdaptivePolicy
from .contracts import Policy
from .errors import InvalidInput

AUTO = "auto"
NEVER = math.inf
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 100_000 * 3600.0
"""Who writes more than these eleven years has mistyped, or means never."""


def seconds(value: float | str) -> float:
    """Read a duration: a number of seconds, ``90s``, ``15m`` or ``1h``; ``-1`` is never (`math.inf`).

    Raises `InvalidInput` for anything else (other negative numbers and NaN included).
    """
    if isinstance(value, int | float) and 0 <= value <= _LONGEST_S:
        return float(value)
    text = str(value).strip().lower()
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([smh]?)", text)
    if text in ("inf", "-1", "-1.0"):
        return NEVER
    if match and not match[1].startswith("-"):
        given_s = float(match[1]) * _UNITS_S[match[2]]
        if given_s <= _LONGEST_S:
            return given_s
        raise InvalidInput(
            f"{value!r} is too long: give at most 100000h, or -1 for never",
            f"{value!r} 太长：最长为 100000h；-1 表示永不",
        )
    raise InvalidInput(
        f"{value!r} is no duration: give seconds or 90s, 15m, 1h; -1 means never",
        f"{value!r} 不是有效的时长：请写秒数，或 90s、15m、1h；-1 表示永不",
    )


@dataclass(frozen=True)
class FixedPolicy:
    """Stay on the device ``keep_warm_s`` after the last lease, in host memory until ``idle_timeout_s``."""

    keep_warm_s: float = 0.0
    idle_timeout_s: float = 600.0
    name: str = field(default="fixed", init=False)

    def windows(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, self.keep_warm_s),)

    def idle_ended(self, idle_s: float) -> None:
        """Nothing is learned from it."""

    def brought_back(self, seconds: float) -> None:
        """Nothing is learned from it."""


def make_policy(keep_warm: float | str, idle_timeout: float | str) -> Policy:
    """The policy for what a user asked: a duration or ``"auto"``, and a duration. `InvalidInput` for anything else."""
    if keep_warm == AUTO:
        return AdaptivePolicy(seconds(idle_timeout))
    return FixedPolicy(seconds(keep_warm), seconds(idle_timeout))


def change_policy(present: Policy, keep_warm: float | str | None, idle_timeout: float | str | None) -> Policy:
    """A policy with other settings; None is as in ``present``, and what ``auto`` has learned is kept."""
    idle_timeout_s = present.idle_timeout_s if idle_timeout is None else seconds(idle_timeout)
    if isinstance(present, AdaptivePolicy) and keep_warm in (None, AUTO):
        return present.with_idle_timeout(idle_timeout_s)
    return make_policy(present.keep_warm_s if keep_warm is None else keep_warm, idle_timeout_s)


def check_counts(least: int, **counts: object) -> None:
    """`InvalidInput` for what is neither None nor a whole number of at least ``least``."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidInput(
                f"{name}={value!r} is no whole number from {least} on: give one, or None",
                f"{name}={value!r} 不是 {least} 以上的整数：请给出整数或 None",
            )
