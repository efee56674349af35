from __future__ import annotations

from pathlib import Path

import pytest

from residency.web.recordings import Recordings


@pytest.fixture
def recordings(tmp_path: Path) -> Recordings:
    return Recordings(tmp_path)


def upload(folder: Path, name: str = "voice.wav") -> str:
    path = folder / "hash" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return str(path)


def result(folder: Path, name: str = "clone-1.wav") -> str:
    (folder / name).touch()
    return str(folder / name)


def test_what_a_session_has_goes_with_it(recordings: Recordings, tmp_path: Path) -> None:
    recordings.own("me", upload(tmp_path), result(tmp_path), None)
    theirs = result(tmp_path, "clone-2.wav")
    recordings.own("them", theirs)
    recordings.end("me")
    assert [str(path) for path in tmp_path.rglob("*")] == [theirs]
    recordings.end("me")


def test_what_two_have_goes_with_the_last(recordings: Recordings, tmp_path: Path) -> None:
    for session in ("me", "them"):
        recordings.own(session, upload(tmp_path))
    recordings.end("me")
    assert len(list(tmp_path.rglob("*.wav"))) == 1
    recordings.remove("them", upload(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_is_not_needed_goes_at_once(recordings: Recordings, tmp_path: Path) -> None:
    first, second = result(tmp_path, "1.wav"), result(tmp_path, "2.wav")
    recordings.own("me", first, second)
    recordings.remove("me", first)
    assert [str(path) for path in tmp_path.iterdir()] == [second]
    recordings.remove("me", first)


def test_who_is_no_session_owns_nothing(recordings: Recordings, tmp_path: Path) -> None:
    path = result(tmp_path)
    recordings.own(None, path)
    recordings.end("me")
    assert Path(path).exists()
    recordings.remove(None, path)
    assert not Path(path).exists()
    assert tmp_path.exists()


def test_an_answer_that_comes_after_the_end_is_for_nobody(recordings: Recordings, tmp_path: Path) -> None:
    recordings.own("me", result(tmp_path, "first.wav"))
    recordings.end("me")
    recordings.own("me", result(tmp_path, "late.wav"))
    assert not list(tmp_path.iterdir())
    recordings.begin("me")
    recordings.own("me", result(tmp_path, "again.wav"))
    assert [path.name for path in tmp_path.iterdir()] == ["again.wav"]
