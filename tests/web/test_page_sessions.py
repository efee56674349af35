from __future__ import annotations

from pathlib import Path

import pytest

from residency.web.speech.recordings import Recordings
from residency.web.ui import page_sessions as module
from residency.web.ui.chat_history import new_state
from residency.web.ui.messages import MessagePlaces
from residency.web.ui.page_requests import PageRequests
from residency.web.ui.page_sessions import PageSessions
from residency.web.ui.waiting import WaitingRequests


def test_of_too_many_visits_the_one_not_heard_of_for_longest_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_MOST", 2)
    places = MessagePlaces()
    visits = PageSessions(PageRequests(places), Recordings(tmp_path), WaitingRequests(None), places)
    for whose in ("anna", "bert", "carl"):
        monkeypatch.setattr(module, "session", lambda whose=whose: whose)
        visits._start(None, None, new_state())
        assert visits.knows("anna"), "its page says that it is there"
    assert [visits.knows(whose) for whose in ("anna", "bert", "carl")] == [True, False, True]


def test_a_start_that_arrives_twice_keeps_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = MessagePlaces()
    sessions = PageSessions(PageRequests(places), Recordings(tmp_path), WaitingRequests(None), places)
    state = new_state()
    monkeypatch.setattr(module, "session", lambda: "before")
    sessions._start("a", None, state)
    monkeypatch.setattr(module, "session", lambda: "after")
    for _ in range(2):
        _, continued, *_ = sessions._start("b a", "something", new_state())
        assert continued is state
