"""The manager's status in words that people read, in Chinese and English. Pure: no Gradio, no manager."""

from __future__ import annotations

import html
from typing import Any

NOT_ENABLED = (
    "GPU 管理未启用；启动时加上 --enable-gpu-management 即可使用。 / "
    "GPU management is not enabled; start with --enable-gpu-management to use it."
)
STATES = {
    "gpu": "在{gpu_zh}上 / On the {gpu_en}",
    "cpu": "在内存中 / In main memory",
    "released": "已释放 / Released",
    "moving": "搬移中 / Moving",
}
_PENDING = {
    "offload": "当前请求结束后卸载 / Will be offloaded when the running request ends",
    "release": "当前请求结束后释放 / Will be released when the running request ends",
}
_STYLE = """<style>
.gpu-device {display:flex; flex-wrap:wrap; gap:2px 12px; align-items:baseline; justify-content:space-between}
.gpu-bar {height:8px; border-radius:4px; background:rgba(128,128,128,.25); margin:6px 0 2px; overflow:hidden}
.gpu-bar i {display:block; height:100%; background:var(--primary-500, #6366f1); transition:width .4s}
.gpu-quiet {opacity:.75; font-size:.88em}
.gpu-model {border:1px solid rgba(128,128,128,.3); border-radius:8px; padding:10px 12px; margin-top:10px}
.gpu-head {display:flex; flex-wrap:wrap; gap:4px 10px; align-items:center}
.gpu-chip {border-radius:999px; padding:1px 10px; font-weight:600; background:rgba(128,128,128,.2)}
.gpu-chip[data-state=gpu] {background:rgba(34,197,94,.25)}
.gpu-chip[data-state=cpu] {background:rgba(59,130,246,.22)}
.gpu-chip[data-state=moving] {background:rgba(245,158,11,.3)}
.gpu-facts {display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:6px 14px; margin-top:8px}
.gpu-facts b {display:block; font-weight:600; font-variant-numeric:tabular-nums}
.gpu-error {color:#dc2626; margin-top:6px; overflow-wrap:anywhere}
</style>"""


def state_in_words(state: str, device_kind: str) -> str:
    """A simulated card is called simulated wherever it is named."""
    simulated = device_kind == "simulated"
    return STATES[state].format(
        gpu_zh="模拟 GPU " if simulated else " GPU ", gpu_en="simulated GPU" if simulated else "GPU"
    )


def readable_bytes(nbytes: int | None) -> str:
    """``1.25 GB``; a GB is 2**30 bytes, as on the box of a graphics card. ``?`` if unknown."""
    if nbytes is None:
        return "?"
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if nbytes >= size:
            number = nbytes / size
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{nbytes} B"


def readable_seconds(seconds: float | None) -> str:
    """``0.31 s``, ``42 s``, ``12 min``, ``3.5 h``; a dash if there is nothing to tell."""
    if seconds is None:
        return "—"
    if 0 < seconds < 0.01:
        return "< 0.01 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def pressed(action: str, done: bool, status: dict[str, Any]) -> str:
    """What came of a press on offload or release."""
    if not done:
        return _PENDING[action] + "."
    if action == "release":
        return "已完全释放，下次请求时重新加载。 / Released; the next request loads it again."
    if status["device"]["kind"] == "cpu":
        return "本机没有 GPU，无需卸载；释放可腾出内存。 / No GPU here, nothing to offload; release frees RAM."
    if all(model["state"] == "released" for model in status["models"].values()):
        return "模型已释放，无需卸载。 / Nothing to offload: the model is released."
    return "已卸载到内存。 / Offloaded to main memory."


def as_text(status: dict[str, Any]) -> str:
    """The status as a few lines of plain text."""
    device = status["device"]
    lines = [f"{device['name']}: {_usage(device)}"]
    for name, model in status["models"].items():
        facts = ", ".join(f"{label} {value}" for label, value in _facts(model, device["kind"]))
        lines += [f"{name}: {state_in_words(model['state'], device['kind'])} ({facts})", *_remarks(model)]
    return "\n".join([*lines, *_notes(device)])


def as_html(status: dict[str, Any]) -> str:
    """The status as a piece of the page; everything that comes from outside is escaped."""
    device = status["device"]
    parts = [
        _STYLE,
        f"<div class='gpu-device'><b data-device='{html.escape(device['kind'])}'>{html.escape(device['name'])}</b>"
        f"<span class='gpu-quiet'>{_usage(device)}</span></div>",
    ]
    if device["total_bytes"] and device["free_bytes"] is not None:
        used_percent = 100 * (1 - device["free_bytes"] / device["total_bytes"])
        parts.append(f"<div class='gpu-bar'><i style='width:{used_percent:.1f}%'></i></div>")
    parts += [f"<div class='gpu-quiet'>{html.escape(note)}</div>" for note in _notes(device)]
    for name, model in status["models"].items():
        safe_name, state = html.escape(name, quote=True), model["state"]
        facts = "".join(
            f"<div class='gpu-quiet'>{label}<b>{html.escape(value)}</b></div>"
            for label, value in _facts(model, device["kind"])
        )
        remarks = "".join(f"<div class='gpu-error'>{html.escape(remark)}</div>" for remark in _remarks(model))
        parts.append(
            f"<div class='gpu-model'><div class='gpu-head'><b>{safe_name}</b>"
            f"<span class='gpu-chip' data-model='{safe_name}' data-state='{state}'>"
            f"{state_in_words(state, device['kind'])}</span>"
            f"<span class='gpu-quiet'>{_activity(model)}</span></div>"
            f"<div class='gpu-facts'>{facts}</div>{remarks}</div>"
        )
    return "".join(parts)


def _usage(device: dict[str, Any]) -> str:
    if device["total_bytes"] is None:
        return ""
    used = None if device["free_bytes"] is None else device["total_bytes"] - device["free_bytes"]
    return f"已用 / used {readable_bytes(used)} · 共 / of {readable_bytes(device['total_bytes'])}"


def _notes(device: dict[str, Any]) -> list[str]:
    note = device.get("note")
    return [note["zh"], note["en"]] if note else []


def _facts(model: dict[str, Any], device_kind: str) -> list[tuple[str, str]]:
    move = model["last_move"]
    last = (
        f"{move['from']} → {move['to']}, {readable_bytes(move['bytes'])}, {readable_seconds(move['seconds'])}"
        if move
        else "—"
    )
    memory = {"cuda": "显存 / GPU memory", "simulated": "模拟显存 / Simulated GPU memory"}
    return [
        *([(memory[device_kind], readable_bytes(model["device_bytes"]))] if device_kind in memory else []),
        ("内存 / RAM", readable_bytes(model["host_bytes"])),
        ("空闲 / Idle", readable_seconds(model["idle_s"])),
        ("上次搬移 / Last move", last),
    ]


def _activity(model: dict[str, Any]) -> str:
    if model.get("pending"):
        return _PENDING[model["pending"]]
    if model["waiting"]:
        return f"使用中，{model['waiting']} 个请求等待 / In use, {model['waiting']} waiting"
    return "使用中 / In use" if model["leases"] else ""


def _remarks(model: dict[str, Any]) -> list[str]:
    return [f"上次错误 / Last error: {model['last_error']}"] if model["last_error"] else []
