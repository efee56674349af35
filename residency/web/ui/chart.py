"""Draws the GPU memory of the last minutes as SVG. Pure.

Needs no chart library or script, and shows requests below the memory, which Gradio's charts cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from ...status_types import UsageHistory
from ...units import readable_bytes
from ..shared.language import Localize
from . import status_text

_WIDTH, _HEIGHT, _STRIP = 600.0, 100.0, 8.0
_CARD = ""
"""Key for the total use of the card, beside the models' names."""

_Heights = list[tuple[float, dict[str, float]]]


def chart(history: UsageHistory, device_kind: str, localize: Localize) -> str:
    """Returns the chart as HTML: used memory of the card, stacked models in front of it, a mark below per request."""
    window_s, models = float(history["window_s"]), history["models"]
    heights = _changes({name: past["device_bytes"] for name, past in models.items()})
    used = _changes({_CARD: history["device"]["used_bytes"]})
    peak_bytes = round(max((sum(sizes.values()) for _, sizes in heights), default=0))
    peak_used_bytes = max((sizes[_CARD] for _, sizes in used), default=0)
    top_bytes = scale_top(max(peak_bytes, peak_used_bytes), history["device"]["total_bytes"])

    def x(ago_s: float) -> float:
        return _WIDTH * (1 - min(ago_s, window_s) / window_s)

    areas = [f"<path d='{_area(used, [_CARD], x, top_bytes)}' data-part='card' />"] if used else []
    areas += [
        f"<path d='{_area(heights, list(models)[: number + 1], x, top_bytes)}' data-part='model-{number % 4}' />"
        for number in reversed(range(len(models)))
    ]
    marks = "".join(
        f"<rect x='{x(from_s):.1f}' y='{_HEIGHT + 2:g}' width='{max(1.5, x(to_s) - x(from_s)):.1f}' "
        f"height='{_STRIP:g}' />"
        for past in models.values()
        for from_s, to_s in past["requests"]
    )
    requests = sum(len(past["requests"]) for past in models.values())
    lines = "".join(f"<line x2='{_WIDTH:g}' y1='{y:g}' y2='{y:g}' />" for y in (0, _HEIGHT / 2, _HEIGHT))
    scale = "".join(f"<span>{readable_bytes(round(top_bytes * part))}</span>" for part in (1, 0.5, 0))
    title = status_text.memory_title(device_kind, window_s, localize)
    window = status_text.readable_seconds(window_s)
    peak = f"{localize('模型峰值', 'peak of the models')} {readable_bytes(peak_bytes)}"
    return (
        f"<figure class='gpu-chart' data-requests='{requests}' data-peak='{peak_bytes}' data-top='{round(top_bytes)}'>"
        f"<figcaption class='gpu-quiet'><span>{title} · {peak}</span>{_legend(list(models), bool(used), localize)}"
        f"</figcaption><div class='gpu-plot'><div><svg viewBox='0 0 {_WIDTH:g} {_HEIGHT + _STRIP + 2:g}' "
        f"preserveAspectRatio='none' role='img' aria-label='{title}'><g class='gpu-grid'>{lines}</g>{''.join(areas)}"
        f"<g class='gpu-request'>{marks}</g></svg><div class='gpu-axis gpu-quiet'><span>-{window}</span>"
        f"<span>{localize('现在', 'now')}</span></div></div>"
        f"<div class='gpu-scale gpu-quiet'>{scale}</div></div></figure>"
    )


def scale_top(peak_bytes: float, total_bytes: int | None) -> float:
    """Returns the top of the scale: a size whose half is round too, at most the card's size."""
    top_bytes, by = 1024.0, 1.5
    while top_bytes < peak_bytes * 1.05:
        top_bytes, by = top_bytes * by, 2 / by
    return min(top_bytes, total_bytes) if total_bytes else top_bytes


def _legend(models: list[str], card: bool, localize: Localize) -> str:
    entries = [f"<span data-part='model-{number % 4}'>{escape(name)}</span>" for number, name in enumerate(models)]
    if card:
        entries.append(f"<span data-part='card'>{localize('整卡已用', 'Used on the card')}</span>")
    entries.append(f"<span><i class='gpu-request'></i>{localize('请求', 'Requests')}</span>")
    return f"<span class='gpu-legend'>{''.join(entries)}</span>"


def _changes(points: dict[str, list[list[float]]]) -> _Heights:
    """Returns (seconds ago, all sizes from then on) for each change of a size, the oldest first."""
    changes = sorted(
        ((ago_s, name, nbytes) for name, changes in points.items() for ago_s, nbytes in changes),
        key=lambda change: -change[0],
    )
    sizes: dict[str, float] = {}
    heights = []
    for ago_s, name, nbytes in changes:
        sizes = {**sizes, name: nbytes}
        heights.append((ago_s, sizes))
    return heights


def _area(heights: _Heights, names: list[str], x: Callable[[float], float], top_bytes: float) -> str:
    """Returns the SVG path of the summed sizes of ``names``: steps, closed at the axis."""
    if not heights:
        return ""
    path, level = [f"M{x(heights[0][0]):.1f} {_HEIGHT:g}"], _HEIGHT
    for ago_s, sizes in heights:
        across = x(ago_s)
        height = _HEIGHT * (1 - sum(sizes.get(name, 0) for name in names) / top_bytes)
        path.append(f"L{across:.1f} {level:.1f}L{across:.1f} {height:.1f}")
        level = height
    return "".join([*path, f"L{_WIDTH:g} {level:.1f}L{_WIDTH:g} {_HEIGHT:g}Z"])
