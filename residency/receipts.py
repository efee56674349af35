"""Receipts: how long a request waited for its model, and why. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from .sentences import Sentence
from .status_types import LastWait

_ARRIVALS = {
    "load": ("loading the model", "加载模型"),
    "restore": ("the model's return to the GPU", "模型恢复到显存"),
}
_OTHERS = ("other requests or moves", "其他请求或搬移")

Waited = tuple[float, Literal["load", "restore"] | None, float]
"""``waited_s``, ``move`` and ``move_s`` of a `Receipt`, which each lease records, since a tuple costs less."""


@dataclass(frozen=True)
class Receipt:
    """How long a request waited for its model, in seconds of the manager's clock.

    ``waited_s``, from its entry into the model's queue until it had the model, is ``queue_s + move_s``. ``move_s``: of
    that, the time in which the model was loaded or restored; ``move``: which of the two, the last one if there were
    several; None if the model was on the device. ``queue_s``: the rest, for requests before it, room on the device, and
    offloads.
    """

    waited_s: float
    queue_s: float
    move: Literal["load", "restore"] | None
    move_s: float

    @classmethod
    def of(cls, waited: Waited) -> Receipt:
        waited_s, move, move_s = waited
        return cls(waited_s, max(0.0, waited_s - move_s), move, move_s)

    def sentence(self) -> Sentence:
        """Returns it as a sentence without a full stop, in English and Chinese."""
        parts = [(self.move_s, *_ARRIVALS[self.move])] if self.move else []
        if round(self.queue_s, 3):
            parts.append((self.queue_s, *_OTHERS))
        if not parts:
            return Sentence("the model was ready", "模型已就绪")
        waited = _seconds(self.waited_s)
        if len(parts) == 1:
            return Sentence(f"waited {waited} s for {parts[0][1]}", f"等待 {waited} 秒：{parts[0][2]}")
        return Sentence(
            f"waited {waited} s: " + ", ".join(f"{_seconds(part_s)} s for {en}" for part_s, en, _ in parts),
            f"等待 {waited} 秒：" + "，".join(f"{zh} {_seconds(part_s)} 秒" for part_s, _, zh in parts),
        )

    def as_dict(self) -> LastWait:
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}  # type: ignore[return-value]


def _seconds(seconds: float) -> str:
    return f"{round(seconds, 1 if seconds >= 1 else 3):g}"
