"""Formats the manager's status as text. Pure: no Gradio, no manager, no HTML.

Functions take ``localize``, which selects the language.
"""

from __future__ import annotations

from collections.abc import Callable

from ... import sentences as shared
from ...receipts import Receipt
from ...states import State
from ...status_types import DeviceStatus, LastMove, ListedMove, ModelStatus, MoveProgress, Status, UsageHistory
from ...units import UNITS_BYTES, readable_bytes, readable_rate
from ..shared.language import Localize, both, bracketed, mark, of_device, translated
from . import worker_text

NOT_ENABLED = both(
    "GPU 管理未启用；启动时加上 --enable-gpu-management 即可使用。",
    "GPU management is not enabled; start with --enable-gpu-management to use it.",
)
READY = ("模型已就绪，正在生成", "The model is ready; generating")
STATES = {
    "gpu": ("在 GPU 上", "On the GPU"),
    "cpu": ("在内存中", "In main memory"),
    "released": ("已释放", "Released"),
    "moving": ("搬移中", "Moving"),
}
PLACES = {"gpu": ("GPU", "GPU"), "cpu": ("内存", "main memory"), "released": ("已释放", "released")}
_PENDING = {
    "offload": ("当前请求或加载结束后卸载", "Will be offloaded once the running request or load has ended"),
    "release": ("当前请求或加载结束后释放", "Will be released once the running request or load has ended"),
}
_TO = {
    "gpu": ("正在移至显存", "To the GPU"),
    "cpu": ("正在移至内存", "To main memory"),
    "released": ("正在释放", "Being released"),
}
_NEXT = {
    "gpu": ("{} 后恢复到显存", "to the GPU in {}"),
    "cpu": ("{} 后卸载到内存", "to main memory in {}"),
    "released": ("{} 后释放", "released in {}"),
}
_PHASES = {
    "loading": ("加载", "loading"),
    "building": ("构建", "building"),
    "waiting": ("等待其他进程让出显存", "waiting for room"),
    "looking": ("查看", "looking"),
    "checking": ("核对", "checking"),
    "copying": ("复制", "copying"),
    "sessions": ("创建会话", "building sessions"),
    "checkpointing": ("创建检查点", "checkpointing the process"),
    "resuming": ("恢复进程", "resuming the process"),
    "reading": ("读取", "reading"),
    "writing": ("写入", "writing"),
    "restoring": ("恢复", "restoring"),
    "offloading": ("卸载", "offloading"),
    "releasing": ("释放", "releasing"),
}
_RELEASED = ("已完全释放，下次请求时重新加载。", "Released; the next request loads it again.")
#: What a press did, by action and whether it is done: with a GPU, and without one.
_PRESSED = {
    ("warm", True): (
        ("模型已在 GPU 上。", "The model is on the GPU already."),
        ("模型已加载。", "The model is loaded already."),
    ),
    ("warm", False): (
        ("正在加载到 GPU，可以继续操作。", "Loading to the GPU; you can continue working."),
        ("正在加载，可以继续操作。", "Loading; you can continue working."),
    ),
    ("offload", True): (
        ("已卸载到内存。", "Offloaded to main memory."),
        ("本机没有 GPU，无需卸载；释放可腾出内存。", "No GPU here, nothing to offload; release frees main memory."),
    ),
    ("release", True): (_RELEASED, _RELEASED),
}
_ARRIVED = {
    "gpu": ("{} 已在 GPU 上。", "{} is on the GPU now."),
    "cpu": ("{} 已在内存中。", "{} is in main memory now."),
    "released": ("{} 已完全释放。", "{} has been released."),
}


def readable_seconds(seconds: float | None) -> str:
    """Returns ``0.31 s``, ``42 s``, ``12 min``, ``3.5 h`` or ``4 d``; a dash for None."""
    if seconds is None:
        return "—"
    if 0 < seconds < 0.01:
        return "< 0.01 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def state_in_words(state: str, device_kind: str, localize: Localize) -> str:
    return of_device(STATES[state], device_kind, localize)


def device_name(device: DeviceStatus, localize: Localize) -> str:
    """Returns the device's name in one language; real cards have the same name in both."""
    return translated(device["name"], localize)


def usage(device: DeviceStatus, localize: Localize) -> str:
    """Returns the card's memory use and power; empty if unknown."""
    facts = []
    if device["total_bytes"] is not None:
        used = None if device["free_bytes"] is None else device["total_bytes"] - device["free_bytes"]
        used_words, total_words = readable_bytes(used), readable_bytes(device["total_bytes"])
        facts.append(localize(f"已用 {used_words}，共 {total_words}", f"{used_words} of {total_words} used"))
    if device["power_w"] is not None:
        facts.append(f"{localize('功耗', 'power')} {device['power_w']:.0f} W")
    return " · ".join(facts)


def main_memory(status: Status, localize: Localize) -> str:
    """Returns the main memory of this process, of its models, and free main memory."""
    host = status["host"]
    process, free, total = map(readable_bytes, (host["process_bytes"], host["free_bytes"], host["total_bytes"]))
    models = readable_bytes(sum(model["host_bytes"] for model in status["models"].values()))
    workers_zh, workers_en = worker_text.main_memory(status)
    return localize(
        f"内存：本进程 {process}{workers_zh}（其中模型 {models}），可用 {free}，共 {total}",
        f"Main memory: this process {process}{workers_en} (models {models} of it), {free} of {total} free",
    )


def sizes(model: ModelStatus, device_bytes: int, device_kind: str, localize: Localize) -> list[tuple[str, str]]:
    """Returns (label, size) of a model on the device, in main memory and, while offloaded, of parts to be rebuilt.

    The last two add up to its size on the device: main memory holds no copies of parts that are in files, such as ONNX
    sessions.
    """
    facts = [(localize("内存", "Main memory"), readable_bytes(model["host_bytes"]))]
    if label := memory_label(device_kind, localize):
        facts.insert(0, (label, readable_bytes(device_bytes)))
    if rebuilt_bytes := _rebuilt_bytes(model):
        facts.append((localize("恢复时重建", "Rebuilt on return"), readable_bytes(rebuilt_bytes)))
    return facts


def _rebuilt_bytes(model: ModelStatus) -> int:
    return max(0, model["size_bytes"] - model["host_bytes"]) if model["state"] == "cpu" else 0


def why_less_in_memory(model: ModelStatus, localize: Localize) -> str:
    """Returns why main memory holds less than the device did; empty if it does not."""
    if not (rebuilt_bytes := _rebuilt_bytes(model)):
        return ""
    size, rebuilt = readable_bytes(model["size_bytes"]), readable_bytes(rebuilt_bytes)
    return localize(
        f"模型在设备上占 {size}；其中 {rebuilt} 在模型文件中已有，内存里不再保留，恢复时由文件重建。",
        f"Of its {size} on the device, {rebuilt} are in the model's files anyway: main memory keeps no copy, and they "
        f"are rebuilt from the files on return.",
    )


def notes(device: DeviceStatus, localize: Localize) -> list[str]:
    note = device["note"]
    return [localize(note["zh"], note["en"])] if note else []


def pressed(action: str, name: str | None, done: bool, status: Status, localize: Localize) -> str:
    """Returns the outcome of a press on warm, offload or release of a model (None: all), or when it will happen."""
    kind = status["device"]["kind"]
    if not done and action in _PENDING:
        return localize(*(f"{phrase}{dot}" for phrase, dot in zip(_PENDING[action], "。.", strict=True)))
    models = status["models"].values() if name is None else [status["models"][name]]
    if action == "offload" and kind != "cpu" and all(model["state"] == "released" for model in models):
        return localize("模型已释放，无需卸载。", "Nothing to offload: the model is released.")
    return of_device(_PRESSED[action, done][kind == "cpu"], kind, localize)


def outcome(name: str, model: ModelStatus, device_kind: str, localize: Localize) -> str | None:
    """Returns the outcome of a press that requires a move of this model; None while it is pending."""
    if model["state"] == "moving" or model["pending"]:
        return None
    if model["last_error"]:
        return f"{name}{mark(':', localize)}{translated(model['last_error'], localize)}"
    return of_device(_ARRIVED[model["state"]], device_kind, localize).replace("{}", name)


def progress(
    status: Status, model: str, place: int | None, localize: Localize, ready: tuple[str, str]
) -> tuple[str, float] | None:
    """Returns queue position or progress of the model for a request, and the share that is done (0: unknown).

    ``place`` is that of its lease, None before that. Returns ``ready`` if the model is on the device, and None if the
    request waits for something else.
    """
    kind, present = status["device"]["kind"], status["models"].get(model)
    if present is None:  # not managed
        return None
    if place and place > 1:
        return localize(f"排队中，第 {place} 位", f"Waiting; place {place} in the queue"), 0.0
    if move := present["progress"]:
        return moving(move, kind, localize), share(move) or 0.0
    if present["leases"]:
        return localize("模型使用中，下一个轮到您", "The model is in use; you are next"), 0.0
    return (localize(*ready), 0.0) if present["state"] == State.DEVICE.shown(kind) else None


def share(move: MoveProgress) -> float | None:
    """Returns the share of a move that is done, from 0 to 1; None if unknown."""
    return min(1.0, move["bytes"] / move["total_bytes"]) if move["total_bytes"] and move["bytes"] else None


def moving(move: MoveProgress, device_kind: str, localize: Localize) -> str:
    """Returns the target and progress of a move: phase, bytes of total, rate."""
    facts = [localize(*_PHASES[move["phase"]]) if move["phase"] in _PHASES else move["phase"]]
    total = None if move["total_bytes"] is None else readable_bytes(move["total_bytes"])
    if move["bytes"]:
        facts.append(" / ".join(filter(None, (readable_bytes(move["bytes"]), total))))
        if move["bytes_per_s"]:
            facts.append(readable_rate(move["bytes_per_s"]))
    elif move["total_bytes"]:
        facts.append(str(total))
    return f"{of_device(_TO[move['to']], device_kind, localize)}{mark(':', localize)}{' · '.join(facts)}"


def activity(model: ModelStatus, localize: Localize) -> str:
    """Returns whether a model is in use, the number of waiting requests, and the pending move."""
    parts = [localize("使用中", "In use")] if model["leases"] else []
    if waiting := model["waiting"]:
        parts.append(localize(f"{waiting} 个请求等待", f"{waiting} waiting"))
    if model["pending"]:
        parts.append(localize(*_PENDING[model["pending"]]))
    return " · ".join(parts)


def holder(model: ModelStatus, localize: Localize, held: str | None = None) -> str:
    """Returns the code that uses the model, and for how long; empty if it is not in use."""
    sentence = shared.holder_of(model, held)
    return localize(sentence.zh, sentence.en[:1].upper() + sentence.en[1:]) if sentence else ""


def course(
    model: ModelStatus, device_kind: str, localize: Localize, counted: Callable[[float, int], str] | None = None
) -> str:
    """Returns the progress of the current move, or the next move if no request comes.

    ``counted`` formats seconds that the page counts up (1) or down (-1).
    """
    counted = counted or (lambda seconds, direction: readable_seconds(seconds))
    if move := model["progress"]:
        return f"{moving(move, device_kind, localize)} · {counted(move['seconds'], 1)}"
    if step := model["next"]:
        what = of_device(_NEXT[step["to"]], device_kind, localize).replace("{}", counted(step["in_s"], -1))
        return f"{localize('若无新请求', 'If no request comes')}{mark(':', localize)}{what}"
    return ""


def trouble(status: Status, localize: Localize) -> list[str]:
    """Returns problems of the idle monitor: not running although a move is due, or errors."""
    monitor = status["monitor"]
    sentences = []
    if not monitor["alive"] and any(model["next"] for model in status["models"].values()):
        sentences.append(
            localize(
                "空闲监视线程未运行，模型不会自动离开；下一次请求会重新启动它。",
                "The idle monitor is not running, so models do not leave by themselves; the next request starts it "
                "again.",
            )
        )
    if monitor["errors"]:
        times = localize(f"空闲监视出错 {monitor['errors']} 次", f"Idle monitor, errors: {monitor['errors']}×")
        sentences.append(f"{times}{mark(':', localize)}{translated(monitor['last_error'] or '', localize)}")
    return sentences


def remarks(model: ModelStatus, localize: Localize) -> list[str]:
    """Returns a model's last error, and the memory that no move frees."""
    return [translated(sentence, localize) for sentence in shared.remarks(model)]


def memory_label(device_kind: str, localize: Localize) -> str | None:
    """Returns the name of the device's memory; None if it is main memory."""
    return None if device_kind == "cpu" else of_device(("显存", "GPU memory"), device_kind, localize)


def memory_title(device_kind: str, window_s: float, localize: Localize) -> str:
    """Returns the title of the memory chart."""
    minutes = f"{window_s / 60:g}"
    if device_kind == "cpu":
        return localize(f"最近 {minutes} 分钟模型占用的内存", f"Main memory of the models, last {minutes} minutes")
    return of_device((f"最近 {minutes} 分钟的显存", f"GPU memory, last {minutes} minutes"), device_kind, localize)


def duration(seconds: float, localize: Localize) -> str:
    """Returns a timeout setting as text; -1 is never."""
    return localize("永不", "never") if seconds == -1 else readable_seconds(seconds)


def route(move: LastMove | ListedMove, device_kind: str, localize: Localize) -> str:
    """Returns source and target of a move."""
    return " → ".join(of_device(PLACES[place], device_kind, localize) for place in (move["from"], move["to"]))


def last_move(model: ModelStatus, device_kind: str, localize: Localize) -> str:
    move = model["last_move"]
    if not move:
        return "—"
    facts = route(move, device_kind, localize), readable_bytes(move["bytes"]), readable_seconds(move["seconds"])
    return mark(",", localize).join(facts)


def last_wait(model: ModelStatus, device_kind: str, localize: Localize) -> str:
    """Returns how long the last request waited for the model, and why; empty before the first."""
    if model["last_wait"] is None:
        return ""
    sentence = Receipt(**model["last_wait"]).sentence()
    words = of_device((sentence.zh, sentence.en), device_kind, localize)
    return f"{localize('上次请求', 'Last request')}{mark(':', localize)}{words}"


def given_back(history: UsageHistory, device_kind: str, localize: Localize) -> str:
    """Returns the memory that all models have given back, in GB x hours; empty for the CPU."""
    totals = [past["totals"]["given_back_byte_hours"] for past in history["models"].values()]
    if not totals or None in totals:
        return ""
    gb_hours = f"{sum(filter(None, totals)) / UNITS_BYTES['GB']:.3g} GB·h"
    return of_device(
        (f"迄今归还的显存：{gb_hours}", f"GPU memory given back so far: {gb_hours}"), device_kind, localize
    )


def as_text(status: Status, localize: Localize = both) -> str:
    """Returns the status as a few lines of plain text."""
    device = status["device"]
    kind, colon = device["kind"], mark(":", localize)
    lines = [
        colon.join(filter(None, (device_name(device, localize), usage(device, localize)))),
        main_memory(status, localize),
    ]
    for name, model in status["models"].items():
        facts = [*sizes(model, model["device_bytes"], kind, localize), *worker_text.facts(model, localize),
                 (localize("已空闲", "Idle"), readable_seconds(model["idle_s"])),
                 (localize("上次搬移", "Last move"), last_move(model, kind, localize))]  # fmt: skip
        values = mark(",", localize).join(f"{label} {value}" for label, value in facts)
        lines += [f"{name}{colon}{state_in_words(model['state'], kind, localize)}{bracketed(values, localize)}"]
        sentences = [activity(model, localize), holder(model, localize), course(model, kind, localize)]
        sentences += [last_wait(model, kind, localize)]
        sentences += [why_less_in_memory(model, localize), worker_text.what_is_left(model, status, localize)]
        lines += [*filter(None, sentences), *remarks(model, localize)]
    return "\n".join([*lines, *notes(device, localize), *trouble(status, localize)])
