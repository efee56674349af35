"""Limits the number of sessions that Gradio keeps, and the length of their names, which clients choose."""

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
"""Sessions whose state is kept: with Gradio 6 one takes 0.16 MB."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMELESS = (
    "A session or upload is named by 1 to 64 Latin letters, digits, hyphens and underscores: change its name. / "
    "会话或上传的名称须由 1 至 64 个英文字母、数字、连字符或下划线组成：请更改名称。"
)
_BODIES = ("PredictBody", "SimplePredictBody", "SimplePredictBodyV2")
_QUEUED = 100
_UNHEARD_OF = 50
"""Requests of one session whose answers nobody has fetched."""
_REMEMBERED = 2000
_FULL = (
    "Too many requests are waiting: try again in a minute, and fetch the answers of earlier ones. / "
    "等待中的请求过多：请一分钟后重试，并先取回先前请求的结果。"
)


def is_name(text: str) -> bool:
    """Whether a session or an upload may be called so."""
    return _NAME.fullmatch(text) is not None


def bound_names() -> None:
    """Have the app that is made next answer 422 to requests in whose bodies a session has another name."""
    for body in _BODIES:
        model = getattr(routes, body, None)
        if model is not None and model.__module__ != __name__:  # Gradio 5 has not all of them
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
    """Let a running queue refuse what is too much, and forget the oldest of what nobody has asked for."""
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
    """Forget the progress of uploads which nobody has looked at."""
    statuses = routes.file_upload_statuses
    statuses._statuses = LRUCache(_REMEMBERED)
    statuses._signals = _Newest(statuses._signals.default_factory)


def forget_deleted_files(blocks: Any) -> None:
    """Gradio keeps the names of all files that were ever uploaded or made."""
    for files in blocks.temp_file_sets:
        files -= {path for path in files if not os.path.exists(path)}


class _Newest(defaultdict[str, Any]):
    """Has the newest `_REMEMBERED` of its keys."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _REMEMBERED:
            del self[next(iter(self))]
