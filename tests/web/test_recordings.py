from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from residency.web.speech import recordings as recordings_module
from residency.web.speech.recordings import UNOWNED_FOR_S, DiskFull, Recordings


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


def test_who_goes_on_as_another_has_what_they_had_and_what_is_still_made(
    recordings: Recordings, tmp_path: Path
) -> None:
    recordings.own("first", result(tmp_path, "1.wav"))
    recordings.inherit("first", "second")
    recordings.own("first", result(tmp_path, "2.wav"))
    recordings.inherit("second", "third")
    recordings.end("first")
    recordings.end("second")
    recordings.own("first", result(tmp_path, "3.wav"))
    assert len(list(tmp_path.iterdir())) == 3
    recordings.remove("first", str(tmp_path / "1.wav"))
    assert len(list(tmp_path.iterdir())) == 2
    recordings.end("third")
    assert not list(tmp_path.iterdir())
    recordings.own("first", result(tmp_path, "late.wav"))
    assert not list(tmp_path.iterdir()), "it has ended too"


class TestSweep:
    @pytest.fixture(autouse=True)
    def here(self, recordings: Recordings) -> None:
        recordings.begin("here")

    def test_what_is_nobodys_goes_after_a_while(self, recordings: Recordings, tmp_path: Path) -> None:
        mark = tmp_path / ".mark"
        mark.touch()
        mine = [upload(tmp_path), result(tmp_path)]
        recordings.own("here", *mine)
        recordings.own("a program that holds no line", result(tmp_path, "theirs.wav"))
        result(tmp_path, "unused.wav")
        upload(tmp_path, ".memo.wav")
        written_s = mark.stat().st_mtime
        recordings.sweep(written_s + UNOWNED_FOR_S - 60)
        assert len(list(tmp_path.rglob("*.wav"))) == 5
        recordings.sweep(written_s + UNOWNED_FOR_S + 60)
        assert sorted(str(path) for path in tmp_path.rglob("*") if path.is_file()) == sorted([str(mark), *mine])

    def test_what_was_asked_for_before_its_session_was_heard_of_stays(
        self, recordings: Recordings, tmp_path: Path
    ) -> None:
        path = result(tmp_path)
        recordings.own("late", path)
        recordings.sweep(0)
        recordings.begin("late")
        recordings.sweep(os.stat(path).st_mtime + 2 * UNOWNED_FOR_S)
        assert os.path.exists(path)

    def test_a_folder_that_has_two_names_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        path = result(tmp_path / "real")
        recordings = Recordings(tmp_path / "link")
        recordings.begin("here")
        recordings.own("here", path)
        recordings.sweep(os.stat(path).st_mtime + 2 * UNOWNED_FOR_S)
        assert os.path.exists(path)
        recordings.end("here")
        assert not os.path.exists(path)
        assert (tmp_path / "real").exists()


def test_an_answer_that_comes_after_the_end_is_for_nobody(recordings: Recordings, tmp_path: Path) -> None:
    recordings.own("me", result(tmp_path, "first.wav"))
    recordings.end("me")
    recordings.own("me", result(tmp_path, "late.wav"))
    assert not list(tmp_path.iterdir())
    recordings.begin("me")
    recordings.own("me", result(tmp_path, "again.wav"))
    assert [path.name for path in tmp_path.iterdir()] == ["again.wav"]


def test_sessions_that_have_nothing_leave_nothing(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings_module, "_REMEMBERED", 10)
    for number in range(100):
        recordings.own(f"owns nothing {number}", None)
        recordings.remove(f"clears {number}", "/none")
        recordings.inherit(f"page {number}", f"page {number + 1}")
    assert not recordings._files
    assert len(recordings._heirs) <= 10


def test_a_recording_is_its_sessions_and_its_heirs(tmp_path: Path) -> None:
    recordings, file = Recordings(tmp_path), tmp_path / "mine.wav"
    file.touch()
    recordings.begin("anna")
    recordings.own("anna", str(file))
    assert recordings.owns("anna", str(file))
    assert recordings.owns("anna", str(tmp_path / "." / "mine.wav"))
    assert not recordings.owns("bert", str(file))
    assert not recordings.owns(None, str(file))
    assert not recordings.owns("anna", "")
    assert not recordings.owns("anna", "\0")
    recordings.inherit("anna", "anna again")
    assert recordings.owns("anna again", str(file))


class TestRoom:
    """Nobody fills the disk: files may take 100 bytes together."""

    @pytest.fixture
    def recordings(self, tmp_path: Path) -> Recordings:
        return Recordings(tmp_path, most_bytes=100)

    def test_the_oldest_that_belong_to_no_session_are_deleted_first(
        self, recordings: Recordings, tmp_path: Path
    ) -> None:
        owned, old, older, new = (aged(tmp_path, *each) for each in [("a", 900), ("b", 700), ("c", 800), ("d", 600)])
        recordings.own("me", owned)
        assert has_room(recordings, 20)
        assert [Path(path).exists() for path in (owned, old, older, new)] == [True, False, False, True]

    def test_what_has_just_come_stays_and_the_next_is_refused(self, recordings: Recordings, tmp_path: Path) -> None:
        paths = [aged(tmp_path, name, 10) for name in "abc"]
        assert not has_room(recordings, 1)
        assert all(Path(path).exists() for path in paths)

    def test_what_connected_sessions_have_stays(self, recordings: Recordings, tmp_path: Path) -> None:
        paths = [aged(tmp_path, name, 900) for name in "abc"]
        recordings.own("me", *paths)
        assert not has_room(recordings, 1)
        assert all(Path(path).exists() for path in paths)
        recordings.end("me")
        assert has_room(recordings, 1)

    def test_the_session_that_is_silent_longest_loses_its_files_first(
        self, recordings: Recordings, tmp_path: Path
    ) -> None:
        paths = [aged(tmp_path, name, 900) for name in ("gone", "back", "here")]
        for path, session in zip(paths, ("gone", "back", "here"), strict=True):
            recordings.own(session, path)
        recordings.silent = lambda for_s: ["gone", "back"] if for_s == 60 else []
        assert has_room(recordings, 1)
        assert [Path(path).exists() for path in paths] == [False, True, True]
        assert recordings.owns("back", paths[1])
        assert not has_room(recordings, 90)
        assert [Path(path).exists() for path in paths] == [False, False, True]

    def test_a_file_that_a_connected_session_has_too_stays(self, recordings: Recordings, tmp_path: Path) -> None:
        path = aged(tmp_path, "both", 900, size=100)
        recordings.own("gone", path)
        recordings.own("here", path)
        recordings.silent = lambda for_s: ["gone"]
        assert not has_room(recordings, 1)
        assert Path(path).exists()

    def test_files_that_are_being_written_count_as_announced(self, recordings: Recordings, tmp_path: Path) -> None:
        part = tmp_path / "tmpabc"
        part.write_bytes(b"x" * 50)
        os.utime(part, (0, 0))
        with recordings.reserved(60):
            assert has_room(recordings, 40)
            assert not has_room(recordings, 41)
            with recordings.reserved(70, 1) as granted:
                assert granted == 40
                assert not has_room(recordings, 0)
        assert has_room(recordings, 100)
        assert part.exists()

    def test_their_number_is_bounded_too(
        self, recordings: Recordings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recordings_module, "_MOST_FILES", 2)
        recordings.own("me", *(aged(tmp_path, name, 900, size=0) for name in "ab"))
        assert not has_room(recordings, 0)


def has_room(recordings: Recordings, most_bytes: float) -> bool:
    try:
        with recordings.reserved(most_bytes):
            return True
    except DiskFull:
        return False


def aged(folder: Path, name: str, age_s: float, size: int = 40) -> str:
    modified_s = time.time() - age_s
    path = folder / name / "voice.wav"
    path.parent.mkdir()
    path.write_bytes(b"x" * size)
    os.utime(path, (modified_s, modified_s))
    return str(path)
