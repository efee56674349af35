"""Compatibility with Gradio 5.49 and 6: selects keywords by the signature of the installed version."""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import gradio as gr
from gradio import route_utils, routes
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError
from gradio_client import utils as client_utils
from jinja2 import FunctionLoader
from starlette.requests import HTTPConnection

from .language import Localize, both, preferred

_REASON_CHARACTERS = 200


def supported(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Returns the keywords that ``function`` has as parameters in the installed version."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in parameters}


PRIVATE: dict[str, Any] = supported(gr.on, api_visibility="private") or {"api_name": False}
"""Keywords for events that are not published as API endpoints."""


CALL: ContextVar[dict[str, bool] | None] = ContextVar("call", default=None)
"""Flags of the current HTTP request, read by its middleware; None for requests from Gradio's queue."""


class Blocks(gr.Blocks):
    """`gr.Blocks` with error messages for invalid event inputs, which Gradio rejects without a message.

    Marks the `CALL` as ``garbled``. Rejects links: Gradio would download their targets into memory and onto the disk.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return await self._read(block_fn, inputs, *arguments, **keywords)
        except gr.Error:
            if (call := CALL.get()) is not None:
                call["garbled"] = True
            raise

    async def _read(self, block_fn: Any, inputs: list[Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            if not block_fn.fn:
                raise ValueError("nothing on the server belongs to this event")
            client_utils.traverse(inputs, _refuse_link, client_utils.is_file_obj_with_meta)
            return await super().preprocess_data(block_fn, inputs, *arguments, **keywords)
        except (InvalidPathError, FileNotFoundError):
            raise gr.Error(
                localizer()(
                    "录音已不在服务器上：请重新上传", "The recording is no longer on the server: upload it again"
                ),
                print_exception=False,
            ) from None
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            # Gradio would log a traceback for its own errors, such as a value that is not in a list.
            # Removes the folders of this machine from the message.
            reason = re.sub(r"/\S*/", "", " ".join(str(getattr(error, "message", error)).split()))[:_REASON_CHARACTERS]
            raise gr.Error(
                localizer()(
                    f"输入无效：请刷新页面并重新上传录音；API 客户端的参数见 /gradio_api/info（{reason}）",
                    f"The input is invalid: reload the page and upload the recording again. "
                    f"API clients: see /gradio_api/info for the arguments ({reason})",
                ),
                print_exception=False,
            ) from None


def _refuse_link(file: dict[str, object]) -> dict[str, object]:
    if client_utils.is_http_url_like(file["path"]):
        raise gr.Error(
            localizer()("不接受链接：请上传录音文件", "Upload the recording instead of a link"), print_exception=False
        )
    return file


def keep_uploads_in(folder: str) -> None:
    """Makes Gradio 5 write incomplete uploads to ``folder`` instead of the system's temporary folder."""
    if "upload_dir" not in inspect.signature(route_utils.GradioMultiPartParser.__init__).parameters:
        elsewhere = functools.partial(tempfile.NamedTemporaryFile, dir=folder)
        route_utils.NamedTemporaryFile = elsewhere  # type: ignore[attr-defined, assignment]


def set_closed(blocks: gr.Blocks, session: str, closed: bool) -> None:
    """Sets whether a session is closed. Gradio deletes the state of closed sessions after an hour.

    Gradio itself closes a session when its connection is cut, even if the session continues.
    """
    if state := blocks.state_holder.session_data.get(session):
        state.is_closed = closed


def user(app: Any, request: HTTPConnection) -> str | None:
    """Returns the name of the signed-in user, from the cookies of the request to this running app."""
    for cookie in _cookies(app):
        if (name := app.tokens.get(request.cookies.get(cookie))) is not None:
            return str(name)
    return None


def sign_out(app: Any, request: HTTPConnection) -> list[str]:
    """Ends only the login that the request was sent with; returns the names of the cookies to delete."""
    for cookie in _cookies(app):
        app.tokens.pop(request.cookies.get(cookie), None)
    return _cookies(app)


def _cookies(app: Any) -> list[str]:
    return [f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}"]


@functools.cache
def adapt_page_templates(head: str) -> None:
    """Inserts HTML (a Jinja template) before all other in the head of Gradio's pages.

    Removes links to external scripts and fonts, which Gradio 5 has.
    """
    environment: Any = routes.templates.env
    pages = environment.loader

    def adapted(name: str) -> str:
        source = pages.get_source(environment, name)[0]
        source = re.sub(r"<link\s+rel=\"preconnect\"[^>]*>|<script\s+src=\"https:[^>]*></script>", "", source)
        return str(source).replace("<head>", f"<head>{head}", 1)

    environment.loader = FunctionLoader(adapted)


def session() -> str | None:
    """Returns the browser session of the current event; None outside of events."""
    return getattr(LocalContext.request.get(None), "session_hash", None)


def localizer() -> Localize:
    """Returns the `Localize` for the browser language of the current event; both languages outside of events."""
    headers = getattr(LocalContext.request.get(None), "headers", None)
    return both if headers is None else preferred(headers.get("accept-language"))
