"""SGLang against answers of the real server's form: it must never end, however it is asked."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

import pytest
from recorded_server import Conversation, Reply, recorded

from residency.errors import NeighborRefused, NeighborUnreachable
from residency.neighbors import Held, neighbor, sglang


class FakeSGLang:
    """Ends, as the real one does, if it must release twice, resume twice, or release while it is not paused."""

    starts = itertools.count(os.getpid() << 20)  # else tests in other processes would use the same lock file

    def __init__(self) -> None:
        self.paused = self.released = self.has_ended = False
        self.startup_time = {"total": 31.7 + next(self.starts)}
        self.running = self.waiting = 0

    @property
    def replies(self) -> Conversation:
        return {
            "GET /server_info": lambda: Reply(
                {"model_path": "tiny", "enable_memory_saver": True, "random_seed": 7, "startup_time": self.startup_time}
            ),
            "GET /ready": lambda: Reply(b"", 503 if self.paused else 200),
            "GET /v1/loads?include=core": lambda: Reply(
                {"loads": [{"dp_rank": 0, "num_running_reqs": self.running, "num_waiting_reqs": self.waiting}]}
            ),
            "POST /pause_generation": lambda: self.changed(paused=True),
            "POST /continue_generation": lambda: self.changed(paused=False),
            "POST /release_memory_occupation": lambda: self.changed(released=True),
            "POST /resume_memory_occupation": lambda: self.changed(released=False),
        }

    def changed(self, **to: bool) -> Reply:
        if "released" in to and (not self.paused or self.released == to["released"]):
            self.has_ended = True
            return Reply({"error": {"message": "assertion failed"}}, 500)
        vars(self).update(to)
        return Reply()


def test_sglang_is_paused_before_it_releases_and_continues_after_it_resumed() -> None:
    fake = FakeSGLang()
    with recorded(fake.replies) as server:
        engine = neighbor("sglang", server.url)
        assert engine.gives_back
        assert engine.held() == Held(False, None)
        engine.ask()
        assert engine.held() == Held(False, 0)
        engine.ask()
        neighbor("sglang", server.url).give_back()  # another object for the same server
        engine.give_back()
        assert (fake.paused, fake.released) == (False, False)
        assert [call for call in server.calls if call.startswith("POST")] == [
            'POST /pause_generation {"mode": "retract"}',
            "POST /release_memory_occupation {}",
            "POST /resume_memory_occupation {}",
            "POST /continue_generation {}",
        ]
        engine.ask()
        assert fake.released


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (0, 2)])
def test_sglang_is_in_use_while_it_has_requests(running: int, waiting: int) -> None:
    fake = FakeSGLang()
    fake.running, fake.waiting = running, waiting
    with recorded(fake.replies) as server:
        assert neighbor("sglang", server.url).held() == Held(True, None)


def test_sglang_that_was_started_anew_is_not_resumed() -> None:
    fake = FakeSGLang()
    with recorded(fake.replies) as server:
        engine = neighbor("sglang", server.url)
        engine.ask()
        fake.paused = fake.released = False
        fake.startup_time = {"total": -1.0}
        assert engine.held() == Held(False, None)
        engine.give_back()
        assert not any("resume" in call for call in server.calls)


def test_sglang_without_the_memory_saver_gives_up_nothing() -> None:
    with recorded({"GET /server_info": Reply({"enable_memory_saver": False, "random_seed": 7})}) as server:
        engine = neighbor("sglang", server.url)
        assert engine.held() == Held(False, 0)
        engine.ask()
        engine.give_back()
        assert set(server.calls) == {"GET /server_info"}


def test_sglang_that_refuses_continues() -> None:
    fake = FakeSGLang()
    replies = fake.replies
    replies["POST /release_memory_occupation"] = Reply({"error": {"message": "weight cache"}}, 400)
    with recorded(replies) as server:
        engine = neighbor("sglang", server.url)
        with pytest.raises(NeighborRefused, match="weight cache"):
            engine.ask()
        assert not fake.paused
        assert engine.held() == Held(False, None)


def test_sglang_releases_once_whatever_its_address_and_whichever_app_asks() -> None:
    """As after a `kill -9` of the app that asked: the next one knows nothing of it."""
    fake = FakeSGLang()
    with recorded(fake.replies) as server, pytest.MonkeyPatch.context() as patch:
        neighbor("sglang", server.url).ask()
        again = neighbor("sglang", server.url.replace("127.0.0.1", "localhost"))
        patch.setattr(sglang, "_asked", {})
        assert again.held() == Held(False, 0)
        again.ask()
        again.give_back()
        assert (fake.has_ended, fake.paused, fake.released) == (False, True, True)
        assert sum("POST" in call for call in server.calls) == 2


def test_sglang_is_asked_by_one_app_at_a_time() -> None:
    fake = FakeSGLang()
    with recorded(fake.replies) as server:
        engine = neighbor("sglang", server.url)
        replies = dict(fake.replies)

        def meanwhile() -> Reply:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sglang, "_lock", threading.Lock())  # of another process
                with pytest.raises(NeighborUnreachable, match=r"cannot be locked .*Another app .*try again"):
                    engine.ask()
            return Reply(b"", 200)

        server.replies["GET /ready"] = meanwhile
        engine.ask()
        server.replies["GET /ready"] = replies["GET /ready"]
        engine.give_back()
        assert (fake.has_ended, fake.paused, fake.released) == (False, False, False)


def test_two_sglang_servers_are_asked_by_two_apps_at_a_time() -> None:
    first, second = FakeSGLang(), FakeSGLang()
    with recorded(first.replies) as server, recorded(second.replies) as other:

        def meanwhile() -> Reply:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sglang, "_lock", threading.Lock())  # of another process
                neighbor("sglang", other.url).ask()
            return Reply(b"", 200)

        server.replies["GET /ready"] = meanwhile
        neighbor("sglang", server.url).ask()
        assert (first.released, second.released) == (True, True)


def test_sglang_is_given_back_while_a_child_process_has_the_lock_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was forked meanwhile, as by a library for its work."""
    opened, children = os.open, list[int]()

    def shared(*args: Any, **kwargs: Any) -> int:
        file = opened(*args, **kwargs)
        children.append(os.dup(file))  # as a fork does
        return file

    fake = FakeSGLang()
    with recorded(fake.replies) as server:
        engine = neighbor("sglang", server.url)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", shared)
            engine.ask()
        engine.give_back()
        assert not fake.released
    for file in children:
        os.close(file)


@pytest.mark.parametrize("setting", [{"enable_memory_saver": False}, {"tokenizer_worker_num": 2}])
def test_sglang_that_cannot_tell_its_pauses_is_not_asked(setting: dict[str, object]) -> None:
    fake = FakeSGLang()
    info = {"enable_memory_saver": True, "random_seed": 7, "startup_time": {}} | setting
    with recorded(fake.replies | {"GET /server_info": Reply(info)}) as server:
        neighbor("sglang", server.url).ask()
        assert neighbor("sglang", server.url).held() == Held(False, 0)
        assert set(server.calls) == {"GET /server_info"}


def test_sglang_that_was_only_paused_continues_and_does_not_resume() -> None:
    """It would end by a resume. The pause has no answer, as in a server that hangs for a minute."""
    fake = FakeSGLang()

    def paused() -> Reply:
        fake.paused = True
        return Reply(b"", headers={"Content-Length": "5"})  # breaks off

    with recorded(fake.replies | {"POST /pause_generation": paused}) as server:
        engine = neighbor("sglang", server.url)
        with pytest.raises(NeighborUnreachable):
            engine.ask()
        assert fake.paused
        engine.give_back()
        assert (fake.has_ended, fake.paused, fake.released) == (False, False, False)


def test_sglang_resumes_once_also_if_its_answer_is_lost() -> None:
    fake = FakeSGLang()

    def resumed() -> Reply:
        fake.changed(released=False)
        return Reply(b"", headers={"Content-Length": "5"})  # breaks off

    with recorded(fake.replies | {"POST /resume_memory_occupation": resumed}) as server:
        engine = neighbor("sglang", server.url)
        engine.ask()
        with pytest.raises(NeighborUnreachable):
            engine.give_back()
        engine.give_back()
        assert (fake.has_ended, fake.paused, fake.released) == (False, False, False)


def test_sglang_that_refuses_to_resume_is_asked_again() -> None:
    fake = FakeSGLang()
    refused = {"POST /resume_memory_occupation": Reply({"error": {"message": "busy"}}, 400)}
    with recorded(fake.replies | refused) as server:
        engine = neighbor("sglang", server.url)
        engine.ask()
        with pytest.raises(NeighborRefused):
            engine.give_back()
        assert fake.paused
        server.replies |= fake.replies
        engine.give_back()
        assert (fake.has_ended, fake.paused, fake.released) == (False, False, False)
