"""Formats the status as HTML pieces of the page. Pure; escapes all external text.

Running times are ``<time data-s data-way>``, which the page counts up or down.
"""

from __future__ import annotations

import os
from html import escape

from ...status_types import ListedMove, ModelStatus, Status, UsageHistory
from ...units import readable_bytes, readable_rate
from ..shared.language import Localize, bracketed, mark
from . import status_text
from .chart import chart

SHOWN_MOVES = 8

_REST = {
    "outside": ("账外占用", "Outside the accounts"),
    "process": ("本进程其他", "This process, other"),
    "peers": ("同类进程", "Peers"),
    "others": ("其他进程", "Others"),
    "free": ("可用", "Free"),
}
_KEEP_WARM, _IDLE_TIMEOUT = ("保持在 GPU", "Keep warm"), ("闲置多久后释放", "Idle timeout")
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

    The models by name, then ``outside`` (of models, beyond recorded sizes), ``process``, ``peers``, ``others`` and
    ``free``. Memory of unknown owners counts as ``others``.
    """
    device = status["device"]
    if not device["total_bytes"] or device["free_bytes"] is None:
        return []
    left = device["total_bytes"] - device["free_bytes"]
    held = on_the_card(status)
    rest = {
        "outside": device["outside_bytes"] or 0,
        "process": (device["process_bytes"] or 0) - _outside_here(status),
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
    beyond recorded sizes, up to the last known size of the model on the device.
    """
    models = status["models"]
    held = {name: model["device_bytes"] for name, model in models.items()}
    arrived = (status["device"]["process_bytes"] or 0) - _outside_here(status) - sum(held.values())
    for name, model in models.items():
        if model["progress"] and model["progress"]["to"] == "gpu" and arrived > 0:
            lacks = model["size_bytes"] - held[name] if model["size_bytes"] else arrived
            came = max(0, min(arrived, lacks))
            held[name], arrived = held[name] + came, arrived - came
    return held


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
    return (
        f"<div class='gpu-head'><b>{safe_name}</b>"
        f"<span class='gpu-chip' data-model='{safe_name}' data-state='{state}'>"
        f"{status_text.state_in_words(state, kind, localize)}</span>"
        f"<span class='gpu-quiet'>{status_text.activity(model, localize)}</span></div>"
        f"<div class='gpu-quiet gpu-course'>{course}</div>{bar}<div class='gpu-facts'>"
        + "".join(f"<div class='gpu-quiet'>{escape(label)}<b>{value}</b></div>" for label, value in facts)
        + f"</div>{_line(status_text.holder(model, localize))}{_line(status_text.why_less_in_memory(model, localize))}"
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
    """Returns the chart of the last 15 minutes, and a table of the last moves."""
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
    return chart(history, device_kind, localize) + table


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
        (
            localize("已闲置", "Idle"),
            "—" if model["idle_s"] is None or model["leases"] else counted(model["idle_s"], 1),
        ),
        (localize(*_KEEP_WARM), _keep_warm(model, localize)),
        (localize(*_IDLE_TIMEOUT), status_text.duration(model["idle_timeout_s"], localize)),
        (localize("上次搬移", "Last move"), escape(status_text.last_move(model, device_kind, localize))),
    ]


def _keep_warm(model: ModelStatus, localize: Localize) -> str:
    seconds, automatic = model["keep_warm_s"], model["policy"] == "auto"
    if seconds == 0 and not automatic:
        return localize("请求后立即离开", "leaves right after a request")
    stays = localize("一直", "always") if seconds == -1 else status_text.readable_seconds(seconds)
    return localize("自动", "auto") + bracketed(stays, localize) if automatic else stays
