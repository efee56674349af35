"""Errors of engines in worker processes, and full or lost devices there."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker_engines import LINUX, Engine, EngineError, of

from gpu_manager import GPUResourceManager, SimulatedDevice, State
from residency.errors import (
    DeviceLost,
    DeviceOutOfMemory,
    InvalidInput,
    NotHandedOut,
    RemoteError,
    WorkerDied,
)
from residency.memory_errors import RemoteFrames
from residency.remote_errors import rebuilt, recorded
from residency.workers.messages import pickled, unpickled
from tts_gpu_managed import GPUManagedTTS

pytestmark = LINUX


def sent(error: BaseException) -> Any:
    """Returns the error as another process would get it."""

    def load(data: bytes) -> Any:
        return unpickled(data, (), lambda path: path)

    return rebuilt(load(pickled(recorded(error, pickled))), load)


def raised(make: Callable[[], Any]) -> BaseException:
    try:
        make()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_type_fields_and_cause(tts: GPUManagedTTS) -> None:
    with pytest.raises(EngineError, match="error 7 on cpu") as caught:
        tts.fails()
    assert caught.value.number == 7
    assert caught.value.args == ("error 7 on cpu",)
    assert "lock" in caught.value.lock  # its text: it cannot be pickled
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.args == ("inner",)


def test_the_workers_traceback_is_shown(tts: GPUManagedTTS) -> None:
    with pytest.raises(ValueError, match="outer") as caught:
        tts.fails("context")
    assert isinstance(caught.value.__context__, KeyError)
    assert isinstance(caught.value.__context__.__cause__, RemoteFrames)
    shown = "".join(traceback.format_exception(caught.value))
    assert "Traceback in the worker process" in shown
    assert 'raise KeyError("inner")' in shown
    assert 'raise ValueError("outer")' in shown


@pytest.mark.parametrize(
    "make",
    [
        Path("/nonexistent/file").read_text, lambda: b"\xff".decode(), lambda: compile("a b", "there.py", "exec"),
        lambda: sys.exit(3), lambda: __import__("nonexistent_module"), lambda: {}["key"], lambda: [].nothing,
    ],
)  # fmt: skip
def test_fields_of_errors_of_python(make: Callable[[], Any]) -> None:
    error = raised(make)
    copy = sent(error)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    for name in ("filename", "errno", "start", "lineno", "code", "name"):
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_an_error_that_refuses_everything_is_still_sent() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    class Unprintable:
        lock = threading.Lock()

        def __reduce__(self) -> Any:
            raise TypeError("no pickle")

        def __repr__(self) -> str:
            raise RuntimeError("no text")

    copy = sent(Odd(Unprintable(), 1))
    assert copy.args == ("<Odd.Unprintable>",) or copy.args[1] == 1


def test_errors_in_a_circle_are_sent() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert str(sent(first)) == "first"


def test_this_projects_errors_keep_their_languages(another: Callable[..., GPUManagedTTS]) -> None:
    def load() -> Engine:
        raise InvalidInput("No weights", "没有权重", "recording")

    with pytest.raises(InvalidInput) as caught:
        another(load).volume  # noqa: B018
    assert (caught.value.en, caught.value.zh, caught.value.field) == ("No weights", "没有权重", "recording")


@pytest.fixture
def private_module(tmp_path: Path) -> str:
    """A module that only the loader finds."""
    (tmp_path / "engine_of_its_own.py").write_text(
        "import torch\n"
        "class Broken(Exception):\n    pass\n"
        "class Words:\n    text = 'hello'\n"
        "class Engine:\n"
        "    def __init__(self):\n        self.weights = torch.ones(4)\n"
        "    def fails(self):\n        error = Broken('no')\n        error.number = 5\n        raise error\n"
        "    def words(self):\n        return Words()\n"
    )
    return str(tmp_path)


def loader(folder: str) -> Callable[[], Any]:
    def load() -> Any:
        sys.path.insert(0, folder)
        import engine_of_its_own  # type: ignore[import-not-found]

        return engine_of_its_own.Engine()

    return load


def test_an_engines_own_modules_are_not_imported_here(
    another: Callable[..., GPUManagedTTS], private_module: str
) -> None:
    tts = another(loader(private_module))
    with pytest.raises(RemoteError, match="Broken: no") as caught:
        tts.fails()
    assert caught.value.number == 5
    sys.path.insert(0, private_module)
    try:
        with pytest.raises(NotHandedOut, match="Words, a class of the module engine_of_its_own"):
            tts.words()
    finally:
        sys.path.remove(private_module)
    assert "engine_of_its_own" not in sys.modules
    assert tts.weights.tolist() == [1] * 4


# -- the device -----------------------------------------------------------------------------------------------------


def managed(capacity_bytes: int) -> GPUResourceManager:
    return GPUResourceManager(SimulatedDevice(capacity_bytes), isolation="process", keep_warm=-1, residue="keep")


def test_a_load_makes_room_as_in_one_process() -> None:
    with managed(3 << 20) as manager:
        manager.register("idle", of(2 << 20), keep_warm=60)
        manager.register("tts", of(2 << 20), keep_warm=60)
        for name in ("idle", "tts", "idle"):
            with manager.lease(name) as engine:
                assert engine.volume == 1.0
        models = manager.status()["models"]
        assert (models["idle"]["state"], models["tts"]["state"]) == ("gpu", "cpu")
        assert manager.device_lost is None


def test_a_load_that_never_fits_fails_and_leaves_no_worker() -> None:
    with managed(1 << 20) as manager:
        manager.register("tts", of(2 << 20))
        for _ in range(2):
            with pytest.raises(DeviceOutOfMemory), manager.lease("tts"):
                pass
        assert manager.status()["models"]["tts"]["state"] == "released"
        assert manager.device.memory().free_bytes == 1 << 20


def test_a_request_on_a_full_device_gets_room_and_is_repeated() -> None:
    with managed(3 << 20) as manager:
        tts = GPUManagedTTS(None, manager=manager, load=of(1 << 20), name="tts")
        idle = GPUManagedTTS(None, manager=manager, load=of(1 << 20), name="idle", gpu_keep_warm=60)
        idle.pid()

        def needs_room(engine: Engine) -> float:
            import gc

            device = next(each for each in gc.get_objects() if isinstance(each, SimulatedDevice))
            device.charge(3 << 19)
            device.refund(3 << 19)
            return engine.volume

        with tts.lease() as engine:
            assert engine.volume == 1.0
        assert tts.use_part((), needs_room) == 1.0
        assert manager.status()["models"]["idle"]["state"] == "cpu"


def test_a_lost_device_costs_the_worker_only(tts: GPUManagedTTS) -> None:
    before = tts.pid()

    def fails(engine: Engine) -> None:
        raise DeviceLost("illegal memory access")

    with pytest.raises(WorkerDied, match="illegal memory access"):
        tts.use_part((), fails)
    assert tts.manager.device_lost is None
    assert tts.pid() != before


def test_a_device_that_is_lost_in_a_load_costs_the_worker_only(
    another: Callable[..., GPUManagedTTS], tmp_path: Path
) -> None:
    once = tmp_path / "once"

    def load() -> Engine:
        if not once.exists():
            once.touch()
            raise DeviceLost("illegal memory access")
        return Engine()

    tts = another(load)
    with pytest.raises(WorkerDied):
        tts.pid()
    assert tts.manager.device_lost is None
    assert tts.volume == 1.0


def test_arguments_that_cannot_be_pickled_are_refused(tts: GPUManagedTTS) -> None:
    with pytest.raises(InvalidInput, match="pickle") as caught:
        tts.echo(threading.Lock())
    assert "工作进程" in caught.value.zh
    assert tts.echo(1) == 1


def test_a_failed_load_is_tried_again(another: Callable[..., GPUManagedTTS], tmp_path: Path) -> None:
    flag = tmp_path / "works"

    def load() -> Engine:
        if not flag.exists():
            raise EngineError(1, device="cpu")
        return Engine()

    tts = another(load)
    with pytest.raises(EngineError):
        tts.pid()
    assert tts.manager._managed_models[tts.name].state is State.RELEASED
    flag.touch()
    assert tts.volume == 1.0
