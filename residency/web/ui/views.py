"""Formats the status as HTML pieces of the page. Pure; escapes all external text.

Running times are ``<time data-s data-way>``, which the page counts up or down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape

from ...status_types import ListedMove, ModelStatus, Status, UsageHistory
from ...units import readable_bytes, readable_rate
from ..shared.language import Localize, bracketed, mark
from . import status_text, worker_text

SHOWN_MOVES = 8
_WIDTH, _HEIGHT, _STRIP = 600.0, 100.0, 8.0
_CARD = ""
"""Key for the total use of the card, beside the models' names."""

_Heights = list[tuple[float, dict[str, float]]]

_REST = {
    "context": worker_text.CONTEXT,
    "outside": ("未受管理的显存", "Unmanaged memory"),
    "process": ("本进程其他", "This process, other"),
    "peers": ("同类进程", "Peers"),
    "others": ("其他进程", "Others"),
    "free": ("可用", "Free"),
}
_KEEP_WARM, _IDLE_TIMEOUT = ("保持在 GPU", "Keep warm"), ("空闲多久后释放", "Idle timeout")
_COLUMNS = (
    ("多久前", "Ago"), ("模型", "Model"), ("搬移", "Move"), ("大小", "Size"), ("用时", "Took"), ("速度", "Rate"),
)  # fmt: skip
_OUTCOMES = {"failed": ("失败", "failed"), "postponed": ("等待空间", "waits for room")}


def device_html(status: Status, localize: Localize) -> str:
    """Returns the card's name, the use of its memory, notes and problems."""
    device = status["device"]
    name = escape(status_text.device_name(device, localize))
    usage = f"<span class='gpu-quiet'>{status_text.usage(device, localize)}</span>"
    parts = [f"<div class='gpu-device'><b data-device='{device['kind']}'>{name}</b>{usage}</div>"]
    bars, legend = "", ""
    for part, model, nbytes in memory_parts(status):
        bars += f"<i data-part='{part}' style='width:{100 * nbytes / (device['total_bytes'] or 1):.2f}%'></i>"
        if nbytes or part not in _REST or part == "free":
            label = localize(*_REST[part]) if part in _REST else model
            legend += f"<span data-part='{part}'>{escape(label)} {readable_bytes(nbytes)}</span>"
    if bars:
        parts.append(f"<div class='gpu-bar gpu-parts'>{bars}</div><div class='gpu-legend gpu-quiet'>{legend}</div>")
    parts.append(f"<div class='gpu-quiet' data-gpu-host>{escape(status_text.main_memory(status, localize))}</div>")
    parts += [_line(note) for note in status_text.notes(device, localize)]
    return "".join([*parts, *(_line(trouble, "error") for trouble in status_text.trouble(status, localize))])


def memory_parts(status: Status) -> list[tuple[str, str, int]]:
    """Returns the parts of the card's memory as (part, name, bytes); empty if its size is unknown.

    The models by name, then ``context`` (of their worker processes), ``outside`` (of models, beyond recorded sizes),
    ``process``, ``peers``, ``others`` and ``free``. Memory of unknown owners counts as ``others``.
    """
    device = status["device"]
    if not device["total_bytes"] or device["free_bytes"] is None:
        return []
    left = device["total_bytes"] - device["free_bytes"]
    held = on_the_card(status)
    context_bytes = sum(_context(model, held[name]) for name, model in status["models"].items())
    rest = {
        "context": context_bytes,
        "outside": device["outside_bytes"] or 0,
        "process": (device["process_bytes"] or 0) - _outside_here(status) - context_bytes,
        "peers": device["peers_bytes"] or 0,
        "others": left,
    }
    parts = []
    for number, name in enumerate(status["models"]):
        parts.append((f"model-{number % 4}", name, min(left, held[name])))
        rest["process"] -= parts[-1][2]
        left -= parts[-1][2]
    for part, nbytes in rest.items():
        parts.append((part, "", max(0, min(left, nbytes))))
        left -= parts[-1][2]
    return [*parts, ("free", "", device["free_bytes"])]


def on_the_card(status: Status) -> dict[str, int]:
    """Returns bytes on the device by model, including the arrived bytes of current moves.

    Recorded sizes include a move only after its end. Until then, estimates its bytes from the memory of this process
    (or of its worker process) beyond recorded sizes, up to the last known size of the model on the device.
    """
    models = status["models"]
    held = {name: model["device_bytes"] for name, model in models.items()}
    if status["isolation"] == "process":
        return {name: _in_worker(model) for name, model in models.items()}
    arrived = (status["device"]["process_bytes"] or 0) - _outside_here(status) - sum(held.values())
    for name, model in models.items():
        if model["progress"] and model["progress"]["to"] == "gpu" and arrived > 0:
            lacks = model["size_bytes"] - held[name] if model["size_bytes"] else arrived
            came = max(0, min(arrived, lacks))
            held[name], arrived = held[name] + came, arrived - came
    return held


def _in_worker(model: ModelStatus) -> int:
    """Returns the bytes on the card that belong to a model in a worker process."""
    worker, move = model["worker"], model["progress"]
    if not (worker and move and worker["device_bytes"] is not None):
        return model["device_bytes"]
    here = worker["device_bytes"] - (worker["context_bytes"] or 0)
    return max(0, min(here, model["size_bytes"] or here))


def _context(model: ModelStatus, held_bytes: int) -> int:
    """Returns the bytes on the card that a model's worker process holds beyond the model."""
    worker = model["worker"]
    return max(0, (worker["device_bytes"] or 0) - held_bytes) if worker else 0


def _outside_here(status: Status) -> int:
    """Returns the bytes on the card that this process itself, without children, holds beyond recorded sizes."""
    holders = [holder for model in status["models"].values() for holder in model["outside_processes"]]
    return sum(holder["device_bytes"] or 0 for holder in holders if holder["pid"] == os.getpid())


def model_html(name: str, status: Status, localize: Localize) -> str:
    """Returns a model's state, use, next move and sizes."""
    model, kind = status["models"].get(name), status["device"]["kind"]
    if model is None:
        return ""
    safe_name, state = escape(name, quote=True), model["state"]
    course = status_text.course(model, kind, lambda chinese, english: escape(localize(chinese, english)), counted)
    done = status_text.share(model["progress"]) if model["progress"] else None
    bar = "" if done is None else f"<div class='gpu-bar'><i style='width:{100 * done:.1f}%'></i></div>"
    facts = _facts(model, on_the_card(status)[name], kind, localize)
    left = _line(status_text.last_wait(model, kind, localize))
    left += _line(status_text.why_less_in_memory(model, localize))
    left += _line(worker_text.what_is_left(model, status, localize))
    return (
        f"<div class='gpu-head'><b>{safe_name}</b>"
        f"<span class='gpu-chip' data-model='{safe_name}' data-state='{state}'>"
        f"{status_text.state_in_words(state, kind, localize)}</span>"
        f"<span class='gpu-quiet'>{status_text.activity(model, localize)}</span></div>"
        f"<div class='gpu-quiet gpu-course'>{course}</div>{bar}<div class='gpu-facts'>"
        + "".join(f"<div class='gpu-quiet'>{escape(label)}<b>{value}</b></div>" for label, value in facts)
        + f"</div>{_holder(model, localize)}{left}"
        + "".join(_line(remark, "error") for remark in status_text.remarks(model, localize))
    )


def stay_html(status: Status, localize: Localize) -> str:
    """Returns the current timeouts of each model."""
    colon = mark(":", localize)
    rows = "".join(
        f"<div><b>{escape(name)}</b> {localize(*_KEEP_WARM)}{colon}{_keep_warm(model, localize)} · "
        f"{localize(*_IDLE_TIMEOUT)}{colon}{status_text.duration(model['idle_timeout_s'], localize)}</div>"
        for name, model in status["models"].items()
    )
    return f"<div class='gpu-quiet'>{localize('当前设置', 'Now')}{colon}{rows}</div>"


def past_html(history: UsageHistory, device_kind: str, localize: Localize) -> str:
    """Returns the chart of the last 15 minutes, the memory given back, and a table of the last moves."""
    models = history["models"]
    moves = sorted(
        ((move["ago_s"], name, move) for name, past in models.items() for move in past["moves"]),
        key=lambda entry: entry[0],
    )[:SHOWN_MOVES]
    rows = "".join(
        f"<tr><td>{counted(ago_s, 1)}</td><td>{escape(name)}</td>"
        f"<td>{status_text.route(move, device_kind, localize)}</td>"
        f"<td>{readable_bytes(move['bytes'])}</td><td>{status_text.readable_seconds(move['seconds'])}</td>"
        f"<td>{_rate_or_outcome(move, localize)}</td></tr>"
        for ago_s, name, move in moves
    )
    head = "".join(f"<th>{localize(*pair)}</th>" for pair in _COLUMNS)
    table = f"<table class='gpu-moves'><tr>{head}</tr>{rows}</table>" if rows else ""
    return chart(history, device_kind, localize) + _line(status_text.given_back(history, device_kind, localize)) + table


def _holder(model: ModelStatus, localize: Localize) -> str:
    time = counted(model["holder"]["held_s"], 1) if model["holder"] else ""
    return _line(status_text.holder(model, localize, held="\0")).replace("\0", time)


def _line(text: str, kind: str = "quiet") -> str:
    return f"<div class='gpu-{kind}'>{escape(text, quote=False)}</div>"


def counted(seconds: float, direction: int) -> str:
    return f"<time data-s='{seconds:.1f}' data-way='{direction}'>{status_text.readable_seconds(round(seconds))}</time>"


def _rate_or_outcome(move: ListedMove, localize: Localize) -> str:
    if move["outcome"] in _OUTCOMES:
        return localize(*_OUTCOMES[move["outcome"]])
    if not move["bytes"] or move["seconds"] <= 0 or move["to"] == "released":
        return "—"
    return readable_rate(move["bytes"] / move["seconds"])


def _facts(model: ModelStatus, device_bytes: int, device_kind: str, localize: Localize) -> list[tuple[str, str]]:
    return [
        *status_text.sizes(model, device_bytes, device_kind, localize),
        *worker_text.facts(model, localize),
        (
            localize("已空闲", "Idle"),
            "—" if model["idle_s"] is None or model["leases"] else counted(model["idle_s"], 1),
        ),
        (localize(*_KEEP_WARM), _keep_warm(model, localize)),
        (localize(*_IDLE_TIMEOUT), status_text.duration(model["idle_timeout_s"], localize)),
        (localize("上次搬移", "Last move"), escape(status_text.last_move(model, device_kind, localize))),
    ]


def _keep_warm(model: ModelStatus, localize: Localize) -> str:
    seconds, asked = model["keep_warm_s"], model["keep_warm_by"] == "request"
    stays = localize("一直", "always") if seconds == -1 else status_text.readable_seconds(seconds)
    if model["policy"] == "auto" and not asked:
        return localize("自动", "auto") + bracketed(stays, localize)
    if seconds == 0:
        stays = localize("请求后立即离开", "leaves right after a request")
    return stays + bracketed(localize("按上次请求", "as the last request asked"), localize) if asked else stays


def chart(history: UsageHistory, device_kind: str, localize: Localize) -> str:
    """Returns the chart as SVG: used memory of the card, stacked models in front of it, a mark below per request.

    Needs no chart library or script; Gradio's charts cannot show the requests below the memory.
    """
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
