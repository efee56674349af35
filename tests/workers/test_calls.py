"""Calls of engines in worker processes: what goes there, and what comes back."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from worker_engines import LINUX, Answer, Engine, EngineError, Gate, Listed, started

from residency.engines.part_proxy import Part
from residency.errors import ManagerClosed, PartGone, TensorAway
from residency.memory import self_moving
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(100_000.0), torch.ones(3, 4).t(), torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3),
        torch.tensor(2.5), torch.ones(3, dtype=torch.complex64).conj(), torch.eye(3).to_sparse(),
    ],
)  # fmt: skip
def test_tensors_come_back_as_they_are(tts: GPUManagedTTS, value: torch.Tensor) -> None:
    answer = tts.echo(value)
    assert answer.dtype is value.dtype
    assert answer.shape == value.shape
    assert torch.equal(answer.to_dense(), value.to_dense())


@pytest.mark.parametrize("size", [4, 100_000])
def test_views_and_storages_come_back_as_they_are(tts: GPUManagedTTS, size: int) -> None:
    weight = torch.arange(2.0 * size).reshape(2, size)
    view, storage = tts.echo([memoryview(weight.numpy()), weight.untyped_storage()])
    assert (view.format, view.shape) == ("f", (2, size))
    assert numpy.array_equal(view, weight.numpy())
    assert storage.nbytes() == 8 * size
    assert torch.equal(torch.empty(0).set_(storage), weight.flatten())
    bytes_view = tts.echo(memoryview(b"ab"))
    assert bytes_view == b"ab"
    first, second, other = tts.echo([weight.view(-1), weight.view(-1), weight[0]])
    assert first.data_ptr() == second.data_ptr() != other.data_ptr()


def test_a_large_result_can_be_changed(tts: GPUManagedTTS) -> None:
    audio, rate = tts.audio(100_000)
    audio += 1
    assert rate == 24_000
    assert audio[0, :3].tolist() == [1, 2, 3]


def test_arrays_dataclasses_and_errors_are_results(tts: GPUManagedTTS) -> None:
    array = numpy.arange(50_000, dtype=numpy.int16)
    back = tts.echo({"array": array, "names": ["a", ("b", 1.5)]})
    assert numpy.array_equal(back["array"], array)
    assert back["names"] == ["a", ("b", 1.5)]
    answer = tts.answer()
    assert isinstance(answer, Answer)
    assert answer.words == ["one", "two"]
    assert isinstance(tts.echo(ValueError("a result")), ValueError)


def test_parts_are_arguments(tts: GPUManagedTTS) -> None:
    assert tts.is_own(tts.model)
    assert tts.is_own(tts.speaker)
    assert tts.apply(lambda model: model.in_features, tts.model) == 4


def test_functions_run_in_the_worker(tts: GPUManagedTTS) -> None:
    factor = 3
    assert tts.apply(lambda value: (value * factor, os.getpid()), 5) == (15, tts.pid())
    assert tts.pid() != os.getpid()


def test_streams_step_by_step(tts: GPUManagedTTS) -> None:
    assert [item.tolist() for item in tts.stream(3)] == [[0, 0], [1, 1], [2, 2]]
    assert tts.closed == ["stream of 3, gradients True"]
    assert tts.gradients()  # of a step belongs to its thread


def test_a_stream_that_is_closed_or_dropped_ends_in_the_worker(tts: GPUManagedTTS) -> None:
    stream = tts.stream(5)
    next(stream)
    stream.close()
    dropped = tts.stream(6)
    next(dropped)
    del dropped
    assert tts.closed == ["stream of 5, gradients True", "stream of 6, gradients True"]


def test_a_stream_that_fails_ends_with_its_error(tts: GPUManagedTTS) -> None:
    stream = tts.stream(5, fails_at=1)
    assert next(stream).tolist() == [0, 0]
    with pytest.raises(EngineError, match="error 1"):
        next(stream)
    assert list(stream) == []
    assert tts.closed == ["stream of 5, gradients True"]


def test_what_cannot_be_pickled_is_a_proxy(tts: GPUManagedTTS) -> None:
    speaker = tts.new_speaker()
    assert isinstance(speaker, Part)
    assert speaker.says("hello") == "Bob: hello"
    number, other = tts.speakers()
    assert (number, other.name) == (1, "Bob")


def test_an_object_of_the_worker_is_freed_with_its_proxy(tts: GPUManagedTTS) -> None:
    before = tts.living()
    speaker, pair, name = tts.new_speaker(), tts.speakers(), tts.new_speaker().says
    assert tts.living() == before + 3
    assert name("hello") == "Bob: hello"
    del speaker, pair, name
    gc.collect()
    assert tts.living() == before


def test_an_object_within_a_list_is_freed_with_its_proxy(tts: GPUManagedTTS) -> None:
    caches = tts.new_caches()
    assert isinstance(caches[0], Part)
    assert tts.new_caches_live()
    del caches
    gc.collect()
    assert not tts.new_caches_live()


def test_a_proxy_of_an_earlier_worker_is_gone(tts: GPUManagedTTS) -> None:
    speaker = tts.new_speaker()
    tts.force_release()
    assert tts.new_speaker().name == "Bob"
    with pytest.raises(PartGone, match="Speaker"):
        speaker.name  # noqa: B018


def test_attributes_are_set_under_a_lease(tts: GPUManagedTTS) -> None:
    with tts.lease() as engine:
        engine.volume = 2.0
        engine.caches.scale = 0.5
        engine.speaker.name = "Eve"
        assert engine.caches.scale == 0.5
    assert tts.audio(3)[0].tolist() == [[0, 2, 4]]
    assert tts.speaker.says("hi") == "Eve: hi"
    tts.force_offload()
    assert tts.volume == 2.0
    tts.force_release()
    assert tts.volume == 1.0


def test_an_engine_may_be_a_container(another: Callable[..., GPUManagedTTS]) -> None:
    tts = another(lambda: {"llm": torch.nn.Linear(2, 2), "rate": 24_000})
    with tts.lease() as engine:
        assert engine["rate"] == 24_000
        assert engine["llm"].in_features == 2
        assert len(engine) == 2
        assert list(engine) == ["llm", "rate"]
        assert engine.keys().__class__.__name__ == "dict_keys"


def test_an_engine_is_its_own_argument(tts: GPUManagedTTS) -> None:
    with tts.lease() as engine:
        assert engine.apply(lambda there: there.volume, engine) == 1.0


def test_reading_overlaps_a_request(tts: GPUManagedTTS, gate: Gate) -> None:
    running = started(tts.call, gate)
    gate.reached()
    assert tts.volume == 1.0
    assert not running.done()
    gate.open()
    running.result(60)


def test_two_models_run_at_once(another: Callable[..., GPUManagedTTS], new_gate: Callable[[], Gate]) -> None:
    first, second = another(), another()
    gates = [new_gate(), new_gate()]
    calls = [started(tts.call, gate) for tts, gate in zip((first, second), gates, strict=True)]
    for gate in gates:
        gate.reached()
    assert first.manager.status()["models"][first.name]["leases"] == 1
    for gate in gates:
        gate.open()
    for call in calls:
        call.result(60)
    assert first.pid() != second.pid()


def test_sixteen_threads_call_one_engine(tts: GPUManagedTTS) -> None:
    with tts.lease() as engine, ThreadPoolExecutor(16) as pool:  # the engine is used without further leases
        answers = [pool.submit(engine.echo, torch.full((20_000,), number)) for number in range(160)]
        assert [int(answer.result(60)[-1]) for answer in answers] == list(range(160))


def test_a_stale_engine_is_refused(tts: GPUManagedTTS) -> None:
    with tts.lease() as engine:
        pass
    tts.force_offload()
    with pytest.raises(TensorAway, match="not on the device"):
        engine.audio(3)


def test_ten_minutes_of_audio(tts: GPUManagedTTS) -> None:
    """The target is 50 ms; ``benchmarks/isolation.py`` measures it."""
    began_s = time.perf_counter()
    audio, _ = tts.audio(600 * 24_000)
    print(f"{(time.perf_counter() - began_s) * 1000:.0f} ms")
    assert audio.shape == (1, 600 * 24_000)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_worker_alone(tts: GPUManagedTTS) -> None:
    speaker = tts.new_speaker()
    with tts.lease() as engine:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                engine.audio(3)
            except ManagerClosed:
                del speaker
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert engine.audio(1)[1] == 24_000
    assert speaker.name == "Bob"


def test_a_finalizer_within_a_send_sends_nothing(tts: GPUManagedTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """A garbage collection may run at any point, in a thread that holds the lock of the connection."""
    stream, kept = tts.stream(3), [tts.new_speaker()]
    next(stream)
    channel = tts.manager._managed_models[tts.name].resident.worker._channel
    done = threading.Event()

    def collect() -> None:
        nonlocal stream
        with channel._sending:
            kept.clear()
            stream = None
        done.set()

    threading.Thread(target=collect, daemon=True).start()
    assert done.wait(60)
    assert tts.closed == ["stream of 3, gradients True"]


def test_an_engine_is_built_with_this_processs_settings(
    another: Callable[..., GPUManagedTTS], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AN_ENGINES_SETTING", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        tts = another()
        made = tts.apply(
            lambda _: (os.environ["AN_ENGINES_SETTING"], os.getcwd(), sys.path[0], torch.get_num_threads(),
                       torch.ones(1).dtype, torch.get_float32_matmul_precision()), None,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
    assert made == ("1", str(tmp_path), str(tmp_path), 3, torch.float64, "medium")


def test_changes_in_place_change_a_copy_and_assignments_the_engine(tts: GPUManagedTTS) -> None:
    with tts.lease() as engine:
        engine.closed.append("lost")
        assert engine.closed == []
        engine.closed += ["kept"]
        engine.volume += 1
        engine.caches.scale = 3.0
        engine.options = {"speed": 1}
        engine.options["speed"] = 2
        assert (engine.closed, engine.volume, engine.caches.scale) == (["kept"], 2.0, 3.0)
        assert engine.options == {"speed": 1}
        engine.options |= {"speed": 2}
        assert engine.options == {"speed": 2}
        with pytest.raises(TypeError, match="item assignment"):
            engine.caches["scale"] = 1.0


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without gradients": lambda: combined(torch.no_grad(), torch.autocast("cpu", torch.float16)),
    "gradients again": lambda: combined(torch.no_grad(), torch.enable_grad()),
    "inference_mode with gradients": lambda: combined(torch.inference_mode(), torch.enable_grad()),
    "normal tensors again": lambda: combined(torch.inference_mode(), torch.inference_mode(False)),
}


def combined(*contexts: AbstractContextManager[Any]) -> ExitStack:
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_call_computes_with_its_callers_settings_of_torch(tts: GPUManagedTTS, settings: str) -> None:
    here = Engine()
    with SETTINGS[settings]():
        assert tts.modes() == here.modes()
        assert list(tts.stream_of_modes()) == list(here.stream_of_modes())
    assert tts.modes() == here.modes()


def test_a_call_uses_the_default_type_of_its_time(tts: GPUManagedTTS) -> None:
    tts.pid()
    torch.set_default_dtype(torch.float64)
    try:
        assert tts.apply(lambda _: torch.ones(1).dtype, None) == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert tts.apply(lambda _: torch.ones(1).dtype, None) == torch.float32


def test_moves_that_were_registered_here_are_used_there(
    another: Callable[..., GPUManagedTTS], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = self_moving.OwnMoves(lambda thing: thing.says.append("offload"), lambda thing: thing.says.append("restore"))
    self_moving.register("worker_engines.Listed", moved)
    try:
        tts = another(Listed)
        assert tts.says == []
        tts.force_offload()
        assert tts.says == ["offload", "restore"]
    finally:
        del self_moving.registered["worker_engines.Listed"], self_moving._by_name["worker_engines.Listed"]


def test_an_engine_that_is_loaded_in_the_worker_is_not_here(another: Callable[..., GPUManagedTTS]) -> None:
    made: list[Any] = []

    def load() -> Engine:
        made.append(1)
        return Engine()

    assert another(load).pid() != os.getpid()
    assert made == []
