"""The description of the calls under /v1 declares the status codes, media types and headers that are sent."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from served_tones import Served
from starlette.testclient import TestClient

from residency.web.speech.encoding import MEDIA_TYPES

pytestmark = pytest.mark.in_process("the tests' engine has gates, which a worker process does not have")

ELSEWHERE = ("192.0.2.7", 4000)
OF_EACH_ANSWER = {"content-type", "content-length"}

Sent = dict[tuple[str, str, int], tuple[set[str], set[str]]]
"""Media types and headers by method, path and status code."""


def note(sent: Sent, answer: Any) -> Any:
    method, path = answer.request.method.lower(), re.sub("/voices/.*", "/voices/{name}", answer.request.url.path)
    media_types, headers = sent[method, path, answer.status_code]
    media_types.add(answer.headers["content-type"].partition(";")[0])
    headers.update(set(answer.headers) - OF_EACH_ANSWER)
    return answer


def note_successes(sent: Sent, client: TestClient, recording: str) -> None:
    files = {"file": Path(recording).read_bytes()}

    def post(call: str, data: Any = None, **fields: Any) -> None:
        answer = client.post(f"/v1/audio/{call}", data=data, **fields)
        assert note(sent, answer).is_success, answer.text

    for form in MEDIA_TYPES:
        post("speech", json={"input": "Hello.", "voice": "high", "response_format": form, "instructions": "happy"})
        post("edits", {"task": "vad", "response_format": form}, files=files)
    post("speech", json={"input": "Hello.", "voice": "high", "stream_format": "sse"})
    for form in ("json", "text"):
        post("transcriptions", {"response_format": form}, files=files)
    post("transcriptions", {"stream": "true"}, files=files)
    post("voices", {"name": "Ada"}, files=files)
    note(sent, client.delete("/v1/audio/voices/Ada"))
    for path in ("models", "audio/voices"):
        note(sent, client.get(f"/v1/{path}"))


def note_refusals(sent: Sent, served: Served, here: TestClient, described: dict[str, Any]) -> None:
    """Sends each call without a body, with wrong keys, and with the only slot taken."""
    calls = [(method, path) for path, each in described.items() for method in each]
    for method, path in calls:
        note(sent, here.request(method, path))
    for method, path in calls:
        note(sent, served.client(ELSEWHERE, Authorization="Bearer wrong").request(method, path))
    with served.slots.taken():
        for method, path in calls:
            note(sent, here.request(method, path))
    note(sent, here.post("/v1/audio/speech", json={"input": "Hello.", "voice": "high", "model": "gpt-5"}))
    served.manager.close()
    note(sent, here.post("/v1/audio/speech", json={"input": "Hello.", "voice": "high"}))


def test_all_that_is_sent_is_declared_and_all_that_is_declared_is_sent(tmp_path: Path, recording: str) -> None:
    served = Served(tmp_path, keys=("one-key",), recognize=lambda path: ask_recognizer(served), most=1)
    served.manager.register("asr", lambda: "asr")
    described = {
        path: calls for path, calls in served.app.openapi()["paths"].items() if path.startswith("/v1/")
    }  # fmt: skip
    sent: Sent = defaultdict(lambda: (set(), set()))
    with served.manager:
        client = served.client(Authorization="Bearer one-key")
        note_successes(sent, client, recording)
        note_refusals(sent, served, client, described)
    for (method, path, code), (media_types, headers) in sent.items():
        declared = described[path][method]["responses"][str(code)]
        assert media_types == set(declared["content"]), (method, path, code)
        assert headers == {name.lower() for name in declared.get("headers", {})}, (method, path, code)
    codes = {(method, path): {code for *call, code in sent if call == [method, path]} for method, path, _ in sent}
    assert set(codes) == {(method, path) for path, calls in described.items() for method in calls}
    assert set().union(*codes.values()) >= {200, 201, 400, 401, 404, 429, 503}


def ask_recognizer(served: Served) -> str:
    with served.manager.lease("asr"):
        return "heard"
