"""The mode of a test run: ``--isolation process`` gives worker processes to managers for which a test sets no mode."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from gpu_manager import GPUResourceManager
from residency.workers import isolation as isolation_module
from residency.workers.spawner import Child, Spawner, can_fork_workers

VARIABLE = "GPU_TTS_GPU_ISOLATION"
"""The variable of the app, which programs that tests start read."""

_mode = "none"


class SharedSpawner(Spawner):
    """Workers of one manager, from one fork server for the run: its start takes seconds. They end with the manager."""

    _of_process: ClassVar[dict[int, Spawner]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[Child] = []

    def start(self) -> Any:
        if self._closed:
            return super().start()  # raises
        return self._of_process.setdefault(os.getpid(), Spawner()).start()

    def spawn(self, connection: socket.socket, on_end: Callable[[], object]) -> Child:
        child = super().spawn(connection, on_end)
        self._workers.append(child)
        return child

    def close(self) -> None:
        if os.getpid() != self._owner_pid:
            return
        self._closed = True
        for child in self._workers:
            child.kill()
        for child in self._workers:
            child.has_ended.wait(60)

    @classmethod
    def end(cls) -> None:
        if own := cls._of_process.pop(os.getpid(), None):
            own.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--isolation", choices=("none", "process"), default=os.environ.get(VARIABLE, "none"),
        help="with process, managers to which a test gives no mode have worker processes",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    global _mode
    _mode = config.option.isolation
    if _mode != os.environ.get(VARIABLE, "none"):
        os.environ[VARIABLE] = _mode
    plain = GPUResourceManager.__init__

    @functools.wraps(plain)
    def init(self: GPUResourceManager, device: Any = None, **settings: Any) -> None:
        if "isolation" in settings or "adopt" in settings:  # adopt: residents of the test, without memory
            return plain(self, device, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isolation_module, "Spawner", SharedSpawner)
            plain(self, device, isolation=_mode, **settings)

    GPUResourceManager.__init__ = init  # type: ignore[method-assign]


def pytest_unconfigure() -> None:
    SharedSpawner.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The acceptance tests run in both modes."""
    if metafunc.module.__name__ == "test_gpu_management" and metafunc.config.option.isolation == "none":
        metafunc.parametrize("isolation", ["none", *["process"] * can_fork_workers()], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (mark := item.get_closest_marker("in_process")) and config.option.isolation == "process":
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


@pytest.fixture(autouse=True)
def isolation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The mode of the test's managers."""
    global _mode
    before, _mode = _mode, getattr(request, "param", _mode)
    yield _mode
    _mode = before
