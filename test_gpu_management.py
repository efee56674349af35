"""What GPU management promises, told as tests. Any machine can run them: the card is simulated, the speech is real.

    python test_gpu_management.py        # needs only requirements.txt
    python -m pytest test_gpu_management.py

Time is turned by hand and nothing sleeps. Break a promise in the code and its test fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch

from gpu_manager import CpuDevice, GPUResourceManager, SimulatedDevice, State
from residency.clock import ManualClock
from residency.engines.builtin import BuiltinEngine
from residency.errors import InvalidInput
from residency.workers.spawner import can_fork_workers
from tts_gpu_managed import GPUManagedTTS

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime leaves a file behind otherwise

CARD_BYTES = 48 << 30
SENTENCE = "The graphics card is free whenever nobody is speaking."


class OneAtATime(BuiltinEngine):
    """The built-in engine, which notices when two requests use it at once."""

    calls = 0

    def edit(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, int]:
        self.calls += 1
        assert self.calls == 1, "two requests use the engine at once"
        try:
            return super().edit(*arguments, **keywords)
        finally:
            self.calls -= 1


class Story:
    """The built-in speech engine under management on a simulated 48 GB card."""

    def __init__(self, prompt: Path, **settings: Any) -> None:
        self.prompt = str(prompt)
        self.clock = ManualClock()
        self.device = settings.pop("device", None) or SimulatedDevice(capacity_bytes=CARD_BYTES)
        self.manager = GPUResourceManager(self.device, clock=self.clock, **settings)
        load = partial(OneAtATime, device=self.device.torch_device)
        self.tts = GPUManagedTTS(None, None, manager=self.manager, load=load, gpu_idle_timeout=600)

    def clone(self, text: str = SENTENCE) -> torch.Tensor:
        """One request, with the random numbers of seed 0."""
        torch.manual_seed(0)
        audio, sample_rate = self.tts.clone(self.prompt, "This is my voice.", text)
        assert sample_rate == 24000
        return audio

    @property
    def model(self) -> dict[str, Any]:
        return self.tts.get_gpu_status()["models"]["tts"]

    @property
    def loads(self) -> int:
        moves = self.manager.history()["models"]["tts"]["totals"]["moves"]
        return sum(move["count"] for move in moves if move["from"] == "released")


@cache
def recording() -> bytes:
    """A WAV file with a voice."""
    from hibari import Hibari

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt.wav"
        Hibari().save("This is my voice, and I am going to keep it.", str(file), seed=1)
        return file.read_bytes()


@contextmanager
def story(**settings: Any) -> Iterator[Story]:
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.wav"
        prompt.write_bytes(recording())
        told = Story(prompt, **settings)
        try:
            yield told
        finally:
            told.manager.close()
    assert getattr(told.device, "ledger_bytes", 0) == 0, "after close() nothing is left on the card"


def test_lazy_load() -> None:
    """Nothing is loaded until the first request; then once, and never again for the next."""
    with story() as told:
        assert told.loads == 0
        assert told.model["state"] == "released"
        assert told.device.ledger_bytes == 0
        told.clone()
        told.clone()
        assert told.loads == 1


def test_offload_after_use() -> None:
    """The model is on the GPU during a request and off it right after: every byte, sessions and tensors alike."""
    seen_during_request: list[dict[str, Any]] = []
    with story() as told:
        with told.manager.lease("tts") as engine:
            seen_during_request.append(told.model)
            assert engine.clone(told.prompt, "This is my voice.", SENTENCE)[1] == 24000
        assert seen_during_request[0]["state"] == "gpu"
        assert seen_during_request[0]["device_bytes"] > 10_000_000
        assert told.model["state"] == "cpu"
        assert told.model["device_bytes"] == 0 == told.device.ledger_bytes
        assert told.model["last_move"]["from"] == "gpu"
        assert told.model["last_move"]["bytes"] == seen_during_request[0]["device_bytes"]


def test_offload_after_a_request_that_fails() -> None:
    """A request that fails raises what the engine raised, and the model leaves the GPU all the same."""
    with story() as told:
        refusal = None
        try:
            told.tts.clone(told.prompt, "This is my voice.", "")
        except InvalidInput as error:
            refusal = error
        assert refusal is not None, "an empty text was accepted"
        assert refusal.en
        assert refusal.zh
        assert told.model["state"] == "cpu"
        assert told.device.ledger_bytes == 0
        assert told.clone().abs().max() > 0.01


def test_fast_restore() -> None:
    """The next request gets the weights back from main memory: no second load, and not a bit is different."""
    with story() as told:
        before = told.clone()
        moves = [told.model["last_move"]]
        with told.manager.lease("tts"):
            moves.append(told.model["last_move"])
        assert (moves[1]["from"], moves[1]["to"]) == ("cpu", "gpu")
        assert moves[1]["bytes"] == moves[0]["bytes"]
        assert torch.equal(told.clone(), before)
        assert told.loads == 1


def test_bit_identical_to_the_engine_alone() -> None:
    """With the same seed, managed speech equals unmanaged speech, before and after offload and release."""
    with story() as told:
        bare = BuiltinEngine()
        torch.manual_seed(0)
        alone, _ = bare.clone(told.prompt, "This is my voice.", SENTENCE)
        assert torch.equal(told.clone(), alone), "on the first request, which loads"
        assert torch.equal(told.clone(), alone), "after an offload"
        told.tts.force_release()
        assert torch.equal(told.clone(), alone), "after a release"
        for edit in (("speed", "faster"), ("denoise", None), ("vad", None), ("style", "whisper")):
            torch.manual_seed(0)
            alone, _ = bare.edit(told.prompt, "This is my voice.", *edit)
            torch.manual_seed(0)
            managed, _ = told.tts.edit(told.prompt, "This is my voice.", *edit)
            assert torch.equal(managed, alone), edit


def test_idle_release() -> None:
    """Idle long enough, it gives up main memory too; the request after that loads again."""
    with story() as told:
        told.clone()
        told.clock.advance(599)
        assert told.model["state"] == "cpu"
        told.clock.advance(1)
        assert told.manager.wait_for("tts", State.RELEASED, timeout=30)
        assert told.model["host_bytes"] == 0
        told.clone()
        assert told.loads == 2


def test_keep_warm() -> None:
    """With keep-warm it stays on the GPU for a while, for conversations."""
    with story(keep_warm="30s") as told:
        told.clone()
        told.clock.advance(29)
        assert told.model["state"] == "gpu"
        told.clock.advance(1)
        assert told.manager.wait_for("tts", State.HOST, timeout=30)


def test_status() -> None:
    """Status says where the bytes are, and asking does not count as use."""
    with story() as told:
        told.clone()
        told.clock.advance(42)
        status = told.tts.get_gpu_status()
        assert status["enabled"] is True
        assert status["device"]["kind"] == "simulated"
        assert "Simulated" in status["device"]["name"]
        assert status["device"]["total_bytes"] == status["device"]["free_bytes"] == CARD_BYTES
        assert status["models"]["tts"]["idle_s"] == 42
        assert status["models"]["tts"]["host_bytes"] > 0
        assert told.tts.get_gpu_status()["models"]["tts"]["idle_s"] == 42


def test_manual_control() -> None:
    """Offload, release and warm by hand do what they say."""
    with story(keep_warm=-1) as told:
        told.clone()
        assert told.model["state"] == "gpu"
        assert told.tts.force_offload() is True
        assert told.model["state"] == "cpu"
        assert told.tts.force_release() is True
        assert told.model["state"] == "released"
        assert told.model["host_bytes"] == told.model["device_bytes"] == 0
        told.manager.warm("tts")
        assert told.manager.wait_for("tts", State.DEVICE, timeout=60)
        assert told.loads == 2


def test_manual_control_waits_for_the_running_request() -> None:
    """A release pressed in the middle of a request follows it; the request gets its answer."""
    with story() as told:
        with told.manager.lease("tts") as engine:
            assert told.tts.force_release() is False
            assert told.model["pending"] == "release"
            audio, _ = engine.clone(told.prompt, "This is my voice.", SENTENCE)
            assert audio.abs().max() > 0.01
        assert told.model["state"] == "released"


def test_many_requests_at_once() -> None:
    """Requests from many threads load the model once and all get the right answer."""
    with story() as told:
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(told.tts.edit(told.prompt, "", "speed", "faster")))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 6
        assert all(torch.equal(audio, answers[0][0]) for audio, _ in answers)
        assert told.loads == 1


def test_without_a_gpu() -> None:
    """On a machine without a GPU it never claims one, and release frees main memory."""
    with story(device=CpuDevice()) as told:
        with told.manager.lease("tts"):
            assert told.model["state"] == "cpu"
        assert told.model["state"] == "cpu"
        assert "saves nothing" in told.tts.get_gpu_status()["device"]["note"]["en"]
        told.tts.force_release()
        assert told.model["state"] == "released"
        assert told.model["host_bytes"] == 0


def test_off_by_default() -> None:
    """Without --enable-gpu-management the app has no management."""
    from residency.launch.settings import parse

    assert parse([]).enable_gpu_management is False
    assert parse(["--enable-gpu-management"]).enable_gpu_management is True


def test_worker_process() -> None:
    """With process isolation the speech is the same, and a release leaves no byte and no process (Linux)."""
    if not can_fork_workers():
        return
    with story(isolation="none") as told:
        expected = told.clone()
    card = SimulatedDevice(capacity_bytes=CARD_BYTES, context_bytes=400 << 20)
    with tempfile.TemporaryDirectory() as folder, GPUResourceManager(card, isolation="process") as manager:
        prompt = Path(folder) / "prompt.wav"
        prompt.write_bytes(recording())
        tts = GPUManagedTTS(None, manager=manager)
        for give_back in (tts.force_offload, tts.force_release):
            torch.manual_seed(0)
            audio, _ = tts.clone(str(prompt), "This is my voice.", SENTENCE)
            assert torch.equal(audio, expected)
            worker = psutil.Process(tts.get_gpu_status()["models"]["tts"]["worker"]["pid"])
            give_back()
            assert card.memory().process_bytes == 0
        assert not worker.is_running()


def main() -> int:
    """Run every test above without pytest; 0 if all hold."""
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    for name, test in tests:
        verdict = "ok  "
        try:
            test()
        except Exception:
            traceback.print_exc()
            verdict = "FAIL"
            failed += 1
        print(f"{verdict} {name}: {test.__doc__}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
