"""The mode of a test run: ``--isolation process`` gives worker processes to managers for which a test sets no mode."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from shared_spawner import SharedSpawner

from gpu_manager import GPUResourceManager
from residency.workers import isolation as isolation_module
from residency.workers.spawner import can_fork_workers

VARIABLE = "GPU_TTS_GPU_ISOLATION"
"""The variable of the app, which programs that tests start read."""

_mode = "none"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--isolation", choices=("none", "process"), default=os.environ.get(VARIABLE, "none"),
        help="with process, managers to which a test gives no mode have worker processes",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    global _mode
    _mode = os.environ[VARIABLE] = config.option.isolation
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
