"""HTTP requests to another server: short, of limited size, without redirects and proxies. Standard library only."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from ..errors import NeighborRefused, NeighborUnreachable
from ..sentences import Sentence
from .contract import Held

LIMIT_BYTES = 1 << 20
"""Longer answers are an error."""
HELD_S, ASK_S = 2.0, 60.0
"""Longest time of a request that changes nothing, and of one that frees memory, each with its whole answer."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Server(ABC):
    """A server at ``url``; subclasses are the kinds. ``token``: ``user:password``, or else a bearer token."""

    kind: ClassVar[str]
    port: ClassVar[int]
    """Its usual port."""
    command: ClassVar[re.Pattern[str]]
    """Found in the command lines of such servers, or in their working folders."""
    missing: ClassVar[Sentence]
    """What to do if it does not know a call."""
    gives_back: ClassVar[bool] = False

    url: str
    token: str | None = field(default=None, repr=False)

    @abstractmethod
    def held(self) -> Held: ...

    @abstractmethod
    def ask(self) -> None: ...

    def give_back(self) -> None:  # noqa: B027
        """Does nothing: the server loads again with its next request."""

    def _read(self, path: str, parse: Callable[[Any], _T], text: bool = False) -> _T:
        """Sends a GET request and parses the answer: its JSON, or ``text``. Raises `NeighborUnreachable`."""
        return self._parsed(path, self._get(path), parse, text)

    def _parsed(self, path: str, answer: Answer, parse: Callable[[Any], _T], text: bool = False) -> _T:
        if not answer.ok:
            raise self._unreachable(self._failure("GET", path, answer))
        try:
            decoded = answer.body.decode("utf-8", "strict")
            return parse(decoded if text else json.loads(decoded))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = Sentence(
                f"GET {path} answered with what {self.kind} does not answer: {excerpt(answer.body)}. "
                f"Check the kind and the address in --gpu-neighbor",
                f"GET {path} 返回的不是 {self.kind} 的响应：{excerpt(answer.body)}。"
                f"请检查 --gpu-neighbor 中的类型和地址",
            )
            raise self._unreachable(reason) from error

    def _get(self, path: str, until: Callable[[bytes], bool] | None = None) -> Answer:
        return self._exchange("GET", path, None, HELD_S, until)

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        """Sends a POST request; raises `NeighborRefused` for an error, `NeighborUnreachable` without an answer."""
        answer = self._exchange("POST", path, body, ASK_S)
        if not answer.ok:
            raise NeighborRefused(self.kind, self.url, self._failure("POST", path, answer))

    def _unreachable(self, reason: Sentence) -> NeighborUnreachable:
        return NeighborUnreachable(self.kind, self.url, reason)

    def _failure(self, method: str, path: str, answer: Answer) -> Sentence:
        call, status = f"{method} {path}", answer.status
        if status in (401, 403):
            return Sentence(
                f"{call} answered {status}: it needs a token, or another one. Give it in the address, "
                f"--gpu-neighbor {self.kind}=http://TOKEN@HOST:PORT or http://USER:PASSWORD@HOST:PORT",
                f"{call} 返回 {status}：需要令牌，或令牌不正确。请写在地址中："
                f"--gpu-neighbor {self.kind}=http://TOKEN@HOST:PORT 或 http://USER:PASSWORD@HOST:PORT",
            )
        if status in (404, 405, 501):
            said = f"{status}: {excerpt(answer.body)}"
            return Sentence(
                f"it has no {call} ({said}). {self.missing.en}", f"没有 {call} 接口（{said}）。{self.missing.zh}"
            )
        if 300 <= status < 400:
            return Sentence(
                f"{call} was redirected to {answer.location!r}, which is not followed. Give the address that answers",
                f"{call} 被重定向到 {answer.location!r}，重定向不会被跟随。请填写直接响应的地址",
            )
        return Sentence(
            f"{call} answered {status}: {excerpt(answer.body)}. Look into its log",
            f"{call} 返回 {status}：{excerpt(answer.body)}。请查看其日志",
        )

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        timeout_s: float,
        until: Callable[[bytes], bool] | None = None,
    ) -> Answer:
        """Sends one request. ``until`` ends the reading of a stream, which the end of the time ends, too."""
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=timeout_s)
        end = time.monotonic() + timeout_s
        try:
            connection.connect()
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, address.path + path, data, self._headers(data))
            response = http.client.HTTPResponse(_Timed(connection.sock, end), method=method)  # type: ignore[arg-type]
            response.begin()
            received = b""
            while until is None or not until(received):
                try:
                    part = response.read1(1 << 16)
                except TimeoutError:
                    if until is None:
                        raise
                    break
                if not part:
                    if until is None and response.length:
                        raise http.client.IncompleteRead(received, response.length)
                    break
                received += part
                if len(received) > LIMIT_BYTES:
                    raise self._unreachable(_too_long(f"{method} {path}"))
            return Answer(response.status, received, response.getheader("Location", ""))
        except TimeoutError as error:
            raise self._unreachable(_no_answer(f"{method} {path}", timeout_s)) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(_no_connection(f"{method} {path}", error)) from error
        finally:
            connection.close()

    def _headers(self, data: bytes | None) -> dict[str, str]:
        headers = {"Accept": "*/*", "Connection": "close"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self.token is not None and ":" in self.token:
            headers["Authorization"] = f"Basic {base64.b64encode(self.token.encode()).decode()}"
        elif self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers


class _Timed(io.RawIOBase):
    """Reads from a socket until a time of ``time.monotonic``, in how many parts an answer may come."""

    def __init__(self, sock: socket.socket, end_s: float) -> None:
        self._sock, self._end_s = sock, end_s

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        return self._sock.recv_into(buffer)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    location: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


def gauges(text: str, *names: str) -> float:
    """Sums values of metrics in Prometheus' text format, over all labels; raises `LookupError` if one is missing."""
    found = re.findall(rf"^({'|'.join(map(re.escape, names))})(?:{{[^}}]*}})? (\S+)", text, re.MULTILINE)
    if missing := set(names) - {name for name, _ in found}:
        raise LookupError(*missing)
    return sum(float(value) for _, value in found)


def excerpt(body: bytes) -> str:
    return " ".join(body[:400].decode("utf-8", "replace").split())[:200] or "-"


def _too_long(call: str) -> Sentence:
    return Sentence(
        f"the answer to {call} is longer than {LIMIT_BYTES:,} bytes. Check the kind and the address in --gpu-neighbor",
        f"{call} 的响应超过 {LIMIT_BYTES:,} 字节。请检查 --gpu-neighbor 中的类型和地址",
    )


def _no_answer(call: str, timeout_s: float) -> Sentence:
    return Sentence(
        f"no answer to {call} within {timeout_s:g} s. Check whether it is overloaded or has stopped",
        f"{call} 在 {timeout_s:g} 秒内没有响应。请检查它是否过载或已停止",
    )


def _no_connection(call: str, error: Exception) -> Sentence:
    what = str(error) or type(error).__name__
    return Sentence(
        f"{call} failed ({what}). Check that it runs, and the address in --gpu-neighbor",
        f"{call} 失败（{what}）。请检查它是否在运行，以及 --gpu-neighbor 中的地址",
    )
