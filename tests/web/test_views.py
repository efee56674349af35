from __future__ import annotations

import os
import re
from typing import Any

import pytest

from gpu_manager import CpuDevice, GPUResourceManager
from residency.clock import ManualClock
from residency.web.shared.language import en, zh
from residency.web.ui import status_text, views
from residency.web.ui.views import chart, scale_top

GB = 1 << 30


def card(
    *, free: int | None, process: int | None, peers: int | None, model: int, here: int = 0, child: int = 0,
    size: int = 0, to: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A status; ``here`` and ``child`` are what this process and a child hold as unmanaged memory.

    A model of ``size`` is on its way ``to`` somewhere.
    """
    device = {"total_bytes": 48 * GB, "free_bytes": free, "process_bytes": process, "peers_bytes": peers,
              "outside_bytes": here + child}  # fmt: skip
    holders = [{"pid": os.getpid(), "device_bytes": here}, {"pid": 1, "device_bytes": child}]
    entry = {"device_bytes": model, "outside_processes": holders, "size_bytes": size, "progress": to and {"to": to},
             "worker": None}  # fmt: skip
    return {"isolation": "none", "device": device, "models": {"tts": entry}}


@pytest.mark.parametrize(
    ("status", "sizes"),
    [
        (card(free=20 * GB, process=13 * GB, peers=5 * GB, model=12 * GB), (12, 0, 1, 5, 10, 20)),
        (card(free=48 * GB, process=0, peers=0, model=0), (0, 0, 0, 0, 0, 48)),
        (card(free=20 * GB, process=None, peers=None, model=12 * GB), (12, 0, 0, 0, 16, 20)),
        (card(free=20 * GB, process=16 * GB, peers=5 * GB, model=12 * GB, here=3 * GB), (12, 3, 1, 5, 7, 20)),
        (card(free=20 * GB, process=13 * GB, peers=5 * GB, model=12 * GB, child=3 * GB), (12, 3, 1, 5, 7, 20)),
        # Books of different moments may contradict each other; nothing is shown that is more than what is used.
        (card(free=44 * GB, process=40 * GB, peers=9 * GB, model=12 * GB), (4, 0, 0, 0, 0, 44)),
        (card(free=44 * GB, process=40 * GB, peers=9 * GB, model=2 * GB, child=5 * GB), (2, 2, 0, 0, 0, 44)),
        # What a model on its way has brought so far is its own.
        (card(free=41 * GB, process=7 * GB, peers=0, model=0, size=12 * GB, to="gpu"), (7, 0, 0, 0, 0, 41)),
        (card(free=35 * GB, process=13 * GB, peers=0, model=0, size=12 * GB, to="gpu"), (12, 0, 1, 0, 0, 35)),
        (card(free=36 * GB, process=12 * GB, peers=0, model=0, size=0, to="gpu"), (12, 0, 0, 0, 0, 36)),
        (
            card(free=33 * GB, process=15 * GB, peers=0, model=0, size=12 * GB, here=3 * GB, to="gpu"),
            (12, 3, 0, 0, 0, 33),
        ),
        (card(free=41 * GB, process=7 * GB, peers=0, model=12 * GB, size=12 * GB, to="cpu"), (7, 0, 0, 0, 0, 41)),
    ],
)
def test_every_byte_of_the_card_is_somebodys(status: dict[str, Any], sizes: tuple[int, ...]) -> None:
    parts = views.memory_parts(status)
    assert [part for part, _, _ in parts] == ["model-0", "context", "outside", "process", "peers", "others", "free"]
    assert parts[1] == ("context", "", 0)
    assert tuple(nbytes // GB for part, _, nbytes in parts if part != "context") == sizes
    assert sum(nbytes for _, _, nbytes in parts) == 48 * GB


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        ({"model": 12, "worker": 14, "context": 2}, (12, 2, 1, 5, 28)),
        ({"model": 0, "worker": 2, "context": 2}, (0, 2, 1, 17, 28)),
        # On its way: what has come is the model's, up to its size.
        ({"model": 0, "worker": 9, "context": 2, "size": 12, "to": "gpu"}, (7, 2, 1, 10, 28)),
        ({"model": 0, "worker": 14, "context": 0, "size": 12, "to": "gpu"}, (12, 2, 1, 5, 28)),
        ({"model": 0, "worker": 9, "context": 0, "to": "gpu"}, (9, 0, 1, 10, 28)),
        ({"model": 12, "worker": 9, "context": 2, "size": 12, "to": "cpu"}, (7, 2, 1, 10, 28)),
        # Unknown in a container.
        ({"model": 12, "worker": None, "context": None}, (12, 0, 1, 7, 28)),
    ],
)
@pytest.mark.parametrize("summed", [True, False], ids=["simulated", "cuda"])
def test_the_context_of_worker_processes_has_a_part_of_the_bar(
    change: dict[str, Any], sizes: tuple[int, ...], summed: bool
) -> None:
    """``summed``: the memory of this process includes that of workers, as on a simulated card."""
    held, context = change["worker"], change["context"]
    status = card(
        free=28 * GB, process=(held or 0) * GB if summed else 0, peers=GB, model=change["model"] * GB,
        size=change.get("size", 0) * GB, to=change.get("to"),
    )  # fmt: skip
    status["isolation"] = "process"
    status["models"]["tts"]["worker"] = {
        "device_bytes": held and held * GB, "context_bytes": None if context is None else context * GB,
    }  # fmt: skip
    parts = {part: nbytes // GB for part, _, nbytes in views.memory_parts(status)}
    assert (parts["process"], parts["outside"]) == (0, 0)
    assert tuple(parts[part] for part in ("model-0", "context", "peers", "others", "free")) == sizes


def isolated(manager: GPUResourceManager, **change: Any) -> dict[str, Any]:
    """A status with a worker process, and its ``change``; of a model that has none if it is released."""
    status: dict[str, Any] = manager.status()
    worker = {"pid": 4711, "device_bytes": GB, "host_bytes": 13 * GB, "context_bytes": GB, "checkpointed": False,
              "last_offload": None}  # fmt: skip
    state = change.pop("state", "cpu")
    status["isolation"] = "process"
    status["device"].update(total_bytes=4 * GB, free_bytes=3 * GB, process_bytes=GB)
    status["models"]["tts"].update(state=state, worker=None if state == "released" else worker | change)
    return status


def test_a_worker_process_is_named_with_what_it_leaves_on_the_card(manager: GPUResourceManager) -> None:
    status = isolated(manager)
    shown = views.device_html(status, en)
    assert "<i data-part='context' style='width:25.00%'></i>" in shown
    assert "<span data-part='context'>Context and workspaces 1 GB</span>" in shown
    assert "This process, other" not in shown
    assert "<span data-part='context'>上下文与工作区 1 GB</span>" in views.device_html(status, zh)
    status["host"]["process_bytes"] = GB
    assert "this process 1 GB, worker processes 13 GB (models 0 B of it)" in views.device_html(status, en)
    assert "本进程 1 GB，工作进程 13 GB（其中模型 0 B）" in views.device_html(status, zh)
    shown = views.model_html("tts", status, en)
    assert "Worker process<b>pid 4711</b>" in shown
    assert "Context and workspaces<b>1 GB</b>" in shown
    kept = "Its worker process keeps 1 GB on the simulated GPU (CUDA context and workspaces) until a release."
    assert kept in shown
    assert kept in status_text.as_text(status, en)
    assert "Worker process pid 4711" in status_text.as_text(status, en)
    in_chinese = views.model_html("tts", status, zh)
    assert "工作进程<b>pid 4711</b>" in in_chinese
    assert "它的工作进程在模拟 GPU 上仍占 1 GB（上下文与工作区），释放后归零。" in in_chinese
    assert kept not in views.model_html("tts", isolated(manager, state="gpu"), en)
    assert "Context and workspaces" not in views.model_html("tts", isolated(manager, context_bytes=None), en)


def test_after_a_release_or_a_checkpoint_nothing_is_left(manager: GPUResourceManager) -> None:
    assert "worker process" not in views.model_html("tts", manager.status(), en), "not without isolation"
    assert "worker process" not in views.device_html(manager.status(), en)
    status = isolated(manager, state="released")
    assert "It has no worker process: nothing of it is on the simulated GPU." in views.model_html("tts", status, en)
    assert "没有工作进程：模拟 GPU 上没有它的任何内容。" in views.model_html("tts", status, zh)
    status["device"]["kind"] = "cpu"
    assert "nothing of it" not in views.model_html("tts", status, en)
    status = isolated(manager, checkpointed=True, device_bytes=0, context_bytes=0)
    assert "to main memory: nothing of it is on the simulated GPU." in views.model_html("tts", status, en)
    assert "内容移到内存：模拟 GPU 上没有它的任何内容。" in views.model_html("tts", status, zh)


def test_where_no_size_is_known_there_is_no_bar(manager: GPUResourceManager) -> None:
    assert views.memory_parts(card(free=None, process=None, peers=None, model=1)) == []
    with GPUResourceManager(CpuDevice()) as here:
        assert "gpu-bar" not in views.device_html(here.status(), en)
    assert "gpu-bar" in views.device_html(manager.status(), en)


def test_memory_outside_the_books_has_a_part_of_the_bar(manager: GPUResourceManager) -> None:
    assert "Unmanaged memory" not in views.device_html(manager.status(), en)
    status = manager.status()
    status["device"].update(outside_bytes=12 * GB, free_bytes=36 * GB, total_bytes=48 * GB)
    shown = views.device_html(status, en)
    assert "<i data-part='outside' style='width:25.00%'></i>" in shown
    assert "<span data-part='outside'>Unmanaged memory 12 GB</span>" in shown
    assert "<span data-part='outside'>未受管理的显存 12 GB</span>" in views.device_html(status, zh)


def test_while_a_model_comes_its_numbers_are_those_of_the_bar(manager: GPUResourceManager) -> None:
    status = manager.status()
    way = {"to": "gpu", "phase": "copying", "bytes": 0, "total_bytes": None, "bytes_per_s": None, "seconds": 1.0}
    status["device"].update(total_bytes=48 * GB, free_bytes=41 * GB, process_bytes=7 * GB)
    status["models"]["tts"].update(state="moving", progress=way, size_bytes=12 * GB)
    assert "<span data-part='model-0'>tts 7 GB</span>" in views.device_html(status, en)
    assert "This process, other" not in views.device_html(status, en)
    assert "Simulated GPU memory<b>7 GB</b>" in views.model_html("tts", status, en)


def test_the_page_counts_how_long_a_request_holds_a_model(manager: GPUResourceManager, clock: ManualClock) -> None:
    with manager.lease("tts"):
        clock.advance(3)
        time = "<time data-s='3.0' data-way='1'>3 s</time>"
        assert f"Held for {time} by " in views.model_html("tts", manager.status(), en)
        assert f"已占用 {time}" in views.model_html("tts", manager.status(), zh)
    assert "Held for" not in views.model_html("tts", manager.status(), en)


def test_what_is_not_kept_in_main_memory_is_told(manager: GPUResourceManager) -> None:
    status = manager.status()
    status["models"]["tts"].update(state="cpu", host_bytes=2 * GB, size_bytes=12 * GB)
    shown = views.model_html("tts", status, en)
    assert "Main memory<b>2 GB</b>" in shown
    assert "Rebuilt on return<b>10 GB</b>" in shown
    assert "Of its 12 GB on the device, 10 GB are in the model's files anyway" in shown
    assert "Of its 12 GB on the device" in status_text.as_text(status, en)
    in_chinese = views.model_html("tts", status, zh)
    assert "恢复时重建<b>10 GB</b>" in in_chinese
    assert "模型在设备上占 12 GB；其中 10 GB 在模型文件中已有" in in_chinese
    for change in ({"host_bytes": 12 * GB}, {"state": "gpu"}, {"state": "released", "host_bytes": 0}):
        status["models"]["tts"].update(state="cpu", host_bytes=2 * GB)
        status["models"]["tts"].update(change)
        assert "ebuilt" not in views.model_html("tts", status, en)


def test_main_memory_shows_what_the_process_takes(manager: GPUResourceManager) -> None:
    status = manager.status()
    assert status["host"]["process_bytes"] > 1 << 20
    status["host"] = {"total_bytes": 64 * GB, "free_bytes": 40 * GB, "process_bytes": 15 * GB, "outside_bytes": 0}
    status["models"]["tts"]["host_bytes"] = 12 * GB
    said = "Main memory: this process 15 GB (models 12 GB of it), 40 GB of 64 GB free"
    assert said in views.device_html(status, en)
    assert "内存：本进程 15 GB（其中模型 12 GB），可用 40 GB，共 64 GB" in views.device_html(status, zh)


def test_the_power_that_the_card_draws_is_shown_if_it_is_known(manager: GPUResourceManager) -> None:
    status = manager.status()
    assert " W" not in views.device_html(status, en)
    status["device"]["power_w"] = 67.6
    assert "power 68 W" in views.device_html(status, en)
    assert "功耗 68 W" in views.device_html(status, zh)


def test_times_are_shown_as_they_were_set(manager: GPUResourceManager) -> None:
    manager.configure("tts", keep_warm=-1, idle_timeout=-1)
    shown = views.model_html("tts", manager.status(), en)
    assert "Keep warm<b>always" in shown
    assert "Idle timeout<b>never" in shown
    manager.configure("tts", keep_warm="auto", idle_timeout="15m")
    shown = views.model_html("tts", manager.status(), en)
    assert "Keep warm<b>auto (" in shown
    assert "Idle timeout<b>15 min" in shown
    assert "<b>tts</b> Keep warm: auto (0 s) · Idle timeout: 15 min" in views.stay_html(manager.status(), en)
    manager.configure("tts", keep_warm=0)
    assert "保持在 GPU：请求后立即离开 · 空闲多久后释放：15 min" in views.stay_html(manager.status(), zh)


def test_a_time_that_a_request_asked_for_is_shown_as_such(manager: GPUResourceManager) -> None:
    manager.configure("tts", keep_warm="auto")
    for keep_warm, english, chinese in (
        (300, "5 min (as the last request asked)", "5 min（按上次请求）"),
        (-1, "always (as the last request asked)", "一直（按上次请求）"),
        (0, "leaves right after a request (as the last request asked)", "请求后立即离开（按上次请求）"),
    ):
        with manager.lease("tts", keep_warm=keep_warm):
            pass
        assert f"Keep warm<b>{english}" in views.model_html("tts", manager.status(), en)
        assert chinese in views.stay_html(manager.status(), zh)


def test_the_wait_of_the_last_request_is_shown_from_the_first_on(manager: GPUResourceManager) -> None:
    assert "Last request" not in views.model_html("tts", manager.status(), en)
    status = manager.status()
    status["models"]["tts"]["last_wait"] = {"waited_s": 2.1, "queue_s": 0.5, "move": "restore", "move_s": 1.6}
    shown = views.model_html("tts", status, en)
    assert "Last request: waited 2.1 s: 1.6 s for the model's return to the simulated GPU, 0.5 s for other" in shown
    assert "上次请求：等待 2.1 秒：模型恢复到模拟显存 1.6 秒，其他请求或搬移 0.5 秒" in views.model_html(
        "tts", status, zh
    )


def test_a_model_that_was_unregistered_is_shown_no_more(manager: GPUResourceManager) -> None:
    assert views.model_html("asr", manager.status(), en) == ""


class TestPast:
    def test_what_was_given_back_is_one_line(self, manager: GPUResourceManager) -> None:
        history = manager.history()
        history["models"]["tts"]["totals"]["given_back_byte_hours"] = 12.4 * GB
        assert "Simulated GPU memory given back so far: 12.4 GB·h" in views.past_html(history, "simulated", en)
        assert "迄今归还的显存：12.4 GB·h" in views.past_html(history, "cuda", zh)
        history["models"]["tts"]["totals"]["given_back_byte_hours"] = None
        assert "given back" not in views.past_html(history, "cpu", en)

    def used(self, manager: GPUResourceManager, clock: ManualClock) -> dict[str, Any]:
        with manager.lease("tts"):
            clock.advance(30)
        clock.advance(60)
        return manager.history()

    def test_moves_are_told_the_last_one_first(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        shown = views.past_html(self.used(manager, clock), "simulated", en)
        rows = [re.sub("<[^>]+>", "|", row) for row in shown.split("<tr>")[2:]]
        assert "simulated GPU → main memory" in rows[0]
        assert "released → simulated GPU" in rows[1]
        assert "60 s" in rows[0]
        assert "90 s" in rows[1]

    def test_a_move_that_failed_says_so(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        history = self.used(manager, clock)
        history["models"]["tts"]["moves"][0]["outcome"] = "failed"
        assert "failed" in views.past_html(history, "simulated", en)
        assert "失败" in views.past_html(history, "simulated", zh)

    def test_the_picture_has_the_sizes_and_the_requests(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        history = self.used(manager, clock)
        history["models"]["asr"] = {"device_bytes": [[45.0, 300], [10.0, 0]], "requests": [[45.0, 10.0]], "moves": []}
        shown = chart(history, "simulated", en)
        assert "data-requests='2'" in shown
        assert "data-peak='300'" in shown, "they were not there at the same time"
        # From 90 to 60 seconds before now, in a picture 600 wide for 900 seconds.
        assert "<rect x='540.0' y='102' width='20.0'" in shown
        assert "L540.0 100.0L540.0" in shown
        assert shown.count("data-part='model-0' />") == shown.count("data-part='model-1' />") == 1

    def test_the_picture_has_the_models_on_top_of_each_other(
        self, manager: GPUResourceManager, clock: ManualClock
    ) -> None:
        history = self.used(manager, clock)
        history["models"]["tts"]["device_bytes"] = [[90.0, 512], [60.0, 0]]
        history["models"]["asr"] = {"device_bytes": [[75.0, 256], [10.0, 0]], "requests": [], "moves": []}
        areas = re.findall(r"<path d='([^']+)' data-part='model-\d' />", chart(history, "simulated", en))
        assert ["L550.0 50.0L550.0 25.0" in area for area in areas] == [True, False], "768 of 1,024 bytes, then 512"
        assert "data-peak='768'" in chart(history, "simulated", en)

    def test_what_others_use_of_the_card_is_drawn_behind_the_models(
        self, manager: GPUResourceManager, clock: ManualClock
    ) -> None:
        history = self.used(manager, clock)
        history["device"] = {"used_bytes": [[90.0, 20 * GB], [30.0, 30 * GB]], "total_bytes": 48 * GB}
        shown = chart(history, "cuda", en)
        assert f"data-top='{32 * GB}'" in shown
        assert "<span>32 GB</span><span>16 GB</span><span>0 B</span>" in shown
        assert "M540.0 100L540.0 100.0L540.0 37.5L580.0 37.5L580.0 6.2L600 6.2L600 100Z' data-part='card'" in shown
        assert shown.index("data-part='card' />") < shown.index("data-part='model-0' />")
        assert "Used on the card" in shown
        assert "GPU memory, last 15 minutes" in shown
        assert "<span>-15 min</span>" in shown
        shorter = chart({**history, "window_s": 300.0}, "cuda", en)
        assert "GPU memory, last 5 minutes" in shorter
        assert "<span>-5 min</span>" in shorter

    def test_a_simulated_card_is_called_so_in_the_past_too(
        self, manager: GPUResourceManager, clock: ManualClock
    ) -> None:
        shown = views.past_html(self.used(manager, clock), "simulated", zh)
        assert "最近 15 分钟的模拟显存" in shown
        assert "模拟 GPU → 内存" in shown
        assert "Main memory of the models" in views.past_html(manager.history(), "cpu", en)

    @pytest.mark.parametrize(
        ("peak", "total", "top"),
        [
            (0, None, 1024),
            (13 << 20, 48 * GB, 16 << 20),
            (20 * GB, 48 * GB, 24 * GB),
            (23 * GB, 48 * GB, 32 * GB),
            (70 * GB, 80 * GB, 80 * GB),
            (80 * GB, 80 * GB, 80 * GB),
        ],
    )
    def test_the_scale_ends_at_a_round_size_and_not_beyond_the_card(
        self, peak: int, total: int | None, top: int
    ) -> None:
        assert scale_top(peak, total) == top

    def test_a_name_from_outside_is_escaped(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        history = self.used(manager, clock)
        history["models"] = {"<script>": history["models"]["tts"]}
        assert "<script>" not in views.past_html(history, "simulated", en)

    def test_nothing_has_happened_yet(self, manager: GPUResourceManager) -> None:
        shown = views.past_html(manager.history(), "simulated", en)
        assert "data-peak='0'" in shown
        assert "<table" not in shown
