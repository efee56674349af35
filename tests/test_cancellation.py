"""A request that was cancelled says so at its next checkpoint, and to who has asked to hear of it."""

from __future__ import annotations

import contextvars
import threading

import pytest

from residency.cancellation import Cancellation, cancelled_by, checkpoint, current
from residency.errors import RequestStopped


def test_a_checkpoint_raises_only_in_a_request_that_was_cancelled() -> None:
    checkpoint()
    cancellation, other = Cancellation(), Cancellation()
    with cancelled_by(cancellation):
        checkpoint()
        cancellation.cancel()
        with pytest.raises(RequestStopped):
            checkpoint()
        with cancelled_by(other):
            checkpoint()
        assert current() is cancellation
    checkpoint()
    assert current() is None


def test_threads_with_a_copy_of_the_context_see_it() -> None:
    cancellation, seen = Cancellation(), list[object]()
    with cancelled_by(cancellation):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: seen.append(current()),))
        thread.start()
        thread.join()
    assert seen == [cancellation]


def test_who_wants_to_hear_is_told_once_and_at_once_if_it_has_happened() -> None:
    cancellation, told = Cancellation(), list[str]()
    cancellation.on_cancel(lambda: told.append("before"))
    cancellation.cancel()
    cancellation.cancel()
    cancellation.on_cancel(lambda: told.append("after"))
    assert told == ["before", "after"]


def test_a_callback_of_a_block_is_called_within_it_only() -> None:
    cancellation, told = Cancellation(), list[str]()
    with cancellation.calling(lambda: told.append("over")):
        pass
    with cancellation.calling(lambda: told.append("running")):
        cancellation.cancel()
    assert told == ["running"]
