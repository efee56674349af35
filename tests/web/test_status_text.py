from __future__ import annotations

import re
from typing import Any

import pytest
from fakes import Gate, Workshop

from gpu_manager import CpuDevice, GPUResourceManager, State
from residency.clock import ManualClock
from residency.errors import InvalidInput
from residency.observability.error_classification import in_words
from residency.states import Place
from residency.status_types import MoveProgress
from residency.web.shared.language import both, en, zh
from residency.web.ui import status_text, views


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "—"),
        (0, "0 s"),
        (1e-5, "< 0.01 s"),
        (0.312, "0.31 s"),
        (42, "42 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
        (864_000, "10 d"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert status_text.readable_seconds(seconds) == text


def as_html(status: dict[str, Any]) -> str:
    """The card and all models."""
    models = (views.model_html(name, status, both) for name in status["models"])
    return views.device_html(status, both) + "".join(models)


def test_every_state_has_words_and_a_mark(manager: GPUResourceManager) -> None:
    status = manager.status()
    for state in status_text.STATES:
        status["models"]["tts"]["state"] = state
        assert f"data-model='tts' data-state='{state}'" in as_html(status)
        assert status_text.state_in_words(state, "simulated", both) in status_text.as_text(status)


def test_a_simulated_card_is_called_simulated(manager: GPUResourceManager) -> None:
    for shown in (status_text.as_text(manager.status()), as_html(manager.status())):
        assert "Simulated GPU (1 GB)" in shown
        assert "Simulated GPU memory" in shown
        assert "模拟 GPU" in shown


def test_chinese_has_its_own_punctuation_and_one_word_for_one_thing(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        pass
    manager.release("tts")
    manager.configure("tts", keep_warm="auto")
    status = manager.status()
    status["models"]["tts"]["last_error"] = "OSError: no weights"
    outcome = status_text.outcome("tts", status["models"]["tts"], "simulated", zh)
    html = "".join(re.findall(">([^<>]+)", views.model_html("tts", status, zh) + views.stay_html(status, zh)))
    for shown in (status_text.as_text(status, zh), html, outcome):
        assert not re.search(r"[:,(]", str(shown).replace("OSError: ", "")), shown
        assert "闲置" not in str(shown)
    assert "模拟 GPU（1 GB）：已用 0 B，共 1 GB" in status_text.as_text(status, zh)


def test_no_other_card_is_called_simulated(manager: GPUResourceManager) -> None:
    status = manager.status()
    status["device"] |= {"kind": "cuda", "name": "NVIDIA L40S", "note": None}
    status["models"]["tts"]["state"] = "gpu"
    assert "On the GPU" in status_text.as_text(status)
    assert "imulated" not in as_html(status)


def test_on_a_cpu_offload_is_said_to_save_nothing() -> None:
    with GPUResourceManager(CpuDevice()) as manager:
        manager.register("tts", object)
        status = manager.status()
        assert "Offload saves nothing; release frees main memory" in status_text.as_text(status)
        assert "release frees main memory" in status_text.pressed("offload", None, True, status, both)


def test_what_came_of_a_press_is_said_of_the_model_that_it_was_about(manager: GPUResourceManager) -> None:
    manager.register("asr", object)
    with manager.lease("tts"):
        pass
    status = manager.status()
    assert status_text.pressed("offload", "asr", True, status, en).startswith("Nothing to offload")
    assert status_text.pressed("offload", "tts", True, status, en) == "Offloaded to main memory."
    assert status_text.pressed("offload", None, True, status, zh) == "已卸载到内存。"
    assert status_text.pressed("release", "tts", False, status, zh).endswith("释放。")
    assert status_text.pressed("warm", "tts", False, status, en).startswith("Loading to the simulated GPU")


def test_what_comes_from_outside_is_escaped(manager: GPUResourceManager) -> None:
    status: dict[str, Any] = manager.status()
    status["device"]["name"] = "<script>card"
    status["models"] = {"<b>'tts": status["models"]["tts"] | {"last_error": "<i>oops"}}
    shown = as_html(status)
    assert "&lt;script&gt;card" in shown
    assert "&lt;i&gt;oops" in shown
    assert not {"<script>", "<b>'", "<i>oops"} & {part for part in ("<script>", "<b>'", "<i>oops") if part in shown}


class TestCourse:
    """Where a model goes, and what happens to it next."""

    def test_a_move_tells_where_how_far_and_how_fast(self, manager: GPUResourceManager) -> None:
        status = manager.status()
        status["models"]["tts"] |= {
            "state": "moving",
            "progress": {
                "to": "gpu",
                "phase": "restoring",
                "bytes": 3 << 30,
                "total_bytes": 12 << 30,
                "seconds": 1.5,
                "bytes_per_s": 2 << 30,
            },
        }
        assert "正在移至模拟显存 / To the simulated GPU: " in status_text.as_text(status)
        assert "To the simulated GPU: restoring · 3 GB / 12 GB · 2 GB/s · 1.5 s" in status_text.as_text(status, en)
        assert "正在移至模拟显存：恢复 · 3 GB / 12 GB · 2 GB/s · 1.5 s" in status_text.as_text(status, zh)
        assert "width:25.0%" in as_html(status)

    def test_what_nobody_knows_of_a_move_is_left_out(self) -> None:
        def move(phase: str, done: int, total: int | None, to: Place = "gpu") -> MoveProgress:
            return {"to": to, "phase": phase, "bytes": done, "total_bytes": total, "seconds": 1.0, "bytes_per_s": None}

        assert status_text.moving(move("thinking", 0, None), "cuda", en) == "To the GPU: thinking"
        assert status_text.moving(move("offloading", 0, 1 << 30, "cpu"), "cuda", en).endswith("offloading · 1 GB")
        assert status_text.share(move("copying", 5, None)) is status_text.share(move("copying", 0, 10)) is None
        assert status_text.share(move("copying", 20, 10)) == 1.0

    def test_what_a_moving_model_does_is_read_from_the_manager(
        self, manager: GPUResourceManager, workshop: Workshop
    ) -> None:
        workshop.gate = gate = Gate()
        manager.warm("tts")
        gate.wait_for_arrival()
        assert "To the simulated GPU: 构建 / building" in status_text.as_text(manager.status())
        gate.open()
        with manager.lease("tts"):
            pass

    def test_an_idle_model_tells_what_comes_next(self, manager: GPUResourceManager, clock: ManualClock) -> None:
        manager.configure("tts", keep_warm=30, idle_timeout=600)
        with manager.lease("tts"):
            assert "If no request comes" not in status_text.as_text(manager.status())
        clock.advance(18)
        assert "12 s 后卸载到内存 / to main memory in 12 s" in status_text.as_text(manager.status())
        assert "<time data-s='12.0' data-way='-1'>12 s</time>" in as_html(manager.status())
        manager.offload("tts")
        assert "10 min 后释放 / released in 10 min" in status_text.as_text(manager.status())
        manager.configure("tts", idle_timeout=-1)
        assert "If no request comes" not in status_text.as_text(manager.status())

    def test_a_model_that_was_warmed_does_not_contradict_its_keep_warm(self, manager: GPUResourceManager) -> None:
        manager.configure("tts", keep_warm=0)
        manager.warm("tts")
        assert manager.wait_for("tts", State.DEVICE, 10)
        shown = views.model_html("tts", manager.status(), en)
        assert "If no request comes: to main memory in" in shown
        assert "Keep warm<b>leaves right after a request" in shown

    def test_the_queue_is_counted(self, manager: GPUResourceManager) -> None:
        status = manager.status()
        status["models"]["tts"] |= {"leases": 1, "waiting": 3}
        for shown in (status_text.as_text(status), as_html(status)):
            assert "使用中 / In use · 3 个请求等待 / 3 waiting" in shown
        status["models"]["tts"] |= {"leases": 0, "waiting": 1}
        assert "In use" not in status_text.as_text(status)
        assert "1 waiting" in status_text.as_text(status)

    def test_the_last_error_is_said_in_the_language_of_who_reads(self, manager: GPUResourceManager) -> None:
        status = manager.status()
        error = in_words(InvalidInput("No weights: give a folder", "没有权重：请指定目录"))
        status["models"]["tts"]["last_error"] = status["monitor"]["last_error"] = error
        status["monitor"]["errors"] = 1
        assert status_text.remarks(status["models"]["tts"], zh) == ["上次错误：没有权重：请指定目录"]
        assert status_text.trouble(status, en) == ["Idle monitor, errors: 1×: No weights: give a folder"]

    def test_a_monitor_in_trouble_is_shown_and_one_that_is_not_needed_is_not(self, manager: GPUResourceManager) -> None:
        status = manager.status()
        assert not status["monitor"]["alive"]
        assert "monitor" not in status_text.as_text(status)
        status["models"]["tts"]["next"] = {"to": "cpu", "in_s": 5.0}
        for shown in (status_text.as_text(status), as_html(status)):
            assert "空闲监视线程未运行" in shown
            assert "The idle monitor is not running" in shown
        status["monitor"] = {"alive": True, "errors": 2, "last_error": "<OSError>"}
        assert "errors: 2×: <OSError>" in status_text.as_text(status)
        assert "&lt;OSError&gt;" in as_html(status)
