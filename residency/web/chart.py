"""What models held of the GPU in the last minutes, as a picture. Pure.

Drawn here and not by a chart library: it is a few hundred bytes that need no script, and shows what those in Gradio do
not: the requests, beside the memory that they took.
"""

from __future__ import annotations

from html import escape
from typing import Any

from ..units import readable_bytes
from .language import Say

_WIDTH, _HEIGHT, _STRIP = 600.0, 100.0, 8.0


def chart(history: dict[str, Any], say: Say) -> str:
    """Sizes one upon the other, and below them a mark for each time in which requests ran."""
    window_s, models = float(history["window_s"]), history["models"]
    heights = _stacked({name: past["device_bytes"] for name, past in models.items()})
    peak_bytes = max((sum(sizes.values()) for _, sizes in heights), default=0)
    top_bytes = peak_bytes * 1.15 or 1.0

    def x(ago_s: float) -> float:
        return _WIDTH * (1 - min(ago_s, window_s) / window_s)

    areas = "".join(
        f"<path d='{_area(heights, list(models)[: number + 1], x, top_bytes)}' data-part='model-{number % 4}' />"
        for number in reversed(range(len(models)))
    )
    marks = "".join(
        f"<rect x='{x(from_s):.1f}' y='{_HEIGHT + 2:g}' width='{max(1.5, x(to_s) - x(from_s)):.1f}' "
        f"height='{_STRIP:g}' />"
        for past in models.values()
        for from_s, to_s in past["requests"]
    )
    requests = sum(len(past["requests"]) for past in models.values())
    names = "".join(f"<span data-part='model-{number % 4}'>{escape(name)}</span>" for number, name in enumerate(models))
    title = say("最近 15 分钟的显存", "GPU memory in the last 15 minutes")
    return (
        f"<figure class='gpu-chart' data-requests='{requests}' data-peak='{peak_bytes}'>"
        f"<figcaption class='gpu-quiet'><span>{title} · {say('峰值', 'peak')} {readable_bytes(peak_bytes)}</span>"
        f"<span class='gpu-legend'>{names}<span><i class='gpu-request'></i>{say('请求', 'Requests')}</span></span>"
        f"</figcaption><svg viewBox='0 0 {_WIDTH:g} {_HEIGHT + _STRIP + 2:g}' preserveAspectRatio='none' role='img' "
        f"aria-label='{title}'>{areas}<g class='gpu-request'>{marks}</g></svg>"
        f"<div class='gpu-axis gpu-quiet'><span>-15 min</span><span>{say('现在', 'now')}</span></div></figure>"
    )


def _stacked(points: dict[str, list[Any]]) -> list[tuple[float, dict[str, int]]]:
    """At each time at which a size changed, the oldest first: seconds ago, and the sizes of all models from then on."""
    changes = sorted(
        ((ago_s, name, nbytes) for name, changes in points.items() for ago_s, nbytes in changes),
        key=lambda change: -change[0],
    )
    sizes: dict[str, int] = {}
    heights = []
    for ago_s, name, nbytes in changes:
        sizes = {**sizes, name: nbytes}
        heights.append((ago_s, sizes))
    return heights


def _area(heights: list[tuple[float, dict[str, int]]], names: list[str], x: Any, top_bytes: float) -> str:
    """The outline of what these models held together: steps, from the axis and back to it."""
    path, level = [f"M0 {_HEIGHT:g}"], _HEIGHT
    for ago_s, sizes in heights:
        across = x(ago_s)
        height = _HEIGHT * (1 - sum(sizes.get(name, 0) for name in names) / top_bytes)
        path.append(f"L{across:.1f} {level:.1f}L{across:.1f} {height:.1f}")
        level = height
    return "".join([*path, f"L{_WIDTH:g} {level:.1f}L{_WIDTH:g} {_HEIGHT:g}Z"])
