"""Formats what the status says of a shared card as HTML. Pure; escapes all external text."""

from __future__ import annotations

from html import escape

from ...status_types import HoldingProcess, NeighborStatus, SharingStatus, Status
from ...units import readable_bytes
from ..shared.language import Localize, bracketed, mark, translated
from .status_text import readable_seconds

ASK = ("请求让出显存", "Ask to free memory")


def sharing_html(status: Status, localize: Localize) -> str:
    """Returns for whom models left the card, the queue for it, and the neighbours; empty if it is not shared."""
    sharing = status["sharing"]
    if sharing is None:
        return ""
    lines = [yielded(sharing, localize), *waiting(status, localize)]
    quiet = "".join(f"<div class='gpu-quiet'>{escape(line)}</div>" for line in lines if line)
    return quiet + "".join(_neighbor(neighbor, localize) for neighbor in sharing["neighbors"])


def yielded(sharing: SharingStatus, localize: Localize) -> str:
    """Returns for whom models left the card last, and how often they left; empty before the first time."""
    last, times = sharing["last_yield"], sharing["yields"]
    if last is None:
        return ""
    name, models = _name(last["name"], last["pid"], localize), ", ".join(last["models"])
    ago, size = readable_seconds(last["ago_s"]), readable_bytes(last["bytes"])
    return localize(
        f"已为其他进程让出显存 {times} 次；上次在 {ago} 前，为{name}让出 {size}（{models}）",
        f"Left the card for others, {times}×; last {ago} ago for {name}: {size} ({models})",
    )


def waiting(status: Status, localize: Localize) -> list[str]:
    """Returns the moves and processes that wait for room on the card, in order of arrival."""
    sharing = status["sharing"]
    queue = [move for move in sharing["queue"] if not move["claimed"]] if sharing else []
    free = readable_bytes(status["device"]["free_bytes"])
    lines = []
    for place, move in enumerate(queue, 1):
        asks = move["model"] or localize("其他进程", "another process")
        asks += bracketed(str(move["pid"]), localize)
        since = readable_seconds(move["waited_s"])
        needs = localize(
            f"需要 {readable_bytes(move['wanted_bytes'])}，空闲 {free}" if move["wanted_bytes"] else "",
            f"needs {readable_bytes(move['wanted_bytes'])}, {free} free" if move["wanted_bytes"] else "",
        )
        facts = mark(",", localize).join(filter(None, (needs, localize(f"已等待 {since}", f"for {since}"))))
        lines.append(localize(f"等待显存，第 {place} 位：{asks}：{facts}",
                              f"Waiting for room, place {place}: {asks}: {facts}"))  # fmt: skip
    if lines and sharing and (held := [_holder(other, localize) for other in sharing["holders"]]):
        lines.append(localize(f"其他进程占用：{'、'.join(held)}", f"Held by others: {', '.join(held)}"))
    return lines


def _holder(other: HoldingProcess, localize: Localize) -> str:
    size = "?" if other["bytes"] is None else readable_bytes(other["bytes"])
    return f"{other['name']}{bracketed(str(other['pid']), localize)} {size}"


def _neighbor(neighbor: NeighborStatus, localize: Localize) -> str:
    facts = [{None: "", True: localize("使用中", "in use"), False: localize("空闲", "idle")}[neighbor["in_use"]]]
    if neighbor["idle_bytes"]:
        size = readable_bytes(neighbor["idle_bytes"])
        facts.append(localize(f"可让出 {size}", f"could free {size}"))
    facts.append(", ".join(neighbor["models"]))
    if neighbor["asked_ago_s"] is not None:
        ago = readable_seconds(neighbor["asked_ago_s"])
        facts.append(localize(f"{ago} 前请求过", f"asked {ago} ago"))
    url = escape(neighbor["url"], quote=True)
    name = escape(neighbor["kind"]) + (f" ({neighbor['pid']})" if neighbor["pid"] else "")
    why = (
        f"<div class='gpu-error'>{escape(translated(neighbor['answer'], localize))}</div>" if neighbor["answer"] else ""
    )
    return (
        f"<div class='gpu-neighbor'><span><b>{name}</b> {url} "
        f"<span class='gpu-quiet'>{escape(' · '.join(filter(None, facts)))}</span></span>"
        f"<button type='button' data-neighbor='{url}'>{localize(*ASK)}</button></div>{why}"
    )


def _name(name: str, pid: int | None, localize: Localize) -> str:
    words = name or localize("其他进程", "other processes")
    return words + (bracketed(str(pid), localize) if pid is not None else "")
