"""Limits Gradio's sessions, queue and uploads, and the names that clients choose for them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import Annotated, Any

from fastapi import HTTPException
from gradio import routes
from gradio.utils import LRUCache
from pydantic import AfterValidator, create_model

SESSIONS = 500
"""Maximum of sessions with stored state; with Gradio 6 one takes 0.16 MB."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMELESS = (
    "A session or upload is named by 1 to 64 Latin letters, digits, hyphens and underscores: change its name. / "
    "会话或上传的名称须由 1 至 64 个英文字母、数字、连字符或下划线组成：请更改名称。"
)
_BODIES = ("PredictBody", "SimplePredictBody", "SimplePredictBodyV2")
_QUEUED = 100
_UNHEARD_OF = 50
"""Maximum of requests of one session with unfetched results."""
_REMEMBERED = 2000
_FULL = (
    "Too many requests are waiting: try again in a minute, and fetch the answers of earlier ones. / "
    "等待中的请求过多：请一分钟后重试，并先取回先前请求的结果。"
)


def is_name(text: str) -> bool:
    """Whether ``text`` is a valid name of a session or an upload."""
    return _NAME.fullmatch(text) is not None


def bound_names() -> None:
    """Makes the next Gradio app answer 422 to bodies with an invalid session name."""
    for body in _BODIES:
        model = getattr(routes, body, None)
        if model is not None and model.__module__ != __name__:  # Gradio 5 lacks some of them
            field = model.model_fields["session_hash"]
            checked: Any = Annotated[field.annotation, AfterValidator(_checked)]
            setattr(
                routes, body, create_model(body, __base__=model, __module__=__name__, session_hash=(checked, field))
            )


def _checked(name: str | None) -> str | None:
    if name is not None and not is_name(name):
        raise HTTPException(422, NAMELESS)
    return name


def bound_queue(queue: Any) -> None:
    """Limits the length of a running queue, and the number of unfetched results that it stores."""
    for kept in ("pending_event_ids_session", "event_analytics"):
        setattr(queue, kept, LRUCache(_REMEMBERED))
    push = queue.push

    async def push_if_room(body: Any, request: Any, username: str | None) -> Any:
        unheard_of = queue.pending_event_ids_session.get(body.session_hash, ())
        if len(queue) >= _QUEUED or len(unheard_of) >= _UNHEARD_OF:
            raise HTTPException(503, _FULL)
        return await push(body=body, request=request, username=username)

    queue.push = push_if_room


def bound_uploads() -> None:
    """Limits the number of uploads for which Gradio stores progress."""
    statuses = routes.file_upload_statuses
    statuses._statuses = LRUCache(_REMEMBERED)
    statuses._signals = _Newest(statuses._signals.default_factory)


def forget_deleted_files(blocks: Any) -> None:
    """Removes deleted files from Gradio's sets of file names, which otherwise only grow."""
    for files in blocks.temp_file_sets:
        files -= {path for path in files if not os.path.exists(path)}


class _Newest(defaultdict[str, Any]):
    """A `defaultdict` that keeps only its newest `_REMEMBERED` keys."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _REMEMBERED:
            del self[next(iter(self))]
