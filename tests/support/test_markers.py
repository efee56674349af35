"""Tests that start whole apps are marked automatically, so that the quick tests stay quick."""

import types
from pathlib import Path

import app_process
import pytest
from markers import ROOT, SLOW, is_slow, marks_of


@pytest.mark.parametrize("place", SLOW)
def test_every_slow_path_exists(place: str) -> None:
    assert (ROOT / place).exists(), "a file that was renamed would come back into the quick tests"


def marks(path: str = "tests/web/test_new.py", fixtures: tuple[str, ...] = (), **used: object) -> set[str]:
    module = types.ModuleType("test_new")
    vars(module).update(used)
    return marks_of(ROOT / path, module, fixtures)


def test_a_module_that_can_start_an_app_is_marked_under_any_name() -> None:
    assert marks(App=app_process.ForkedApp) == {"app", "slow"}
    assert marks(free_port=app_process.free_port, Path=Path) == set()


def test_a_test_with_the_browser_fixture_is_marked() -> None:
    assert marks(fixtures=("new_page", "browser")) == {"app", "browser", "slow"}


def test_files_in_a_slow_folder_are_slow() -> None:
    assert marks("tests/scripts/test_new.py") == {"slow"}
    assert is_slow(ROOT / "tests/scripts/test_new.py")
    assert not is_slow(ROOT / "tests/web/test_new.py")
