from __future__ import annotations

from pathlib import Path

import pytest

from residency.web import visits as module
from residency.web.history import new_state
from residency.web.messages import Places
from residency.web.page_requests import Requests
from residency.web.recordings import Recordings
from residency.web.visits import Visits
from residency.web.waiting import Waiting


def test_of_too_many_visits_the_one_not_heard_of_for_longest_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_MOST", 2)
    visits = Visits(Requests(), Recordings(tmp_path), Waiting(None), Places())
    for whose in ("anna", "bert", "carl"):
        monkeypatch.setattr(module, "session", lambda whose=whose: whose)
        visits._come(None, None, new_state())
        assert visits.know("anna"), "its page says that it is there"
    assert [visits.know(whose) for whose in ("anna", "bert", "carl")] == [True, False, True]
