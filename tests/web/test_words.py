from __future__ import annotations

from typing import Any

import pytest

from gpu_manager import CpuDevice, GPUResourceManager
from residency.web import words


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (900, "900 B"),
        (1536, "1.5 KB"),
        (48 << 30, "48 GB"),
        ((1 << 30) - 1, "1024 MB"),
        (int(99.96 * 2**20), "100 MB"),
    ],
)
def test_bytes(nbytes: int | None, text: str) -> None:
    assert words.readable_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "—"), (0, "0 s"), (1e-5, "< 0.01 s"), (0.312, "0.31 s"), (42, "42 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert words.readable_seconds(seconds) == text


def test_every_state_has_words_and_a_mark(manager: GPUResourceManager) -> None:
    status = manager.status()
    for state in words.STATES:
        status["models"]["tts"]["state"] = state
        assert f"data-model='tts' data-state='{state}'" in words.as_html(status)
        assert words.state_in_words(state, "simulated") in words.as_text(status)


def test_a_simulated_card_is_called_simulated(manager: GPUResourceManager) -> None:
    for shown in (words.as_text(manager.status()), words.as_html(manager.status())):
        assert "Simulated GPU (1 GB)" in shown
        assert "Simulated GPU memory" in shown
        assert "模拟 GPU" in shown


def test_no_other_card_is_called_simulated(manager: GPUResourceManager) -> None:
    status = manager.status()
    status["device"] |= {"kind": "cuda", "name": "NVIDIA L40S", "note": None}
    status["models"]["tts"]["state"] = "gpu"
    assert "On the GPU" in words.as_text(status)
    assert "imulated" not in words.as_html(status)


def test_on_a_cpu_offload_is_said_to_save_nothing() -> None:
    with GPUResourceManager(CpuDevice()) as manager:
        manager.register("tts", object)
        status = manager.status()
        assert "Offload saves nothing; release frees RAM" in words.as_text(status)
        assert "release frees RAM" in words.pressed("offload", True, status)


def test_what_comes_from_outside_is_escaped(manager: GPUResourceManager) -> None:
    status: dict[str, Any] = manager.status()
    status["device"]["name"] = "<script>card"
    status["models"] = {"<b>'tts": status["models"]["tts"] | {"last_error": "<i>oops"}}
    shown = words.as_html(status)
    assert "&lt;script&gt;card" in shown
    assert "&lt;i&gt;oops" in shown
    assert not {"<script>", "<b>'", "<i>oops"} & {part for part in ("<script>", "<b>'", "<i>oops") if part in shown}
