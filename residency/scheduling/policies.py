"""Durations and policies for idle models. Pure: no clock, no locks."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..contracts import Policy
from ..errors import InvalidInput
from .adaptive import AdaptivePolicy

T = TypeVar("T")

logger = logging.getLogger(__name__)

AUTO = "auto"
NEVER = math.inf
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_KEEP_ALIVE_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SPAN = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
_LONGEST_S = 100_000 * 3600.0
"""Eleven years: a longer duration is a mistake."""


def seconds(value: float | str, endless: tuple[str, str] = ("never", "永不")) -> float:
    """Parses a duration: a number of seconds, ``90s``, ``15m`` or ``1h``; ``-1`` is `math.inf`.

    ``endless``: the meaning of -1 in the error message, in English and Chinese. Raises `InvalidInput` for other values,
    including other negative numbers and NaN.
    """
    given_s = value if isinstance(value, int | float) else math.nan
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)|-1(?:\.0)?|inf", str(value).strip().lower()):
        if not match[1]:
            return NEVER
        given_s = float(match[1]) * _UNITS_S[match[2]]
    if 0 <= given_s <= _LONGEST_S:
        return float(given_s)
    if given_s > _LONGEST_S:
        raise _too_long(value, endless)
    raise InvalidInput(
        f"{value!r} is not a valid duration: give seconds or 90s, 15m, 1h; -1 means {endless[0]}",
        f"{value!r} 不是有效的时长：请写秒数，或 90s、15m、1h；-1 表示{endless[1]}",
    )


def keep_alive_seconds(value: float | str) -> float:
    """Parses Ollama's ``keep_alive``: how long a model stays on the device after one request.

    Seconds (``300``, ``"300"``), or spans as in Go: ``"300ms"``, ``"5m"``, ``"1h30m"``. Negative values are `math.inf`:
    until another request ends or the model is offloaded. Raises `InvalidInput` for other values, including
    NaN and bools.
    """
    given_s = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if isinstance(value, str):
        text = value.strip().lower()
        text = f"{text}s" if re.fullmatch(r"[+-]?[0-9.]+", text) else text
        if re.fullmatch(f"[+-]?({_SPAN})+", text):
            given_s = sum(float(count) * _KEEP_ALIVE_UNITS_S[unit] for count, unit in re.findall(_SPAN, text))
            given_s = -given_s if text[0] == "-" else given_s
    if given_s < 0 or value == NEVER:
        return NEVER
    if given_s <= _LONGEST_S:
        return abs(float(given_s))
    if given_s > _LONGEST_S:
        raise _too_long(value, ("no limit", "无限期"))
    raise InvalidInput(
        f"{value!r:.40} is not a valid keep_alive: give seconds, or 300ms, 90s, 5m, 1h30m; 0: leave at once; "
        f"-1: until another request ends or the model is offloaded",
        f"{value!r:.40} 不是有效的 keep_alive：请写秒数，或 300ms、90s、5m、1h30m；0 表示立即离开，"
        f"-1 表示直到另一个请求结束或模型被卸载",
    )


def _too_long(value: float | str, endless: tuple[str, str]) -> InvalidInput:
    return InvalidInput(
        f"{value!r:.40} is too long: give at most 100000h, or -1 for {endless[0]}",
        f"{value!r:.40} 太长：最长为 100000h；-1 表示{endless[1]}",
    )


@dataclass(frozen=True)
class FixedPolicy:
    """Keeps a model on the device ``keep_warm_s`` after the last lease, in host memory until ``idle_timeout_s``."""

    keep_warm_s: float = 0.0
    idle_timeout_s: float = 600.0
    name: str = field(default="fixed", init=False)

    def windows(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, self.keep_warm_s),)

    def idle_ended(self, idle_s: float) -> None:
        """Does nothing."""

    def brought_back(self, seconds: float) -> None:
        """Does nothing."""

    def with_idle_timeout(self, idle_timeout_s: float) -> FixedPolicy:
        return replace(self, idle_timeout_s=idle_timeout_s)


class GuardedPolicy:
    """A user's policy. After its first error or invalid result, which is logged, a `FixedPolicy` replaces it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def name(self) -> str:
        return self._ask(lambda policy: policy.name)

    @property
    def keep_warm_s(self) -> float:
        return self._ask(lambda policy: _duration(policy.keep_warm_s))

    @property
    def idle_timeout_s(self) -> float:
        return self._ask(lambda policy: _duration(policy.idle_timeout_s))

    def windows(self) -> tuple[tuple[float, float], ...]:
        return self._ask(lambda policy: _in_order(policy.windows()))

    def idle_ended(self, idle_s: float) -> None:
        self._ask(lambda policy: policy.idle_ended(idle_s))

    def brought_back(self, seconds: float) -> None:
        self._ask(lambda policy: policy.brought_back(seconds))

    def with_idle_timeout(self, idle_timeout_s: float) -> GuardedPolicy:
        return GuardedPolicy(self._ask(lambda policy: policy.with_idle_timeout(idle_timeout_s)))

    def _ask(self, ask: Callable[[Policy], T]) -> T:
        try:
            return ask(self._policy)
        except Exception:
            instead = FixedPolicy()
            logger.exception("The policy %r failed; %r takes its place", self._policy, instead)
            self._policy = instead
            return ask(instead)


def _duration(value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{value!r} is not a valid duration")
    return float(value)


def _in_order(windows: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    edges_s = [edge_s for from_s, until_s in windows for edge_s in (from_s, until_s)]
    if not edges_s or edges_s[0] != 0 or any(not earlier <= later for earlier, later in pairwise(edges_s)):
        raise ValueError(f"windows() answered {windows!r}: they begin at 0, and are in order and apart")
    return windows


def keep_warm_seconds(value: float | str) -> float | Literal["auto"]:
    """Parses a duration or ``auto``; raises `InvalidInput` for other values."""
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return "auto"
    try:
        return seconds(value, ("always", "始终保留"))
    except InvalidInput as error:
        raise InvalidInput(f"{error.en}; or auto, which learns it", f"{error.zh}；也可写 auto（自动学习）") from None


def make_policy(keep_warm: float | str, idle_timeout: float | str) -> Policy:
    """Returns the policy of a keep-warm duration or ``"auto"``, and an idle timeout; raises `InvalidInput`."""
    warm_s, idle_timeout_s = keep_warm_seconds(keep_warm), seconds(idle_timeout)
    return AdaptivePolicy(idle_timeout_s) if warm_s == AUTO else FixedPolicy(float(warm_s), idle_timeout_s)


def policy_for(
    policy: Policy | None, keep_warm: float | str | None, idle_timeout: float | str | None, defaults: Mapping[str, Any]
) -> Policy:
    """Returns the policy of a new model: its own, or one of two durations. Raises `InvalidInput` if both are given."""
    if policy is None:
        return make_policy(
            defaults["keep_warm"] if keep_warm is None else keep_warm,
            defaults["idle_timeout"] if idle_timeout is None else idle_timeout,
        )
    if not isinstance(policy, Policy):
        raise InvalidInput(
            f"policy={policy!r} lacks members of residency.contracts.Policy; for durations and 'auto' use keep_warm",
            f"policy={policy!r} 未实现 residency.contracts.Policy 的全部成员；时长与 'auto' 请用 keep_warm",
        )
    if keep_warm is not None or idle_timeout is not None:
        raise InvalidInput(
            "A policy decides instead of keep_warm and idle_timeout: leave those out",
            "policy 会取代 keep_warm 与 idle_timeout：请不要同时给出",
        )
    return policy if type(policy) in (FixedPolicy, AdaptivePolicy) else GuardedPolicy(policy)


def comparable(**settings: object) -> dict[str, object]:
    """Normalises a manager's settings: ``"5m"`` is 300.0."""
    parse: dict[str, Callable[[Any], Any]] = {
        "keep_warm": keep_warm_seconds, "idle_timeout": seconds, "wait_timeout": seconds, "snapshot_dir": Path
    }  # fmt: skip
    return {name: parse[name](value) if name in parse and value is not None else value
            for name, value in settings.items()}  # fmt: skip


def change_policy(present: Policy, keep_warm: float | str | None, idle_timeout: float | str | None) -> Policy:
    """Returns a policy with other settings; None keeps the one of ``present``.

    What was learned is kept if only the idle timeout changes, and if ``"auto"`` was already set.
    """
    if keep_warm is None or (keep_warm == AUTO and isinstance(present, AdaptivePolicy)):
        return present if idle_timeout is None else present.with_idle_timeout(seconds(idle_timeout))
    return make_policy(keep_warm, present.idle_timeout_s if idle_timeout is None else idle_timeout)


def check_counts(least: int, **counts: object) -> None:
    """Raises `InvalidInput` unless each count is None or a whole number of at least ``least``."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidInput(
                f"{name}={value!r} is not a whole number of at least {least}: give one, or None",
                f"{name}={value!r} 不是 {least} 以上的整数：请给出整数或 None",
            )
