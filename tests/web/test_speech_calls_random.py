"""Random bodies for the calls under /v1: no server error, and each answer is one that the description has."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_tones import EDITS, Served

pytestmark = pytest.mark.in_process("the tests' engine has gates, which a worker process does not have")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FORMATS = st.sampled_from(["mp3", "opus", "aac", "flac", "wav", "pcm"])
TEXTS = st.text(min_size=1, max_size=60) | st.just("Good morning. How are you? 你好。") | st.just("x" * 6000)
NAMES = st.sampled_from(["high", "low", "Ada"]) | st.text(max_size=70) | st.just("../../etc/passwd")


def body(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies whose fields are mostly valid, or missing, or any JSON."""
    return st.fixed_dictionaries(
        {}, optional={name: values | values | values | JSON for name, values in fields.items()}
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"), recognize=lambda path: "Good morning.")
    yield served
    served.manager.close()


def calls() -> st.SearchStrategy[tuple[str, str, Any]]:
    """Method, path, and body as JSON, of all calls."""
    wav = io.BytesIO()
    soundfile.write(wav, np.full(8000, 0.25), 16000, format="WAV")
    sound = st.just(base64.b64encode(wav.getvalue()).decode()) | st.text(max_size=20)
    speech = {
        "input": TEXTS, "voice": NAMES | st.fixed_dictionaries({"id": NAMES}), "model": st.just("tts-1") | st.none(),
        "response_format": FORMATS, "speed": st.floats(0.25, 4), "stream_format": st.sampled_from(["audio", "sse"]),
        "instructions": st.sampled_from(["happy", "in a whisper", ""]), "ref_audio": st.none() | sound,
        "ref_text": st.text(max_size=20), "keep_alive": st.sampled_from([0, -1, "5m", "1h30m", "-5x", 1e300]),
    }  # fmt: skip
    edit = {
        "audio": sound, "text": TEXTS, "task": st.sampled_from(sorted(EDITS)), "sub_task": st.just("happy") | st.none(),
        "tagged_text": TEXTS, "response_format": FORMATS,
    }  # fmt: skip
    voice = {"name": NAMES, "audio": sound, "text": TEXTS}
    return st.one_of(
        st.tuples(st.just("POST"), st.just("/v1/audio/speech"), body(speech)),
        st.tuples(st.just("POST"), st.just("/v1/audio/edits"), body(edit)),
        st.tuples(st.just("POST"), st.just("/v1/audio/voices"), body(voice) | JSON),
        st.tuples(st.just("POST"), st.just("/v1/audio/transcriptions"), body(edit)),
        st.tuples(st.just("DELETE"), NAMES.map(lambda name: f"/v1/audio/voices/{name}"), st.none()),
        st.tuples(st.sampled_from(["GET", "PUT"]), st.sampled_from(["/v1/audio/voices", "/v1/models"]), st.none()),
    )


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_no_server_error(served: Served, call: tuple[str, str, Any]) -> None:
    described = served.app.openapi()["paths"]
    method, path, sent = call
    client = served.client()
    if method == "POST":
        answer = client.post(path, content=json.dumps(sent).encode(errors="surrogatepass"))
    else:
        answer = client.request(method, quote(path))
    assert answer.status_code < 500, answer.text
    known = described.get(re.sub("/voices/.*", "/voices/{name}", path, flags=re.DOTALL), {}).get(method.lower())
    if answer.status_code in (404, 405) and answer.json()["error"]["code"] is None:  # no such call
        return
    assert known, answer.text
    documented = known["responses"][str(answer.status_code)]["content"]
    assert answer.headers["content-type"].partition(";")[0] in documented
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert served.left() == [], "no file is left"
