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
    "offload": "当前请求或加载结束后卸载 / Will be offloaded when the running request ends, or the load",
    "release": "当前请求或加载结束后释放 / Will be released when the running request ends, or the load",
}
IN_USE = "模型使用中，正在等候 / The model is in use; waiting for it"
ARRIVED = {"gpu": "模型已就绪 / The model is ready", "cpu": "模型已回到内存 / The model is back in main memory"}
_TO = {
    "gpu": "前往显存 / To the GPU",
    "cpu": "前往内存 / To main memory",
    "released": "正在释放 / Being released",
}
_NEXT = {
    "gpu": "{in_} 后回到显存 / to the GPU in {in_}",
    "cpu": "{in_} 后卸载到内存 / to main memory in {in_}",
    "released": "{in_} 后释放 / released in {in_}",
}
_PHASES = {
    "loading": "加载 / loading",
    "building": "构建 / building",
    "copying": "复制 / copying",
    "reading": "读取 / reading",
    "saving": "保存 / saving",
    "restoring": "恢复 / restoring",
    "offloading": "卸载 / offloading",
    "releasing": "释放 / releasing",
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


def share(done_bytes: int, total_bytes: int | None) -> float | None:
    """From 0 to 1, how much is done; None where nobody knows."""
    return min(1.0, done_bytes / total_bytes) if total_bytes and done_bytes else None


def on_its_way(
    device_kind: str, target: str, phase: str, done_bytes: int, total_bytes: int | None, seconds: float
) -> str:
    """Where a model goes, and how far it has come: phase, bytes of total, rate."""
    facts = [_PHASES.get(phase, phase)]
    if done_bytes:
        of = "" if total_bytes is None else f" / {readable_bytes(total_bytes)}"
        facts.append(f"{readable_bytes(done_bytes)}{of}")
        if seconds > 0:
            facts.append(f"{readable_bytes(round(done_bytes / seconds))}/s")
    elif total_bytes:
        facts.append(readable_bytes(total_bytes))
    return f"{_called(_TO.get(target, target), device_kind)}: {' · '.join(facts)}"


def as_text(status: dict[str, Any]) -> str:
    """The status as a few lines of plain text."""
    device = status["device"]
    lines = [f"{device['name']}: {_usage(device)}"]
    for name, model in status["models"].items():
        facts = ", ".join(f"{label} {value}" for label, value in _facts(model, device["kind"]))
        lines += [f"{name}: {state_in_words(model['state'], device['kind'])} ({facts})"]
        lines += [line for line in (_activity(model), _course(model, device["kind"])) if line] + _remarks(model)
    return "\n".join([*lines, *_notes(device), *_trouble(status)])


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
    parts += [f"<div class='gpu-error'>{html.escape(trouble)}</div>" for trouble in _trouble(status)]
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
            f"{_way(model, device['kind'])}<div class='gpu-facts'>{facts}</div>{remarks}</div>"
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
    """What requests do with it: use it, wait for it."""
    parts = ["使用中 / In use"] if model["leases"] else []
    if model["waiting"]:
        parts.append(f"{model['waiting']} 个请求等待 / {model['waiting']} waiting")
    if model.get("pending"):
        parts.append(_PENDING[model["pending"]])
    return " · ".join(parts)


def _course(model: dict[str, Any], device_kind: str) -> str:
    """Where it is going, or what happens to it next if nobody asks for it."""
    if way := model["progress"]:
        course = on_its_way(device_kind, way["to"], way["phase"], way["bytes"], way["total_bytes"], way["seconds"])
        return f"{course} · {readable_seconds(way['seconds'])}"
    if model["next"]:
        what = _NEXT[model["next"]["to"]].format(in_=readable_seconds(model["next"]["in_s"]))
        return f"接下来 / Next: {_called(what, device_kind)}"
    return ""


def _way(model: dict[str, Any], device_kind: str) -> str:
    course, way = html.escape(_course(model, device_kind)), model["progress"]
    done = share(way["bytes"], way["total_bytes"]) if way else None
    bar = "" if done is None else f"<div class='gpu-bar'><i style='width:{100 * done:.1f}%'></i></div>"
    return f"<div class='gpu-quiet gpu-course'>{course}</div>{bar}" if course else ""


def _called(sentence: str, device_kind: str) -> str:
    """A simulated card is called simulated here too."""
    if device_kind != "simulated":
        return sentence
    return sentence.replace("显存", "模拟显存").replace("the GPU", "the simulated GPU")


def _trouble(status: dict[str, Any]) -> list[str]:
    """What is wrong with the thread that moves idle models: it met an error, or is not there although one is due."""
    monitor = status["monitor"]
    sentences = []
    if not monitor["alive"] and any(model["next"] for model in status["models"].values()):
        sentences.append(
            "空闲监视线程未运行，模型不会自动离开；下一次请求会重新启动它。 / "
            "The idle monitor is not running, so models do not leave by themselves; the next request starts it again."
        )
    if monitor["errors"]:
        times = f"{monitor['errors']} 次 / {monitor['errors']}×"
        sentences.append(f"空闲监视出错 / Idle monitor, errors: {times}: {monitor['last_error']}")
    return sentences


def _remarks(model: dict[str, Any]) -> list[str]:
    return [f"上次错误 / Last error: {model['last_error']}"] if model["last_error"] else []
