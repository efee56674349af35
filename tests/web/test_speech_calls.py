"""The calls under /v1, over an engine of tones."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import errno
import io
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
from app_process import wait_until
from fakes import Gate, Worker
from local_server import Served as Server
from raw_http import begun
from served_tones import Served
from starlette.testclient import TestClient

from residency.errors import InvalidInput, RequestStopped, WorkerEnded
from residency.sentences import Sentence
from residency.web.api import streamed, turns
from residency.web.speech import task_names, voices
from residency.web.speech.voices import VoicesUnreadable
from tts_gpu_managed import ask

pytestmark = pytest.mark.in_process("the tests' engine has gates, which a worker process does not have")

ELSEWHERE = ("192.0.2.7", 4000)
THREE = "The first sentence is here. Then the second one follows. At last the third one ends."


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.manager.close()


def speech(served: Served, client: TestClient | None = None, **fields: Any) -> Any:
    body = {"input": THREE, "voice": "high", "response_format": "wav", **fields}
    return (client or served.client()).post("/v1/audio/speech", json={k: v for k, v in body.items() if v is not None})


def error(answer: Any) -> dict[str, Any]:
    """Returns the error of an answer, which has OpenAI's shape."""
    shape = answer.json()
    assert set(shape) == {"error"}, shape
    assert set(shape["error"]) == {"message", "type", "param", "code"}
    assert " / " in shape["error"]["message"], "in both languages"
    found: dict[str, Any] = shape["error"]
    return found


class TestSpeech:
    @pytest.mark.parametrize("tag", ["[Japanese]", "[cantonese]"])
    def test_the_language_of_a_text_holds_for_each_of_its_sentences(self, served: Served, tag: str) -> None:
        assert speech(served, input=f"{tag} {THREE}").status_code == 200
        texts = [text for _, _, text in served.tones.asked]
        assert len(texts) > 1
        assert all(text.startswith(f"{tag} ") for text in texts)
        assert " ".join(text.removeprefix(f"{tag} ") for text in texts) == THREE

    def test_sentences_are_spoken_in_order_under_one_lease(self, served: Served) -> None:
        answer = speech(served)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "audio/wav"
        assert [text for _, _, text in served.tones.asked] == [
            "The first sentence is here.", "Then the second one follows.", "At last the third one ends.",
        ]  # fmt: skip
        samples, sample_rate = soundfile.read(io.BytesIO(answer.content))
        assert sample_rate == 24000
        spoken = 1000 * sum(len(text) for *_, text in served.tones.asked)
        assert len(samples) == spoken - 2 * 480, "two joins of 20 ms"
        requests = served.manager.history()["models"]["tts"]["totals"]["requests"]
        assert requests["ok"] == 1
        assert served.left() == []

    def test_the_words_of_the_voice_are_given(self, served: Served) -> None:
        speech(served, voice="low")
        assert served.tones.asked[0][1].startswith("I missed the last train")

    def test_a_voice_may_be_an_object(self, served: Served) -> None:
        assert speech(served, voice={"id": "high"}).status_code == 200

    @pytest.mark.parametrize("name", ["tones", "tts-1", "tts-1-hd", "gpt-4o-mini-tts", None])
    def test_openais_names_of_models_are_accepted(self, served: Served, name: str | None) -> None:
        assert speech(served, model=name).status_code == 200

    @pytest.mark.parametrize(
        ("form", "media_type", "begins"),
        [("wav", "audio/wav", b"RIFF"), ("flac", "audio/flac", b"fLaC"), ("pcm", "audio/pcm", b"\0\x20" * 100)],
    )
    def test_formats(self, served: Served, form: str, media_type: str, begins: bytes) -> None:
        answer = speech(served, response_format=form)
        assert answer.headers["content-type"] == media_type
        assert answer.content.startswith(begins)

    def test_events(self, served: Served) -> None:
        plain = speech(served, response_format="pcm").content
        answer = speech(served, response_format="pcm", stream_format="sse")
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        assert [event["type"] for event in events[-1:]] == ["speech.audio.done"]
        assert b"".join(base64.b64decode(event["audio"]) for event in events[:-1]) == plain

    @pytest.mark.parametrize(
        ("instructions", "edit"),
        [("happy", "emotion/happy"), ("Speak in a WHISPER, please.", "style/whisper"), ("高兴", "emotion/happy"),
         ("more faster", "speed/more faster"), ("much faster!", "speed/more faster"), ("faster", "speed/faster"),
         ("happy and sad", "none"), ("unhappy", "none"), ("Be a pirate.", "none"), ("shout", "none")],
    )  # fmt: skip
    def test_instructions_that_name_an_edit(self, served: Served, instructions: str, edit: str) -> None:
        answer = speech(served, input="One sentence is enough.", instructions=instructions)
        assert answer.headers["x-edit"] == edit
        wanted = [] if edit == "none" else [("edit", "One sentence is enough.", *edit.split("/"))]
        assert served.tones.asked[1:] == wanted
        assert served.manager.history()["models"]["tts"]["totals"]["requests"]["ok"] == 1
        assert served.left() == []

    def test_how_long_it_waited_and_why(self, served: Served) -> None:
        timing = speech(served).headers["server-timing"]
        assert "wait;dur=" in timing
        assert "load;dur=" in timing
        assert "restore;dur=" in speech(served).headers["server-timing"]

    def test_how_long_it_waited_without_management(self, tmp_path: Path) -> None:
        served = Served(tmp_path, managed=False)
        assert served.queue is not None
        timing = re.compile(r'wait;dur=([0-9.]+);desc="(.*)", queue;dur=([0-9.]+)')
        alone = timing.fullmatch(speech(served).headers["server-timing"])
        assert alone is not None
        assert alone[1] == alone[3]
        with ThreadPoolExecutor(1) as threads, served.queue.reserved():
            late = threads.submit(contextvars.Context().run, speech, served)
            wait_until(lambda: len(served.queue.requests) == 2)
        found = timing.fullmatch(late.result(30).headers["server-timing"])
        assert found is not None
        assert float(found[1]) > 0
        assert found[2].endswith("other requests or moves")

    def test_an_edit_whose_words_are_recognized_waits_for_two_models(self, tmp_path: Path, recording: str) -> None:
        served: Served = Served(tmp_path, recognize=lambda path: ask(served.manager, "asr", lambda asr: asr(path)))
        served.manager.register("asr", lambda: lambda path: "heard")
        with served.manager, open(recording, "rb") as file:
            answer = served.client().post("/v1/audio/edits", data={"task": "vad"}, files={"file": file})
            waits = {name: served.manager.status()["models"][name]["last_wait"] for name in ("asr", "tts")}
        timing = answer.headers["server-timing"]
        assert re.search(r'desc="asr: .*loading the model[^;]*; tts: .*loading the model.*"', timing)
        for name, key in (("wait", "waited_s"), ("queue", "queue_s"), ("load", "move_s")):
            found = re.search(rf"{name};dur=([0-9.]+)", timing)
            assert found is not None
            both_ms = sum(1000 * wait[key] for wait in waits.values())
            assert float(found[1]) == pytest.approx(both_ms, abs=1.1), "rounded to milliseconds in the status"

    def test_the_wait_counts_once_for_a_text_of_several_sentences(self, served: Served) -> None:
        timing = speech(served).headers["server-timing"]
        assert timing.count("loading the model") == 1
        assert "tts:" not in timing

    @pytest.mark.parametrize(("keep_alive", "stays"), [("5m", 300), (0, 0), (2.5, 2.5), ("-1", -1), ("1h30m", 5400)])
    def test_keep_alive(self, served: Served, keep_alive: Any, stays: float) -> None:
        assert speech(served, keep_alive=keep_alive).status_code == 200
        assert served.manager.status()["models"]["tts"]["keep_warm_s"] == stays
        speech(served)
        assert served.manager.status()["models"]["tts"]["keep_warm_s"] == 0

    def test_null_is_as_if_a_field_were_absent(self, served: Served) -> None:
        optional = (
            "model",
            "response_format",
            "speed",
            "instructions",
            "stream_format",
            "keep_alive",
            "ref_audio",
            "ref_text",
        )
        body = {"input": "Hello.", "voice": "high", **dict.fromkeys(optional)}
        answer = served.client().post("/v1/audio/speech", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "audio/mpeg"
        described = served.client().get("/openapi.json").json()["paths"]["/v1/audio/speech"]["post"]["requestBody"]
        fields = described["content"]["application/json"]["schema"]["properties"]
        assert all({"type": "null"} in fields[name]["anyOf"] for name in optional)
        assert "anyOf" not in fields["input"]
        refused = served.client().post("/v1/audio/speech", json={**body, "input": None})
        assert error(refused)["message"].startswith("input is missing")

    def test_so_is_an_empty_field_of_a_form(self, served: Served, recording: str) -> None:
        fields = {"input": "Hello.", **dict.fromkeys(("model", "response_format", "speed", "ref_text"), "")}
        with open(recording, "rb") as file:
            fields["ref_text"] = "my words"
            answer = served.client().post("/v1/audio/speech", data=fields, files={"file": file})
        assert answer.status_code == 200, answer.text
        with open(recording, "rb") as file:
            refused = served.client().post("/v1/audio/speech", data={**fields, "input": ""}, files={"file": file})
        assert error(refused)["message"].startswith("input: The text is empty")

    def test_with_a_recording_of_its_own(self, served: Served, recording: str) -> None:
        audio = base64.b64encode(Path(recording).read_bytes()).decode()
        assert speech(served, voice=None, ref_audio=audio, ref_text="my words").status_code == 200
        assert served.tones.asked[0][:2] == ("clone", "my words")
        assert served.left() == []

    def test_with_a_recording_in_a_form(self, served: Served, recording: str) -> None:
        fields = {"input": "Hello.", "ref_text": "my words", "response_format": "wav", "speed": "1.0"}
        with open(recording, "rb") as file:
            answer = served.client().post("/v1/audio/speech", data=fields, files={"file": file})
        assert answer.status_code == 200, answer.text
        assert served.tones.asked == [("clone", "my words", "Hello.")]
        assert served.left() == []
        described = served.client().get("/openapi.json").json()["paths"]["/v1/audio/speech"]["post"]["requestBody"]
        form = described["content"]["multipart/form-data"]["schema"]
        assert set(form["required"]) == {"file", "input"}
        assert "ref_audio" not in form["properties"]

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"input": " "}, "input"), ({"input": "жук"}, "input"), ({"input": "x" * 5001}, "input"),
         ({"input": "..."}, "input"), ({"response_format": "ogg"}, "response_format"), ({"speed": 9}, "speed"),
         ({"instructions": "x" * 4097}, "instructions")],
    )  # fmt: skip
    def test_a_recording_is_neither_converted_nor_recognized_for_a_bad_request(
        self, tmp_path: Path, recording: str, fields: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heard: list[str] = []
        served = Served(tmp_path, recognize=lambda path: heard.append(path) or "heard")
        monkeypatch.setattr(served.service.incoming, "readable", lambda path: heard.append(path) or path)
        audio = base64.b64encode(Path(recording).read_bytes()).decode()
        with served.manager:
            refused = speech(served, voice=None, ref_audio=audio, **fields)
            assert (refused.status_code, error(refused)["param"]) == (400, param)
            assert heard == []
            assert speech(served, voice=None, ref_audio=audio).status_code == 200
        assert [words for _, words, _ in served.tones.asked] == ["heard"] * 3

    def test_instructions_are_read_beside_other_requests(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[str] = []
        named_in = task_names.named_in
        monkeypatch.setattr(task_names, "named_in", lambda *given: threads.append(sniffed()) or named_in(*given))
        assert speech(served, instructions="happy").headers["x-edit"] == "emotion/happy"
        assert threads == ["no event loop"]


def sniffed() -> str:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return "no event loop"
    return "event loop"


class TestBadSpeech:
    @pytest.mark.parametrize(
        ("fields", "status", "param", "says"),
        [
            ({"input": None}, 400, "input", "missing"),
            ({"input": ""}, 400, "input", "empty"),
            ({"input": " \n\t "}, 400, "input", "empty"),
            ({"input": "\u200b"}, 400, "input", "no words"),
            ({"input": "... !? 😀"}, 400, "input", "no words"),
            ({"input": "x" * 5001}, 400, "input", "5001 characters"),
            ({"input": 5}, 400, "input", "valid string"),
            ({"input": "жук"}, 400, "input", "speaks English"),
            ({"voice": None}, 400, "voice", "missing"),
            ({"voice": "nobody"}, 400, "voice", "choose one of high, low"),
            ({"voice": "../../etc/passwd"}, 400, "voice", "choose one of high, low"),
            ({"voice": ["high"]}, 400, "voice", "'id'"),
            ({"voice": {"id": 5}}, 400, "voice", "'id'"),
            ({"voice": {"name": "high"}}, 400, "voice", "应为名称，或以 'id' 给出名称的对象"),
            ({"voice": None, "ref_audio": "%%%", "ref_text": "x"}, 400, "ref_audio", "base64"),
            ({"voice": None, "ref_audio": "aGVsbG8="}, 400, "ref_text", "missing"),
            ({"voice": None, "ref_audio": "aGVsbG8=", "ref_text": "x"}, 400, "ref_audio", "cannot be read"),
            ({"voice": None, "ref_audio": "aGVsbG8=", "ref_text": "x" * 5001}, 400, "ref_text", "5001"),
            ({"model": "gpt-5"}, 404, "model", "give one of tones"),
            ({"response_format": "ogg"}, 400, "response_format", "mp3"),
            ({"stream_format": "chunks"}, 400, "stream_format", "sse"),
            ({"speed": 0.1}, 400, "speed", "0.25"),
            ({"speed": 9}, 400, "speed", "4"),
            ({"speed": "fast"}, 400, "speed", ""),
            ({"instructions": "x" * 4097}, 400, "instructions", "最多 4096 个字符"),
            ({"keep_alive": "soon"}, 400, "keep_alive", "5m"),
            ({"keep_alive": True}, 400, "keep_alive", "a number of seconds, or a string"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(
        self, served: Served, fields: dict[str, Any], status: int, param: str, says: str
    ) -> None:
        refused = speech(served, **fields)
        assert refused.status_code == status, refused.text
        assert error(refused)["param"] == param
        assert says in error(refused)["message"]
        assert served.manager.status()["models"]["tts"]["state"] == "released", "it was said before a load"
        assert served.left() == []

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"input": NaN}', b"[" * 100_000])
    def test_a_body_that_is_no_json_object(self, served: Served, body: bytes) -> None:
        refused = served.client().post("/v1/audio/speech", content=body)
        assert refused.status_code == 400
        error(refused)

    def test_an_endless_body(self, served: Served) -> None:
        refused = served.client().post("/v1/audio/speech", content=b'{"input": "' + b"x" * (21 << 20))
        assert refused.status_code == 413
        error(refused)

    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/v1/audio/speech"), ("GET", "/v1/nothing"), ("PUT", "/v1/models")]
    )
    def test_there_is_no_such_call(self, served: Served, method: str, path: str) -> None:
        refused = served.client().request(method, path)
        assert refused.status_code in (404, 405)
        error(refused)

    def test_the_methods_of_a_path(self, served: Served) -> None:
        assert served.client().put("/v1/audio/voices").headers["allow"] == "GET, POST"

    def test_events_are_documented(self, served: Served) -> None:
        spoken = served.client().get("/openapi.json").json()["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]
        kinds = {speech(served, stream_format=form).headers["content-type"] for form in ("audio", "sse")}
        assert kinds == {"audio/wav", "text/event-stream"}
        assert kinds <= set(spoken["content"])

    def test_an_engine_that_fails_at_once(self, served: Served) -> None:
        served.tones.error = ValueError("broken")
        refused = speech(served)
        assert refused.status_code == 500
        assert "broken" in error(refused)["message"]
        assert served.left() == []
        served.tones.error = None
        assert speech(served).status_code == 200

    @pytest.mark.parametrize(
        ("cause", "status", "code"),
        [(ValueError("broken"), 500, None), (InvalidInput("too long", "太长"), 400, None),
         (OSError(errno.ENOSPC, "full"), 507, "disk_full"), (MemoryError("CUDA out of memory"), 503, "device_full"),
         (WorkerEnded("tts"), 503, "worker_ended")],
    )  # fmt: skip
    def test_an_edit_that_fails_after_its_clone(
        self, served: Served, cause: Exception, status: int, code: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        served.tones.error, served.tones.fails_at = cause, 2
        refused = speech(served, input="One sentence is enough.", instructions="happy")
        assert [name for name, *_ in served.tones.asked] == ["clone"] + ["edit"] * (2 if code == "device_full" else 1)
        assert refused.status_code == status
        found = error(refused)
        assert (found["param"], found["code"]) == ("instructions", code)
        assert "was spoken, but the edit emotion/happy" in found["message"]
        assert "without instructions" in found["message"]
        assert caplog.text.count("request failed") <= 1, "it is logged once"
        assert served.left() == []
        served.tones.error = None
        assert speech(served, input="One sentence is enough.").status_code == 200

    def test_sentences_before_a_failed_edit_stay(self, served: Served) -> None:
        served.tones.error, served.tones.fails_at = ValueError("broken"), 4
        answer = speech(served, instructions="happy", stream_format="sse", response_format="pcm")
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        assert [event["type"] for event in events] == ["speech.audio.delta", "error"]
        assert "edit emotion/happy" in events[1]["error"]["message"]

    def test_a_cancelled_edit_is_no_failed_one(self, served: Served) -> None:
        served.tones.error, served.tones.fails_at = RequestStopped(), 2
        assert error(speech(served, input="One.", instructions="happy"))["code"] == "cancelled"

    def test_a_worker_process_that_has_ended(self, served: Served) -> None:
        served.tones.error = WorkerEnded("tts")
        refused = speech(served)
        assert (refused.status_code, error(refused)["code"]) == (503, "worker_ended")
        assert int(refused.headers["retry-after"]) >= 1
        assert "anew" in error(refused)["message"]

    def test_a_voice_that_the_engine_cannot_take(self, served: Served) -> None:
        served.tones.error = InvalidInput("No speech was found", "没有检测到语音", "recording")
        refused = speech(served)
        assert (refused.status_code, error(refused)["param"]) == (400, "voice")

    def test_an_engine_that_fails_midway_breaks_off(self, served: Served) -> None:
        served.tones.error, served.tones.fails_at = ValueError("broken"), 2
        answer = speech(served, stream_format="sse")
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["type"] == "error"
        assert "broken" in last["error"]["message"]

    def test_an_engine_that_exits(self, served: Served) -> None:
        def leave(*arguments: Any) -> Any:
            raise SystemExit(3)

        served.tones.clone = leave  # type: ignore[method-assign]
        assert speech(served).status_code == 500

    def test_a_folder_that_cannot_be_written_takes_no_place_of_other_requests(self, tmp_path: Path) -> None:
        served = Served(tmp_path, most=1)
        (tmp_path / "recordings").write_text("not a folder")
        with served.manager:
            for _ in range(2):
                refused = speech(served)
                assert refused.status_code == 500, "not 429: the place is free again"
                error(refused)

    def test_a_system_without_threads_takes_no_place_of_other_requests(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def cannot_start(*arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("can't start new thread")

        served = Served(tmp_path, most=1)
        with served.manager, monkeypatch.context() as without:
            without.setattr(streamed, "to_thread", SimpleNamespace(run_sync=cannot_start))
            for _ in range(2):
                refused = speech(served)
                assert refused.status_code == 500
                assert "can't start new thread" in error(refused)["message"]
            without.undo()
            assert speech(served).status_code == 200

    @pytest.mark.parametrize("path", ["speech", "voices", "edits"])
    def test_json_of_very_many_values_is_not_parsed(self, served: Served, path: str) -> None:
        refused = served.client().post(f"/v1/audio/{path}", content=b'{"input": [' + b"[]," * 100_000 + b"[]]}")
        assert refused.status_code == 400
        assert "JSON object" in error(refused)["message"]

    def test_waiting_requests_reserve_no_disk_space(self, tmp_path: Path) -> None:
        served = Served(tmp_path)
        served.recordings = served.service._recordings
        served.recordings._most_bytes = 200_000
        with served.manager:
            assert speech(served, input="x " * 100).status_code == 507
            assert speech(served, input="Short enough.").status_code == 200
            assert served.recordings._reserved_bytes == 0

    def test_a_slow_reader_reserves_what_its_answer_has(self, served: Served) -> None:
        text = " ".join(["Ten letters here."] * 250)
        reserved = served.recordings.reserved_until_known
        estimates: list[float] = []
        sizes: list[float] = []

        @contextmanager
        def seen(most_bytes: float) -> Iterator[Any]:
            estimates.append(most_bytes)
            with reserved(most_bytes) as known:
                yield lambda size: (sizes.append(size), known(size))

        served.recordings.reserved_until_known = seen  # type: ignore[method-assign]
        server = Server(served.app)
        try:
            body = json.dumps({"input": text, "voice": "high", "response_format": "pcm"}).encode()
            with begun(server.port, "/v1/audio/speech", body) as line:
                assert line.recv(12) == b"HTTP/1.1 200"
                assert wait_until(lambda: bool(sizes))
                assert 0 < served.recordings._reserved_bytes == sizes[0] < estimates[0] / 2
            assert wait_until(lambda: served.recordings._reserved_bytes == 0)
        finally:
            server.close()
        assert served.left() == []


def chinese(refused: Any) -> str:
    return str(Sentence.parsed(error(refused)["message"]).zh)


class TestWordsOfErrors:
    """Errors have the names of the parameters, not of the page's controls, and Chinese halves no English sentence."""

    @pytest.mark.parametrize(
        ("path", "body", "named"),
        [
            (
                "edits",
                {"task": "clone", "text": "w"},
                "There is no task 'clone': give one of emotion, style, speed, vad",
            ),
            ("edits", {"task": "emotion", "text": "w"}, "sub_task: "),
            ("edits", {"task": "paralinguistic", "text": "w"}, "tagged_text is empty"),
            ("speech", {"input": "", "voice": "high"}, "input: The text is empty"),
            ("speech", {"input": "жук", "voice": "high"}, "input: This engine speaks English"),
        ],
    )
    def test_parameters_are_named(
        self, served: Served, recording: str, path: str, body: dict[str, str], named: str
    ) -> None:
        served.service.edit_types = {**served.service.edit_types, "paralinguistic": []}
        audio = {"audio": base64.b64encode(Path(recording).read_bytes()).decode()} if path == "edits" else {}
        message = error(served.client().post(f"/v1/audio/{path}", json={**body, **audio}))["message"]
        assert message.startswith(named), message
        assert not any(word in message for word in ("Target", "目标文本", "EDIT", "Prompt", "提示文本"))

    @pytest.mark.parametrize(
        ("words", "param", "says"),
        [("Prompt Text", "ref_text", "ref_text is empty: fill it in / ref_text 为空：请填写"),
         ("Target Text", "input", "input is empty: fill it in / input 为空：请填写")],
    )  # fmt: skip
    def test_so_do_those_of_engines(self, served: Served, recording: str, words: str, param: str, says: str) -> None:
        field: Any = {"Prompt Text": "prompt_text", "Target Text": "target_text"}[words]
        chinese = {"Prompt Text": "提示文本", "Target Text": "目标文本"}[words]
        served.tones.error = InvalidInput(f"{words} is empty: fill it in", f"{chinese}为空：请填写", field)
        audio = base64.b64encode(Path(recording).read_bytes()).decode()
        refused = speech(served, voice=None, ref_audio=audio, ref_text="said")
        assert (error(refused)["param"], error(refused)["message"]) == (param, says)

    @pytest.mark.parametrize(
        ("fields", "says"),
        [({"response_format": "ogg"}, "应为 'mp3'、'opus'、'aac'、'flac'、'wav'、'pcm'"), ({"speed": 9}, "应不大于 4"),
         ({"input": 5}, "应为字符串"), ({"speed": "fast"}, "应为数字"), ({"voice": ["x"]}, "voice 无效"),
         ({"speed": 0.1}, "应不小于 0.25")],
    )  # fmt: skip
    def test_the_chinese_half_is_chinese(self, served: Served, fields: dict[str, Any], says: str) -> None:
        half = chinese(speech(served, **fields))
        assert says in half
        assert "should" not in half

    def test_a_full_disk_is_told_from_the_limit(self, served: Served) -> None:
        served.tones.error = OSError(errno.ENOSPC, "No space left on device")
        refused = speech(served)
        assert refused.status_code == 507
        assert "--tmp-dir is full: free space there" in error(refused)["message"]
        assert "--max-disk" not in error(refused)["message"]

    def test_who_may_not_change_voices_hears_of_keys(self, served: Served, recording: str) -> None:
        refused = store(served, recording, client=served.client(ELSEWHERE))
        assert refused.status_code == 401
        assert "--api-key" in error(refused)["message"]

    def test_what_keep_alive_minus_one_means(self, served: Served) -> None:
        refused = error(speech(served, keep_alive="soon"))["message"]
        described = json.dumps(served.client().get("/openapi.json").json())
        for text in (refused, described):
            assert "-1: until another request ends or the model is offloaded" in text

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [("speech", {"input": "Hello.", "ref_text": "w"}, "ref_audio"),
         ("voices", {"name": "Ada", "text": "w"}, "audio"), ("edits", {"task": "vad", "text": "w"}, "audio")],
    )  # fmt: skip
    def test_a_recording_that_cannot_be_read_has_the_name_of_its_field(
        self, served: Served, path: str, fields: dict[str, str], param: str
    ) -> None:
        for client_sends, name in (
            ({"json": {**fields, param: base64.b64encode(b"no sound").decode()}}, param),
            ({"data": fields, "files": {"file": b"no sound"}}, "file"),
        ):
            refused = served.client().post(f"/v1/audio/{path}", **client_sends)  # type: ignore[arg-type]
            assert (refused.status_code, error(refused)["param"]) == (400, name)

    def test_lone_surrogates_are_replaced_in_all_texts(self, served: Served, recording: str) -> None:
        audio, lone = base64.b64encode(Path(recording).read_bytes()).decode(), "\ud800 hi"
        for path, body, status in (
            ("voices", {"name": "Ada", "text": lone, "audio": audio}, 201),
            ("speech", {"input": lone, "voice": "Ada", "response_format": "wav"}, 200),
            ("speech", {"input": lone, "ref_audio": audio, "ref_text": lone, "response_format": "wav"}, 200),
            ("edits", {"task": "vad", "text": lone, "audio": audio}, 200),
        ):
            answer = served.client().post(f"/v1/audio/{path}", content=json.dumps(body))
            assert answer.status_code == status, answer.text
        assert served.tones.asked == [("clone", "\ufffd hi", "\ufffd hi")] * 2 + [("edit", "\ufffd hi", "vad", None)]

    @pytest.mark.parametrize(
        ("cause", "status", "code", "says"),
        [(PermissionError(errno.EACCES, "Permission denied"), 503, "voices_unavailable", "may write there"),
         (OSError(errno.ENOSPC, "No space left on device"), 507, "disk_full", "free space there")],
    )  # fmt: skip
    def test_a_voice_that_cannot_be_stored(
        self, served: Served, recording: str, monkeypatch: pytest.MonkeyPatch, cause: OSError, status: int, code: str,
        says: str,
    ) -> None:  # fmt: skip
        def fail(*arguments: Any, **keywords: Any) -> Any:
            raise cause

        monkeypatch.setattr(voices.os, "rename", fail)
        refused = store(served, recording)
        assert (refused.status_code, error(refused)["code"]) == (status, code)
        assert says in error(refused)["message"]
        assert ("retry-after" in refused.headers) == (status == 503)

    def test_a_store_that_does_not_answer(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> Any:
            raise VoicesUnreadable("s3://bucket/voices", "no network")

        monkeypatch.setattr(served.voices, "_stored", fail)
        assert speech(served).status_code == 200, "the voice ships with the app"
        client = served.client()
        for refused in (
            speech(served, voice="Ada"), client.get("/v1/audio/voices"), client.delete("/v1/audio/voices/Ada"),
        ):  # fmt: skip
            assert (refused.status_code, error(refused)["code"]) == (503, "voices_unavailable")
            assert int(refused.headers["retry-after"]) >= 1

    def test_a_slow_store_delays_no_voice_that_ships(
        self, served: Served, recording: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, answers = threading.Semaphore(0), threading.Event()

        def slow() -> Any:
            asked.release()
            assert answers.wait(60)
            return iter(())

        monkeypatch.setattr(served.voices, "_stored", slow)
        monkeypatch.setattr(turns, "_BODY_WITHIN_S", 0.01)

        async def ask() -> None:
            transport = httpx.ASGITransport(served.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
                body = {"input": "Hello.", "response_format": "wav"}
                waiting = [client.get("/v1/audio/voices"), client.delete("/v1/audio/voices/Ada")]
                waiting += [client.post("/v1/audio/speech", json={**body, "voice": "Ada"}) for _ in range(4)]
                tasks = [asyncio.ensure_future(each) for each in waiting]
                try:
                    for _ in range(4):
                        assert await asyncio.to_thread(asked.acquire, timeout=60)
                    audio = base64.b64encode(Path(recording).read_bytes()).decode()
                    for voice in ({"voice": "HIGH"}, {"ref_audio": audio, "ref_text": "words"}):
                        spoken = client.post("/v1/audio/speech", json={**body, **voice})
                        assert (await asyncio.wait_for(spoken, 60)).status_code == 200
                finally:
                    answers.set()
                    await asyncio.gather(*tasks)

        asyncio.run(ask())

    def test_errors_repeat_the_begin_of_a_long_value_only(self, served: Served, recording: str) -> None:
        audio, long = base64.b64encode(Path(recording).read_bytes()).decode(), "x" * 100_000
        edit = {"audio": audio, "text": "w"}
        for path, body in (
            ("speech", {"input": "Hello.", "voice": "high", "model": long}),
            ("speech", {"input": "Hello.", "voice": long}),
            ("speech", {"input": "Hello.", "voice": "high", "keep_alive": long}),
            ("edits", {**edit, "task": long}),
            ("edits", {**edit, "task": "emotion", "sub_task": long}),
        ):
            refused = served.client().post(f"/v1/audio/{path}", json=body)
            error(refused)
            assert len(refused.content) < 2000, body.keys()


class TestKeys:
    @pytest.fixture
    def keyed(self, tmp_path: Path) -> Iterator[Served]:
        keyed = Served(tmp_path, keys=("one-key", "another"))
        yield keyed
        keyed.manager.close()

    @pytest.mark.parametrize("sent", ["", "Bearer ", "Bearer wrong", "Bearer one-ke", "Basic one-key", "Bearer één"])
    @pytest.mark.parametrize(
        ("method", "path"),
        [("GET", "/v1/models"), ("POST", "/v1/audio/speech"), ("GET", "/v1/audio/voices"), ("POST", "/v1/audio/voices"),
         ("DELETE", "/v1/audio/voices/x"), ("POST", "/v1/audio/edits"), ("POST", "/v1/audio/transcriptions")],
    )  # fmt: skip
    def test_each_call_needs_one(self, keyed: Served, sent: str, method: str, path: str) -> None:
        headers = {"Authorization": sent.encode("latin-1")} if sent else {}
        refused = keyed.client().request(method, path, headers=headers)  # type: ignore[arg-type]
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert error(refused)["code"] == "invalid_api_key"

    @pytest.mark.parametrize("key", ["one-key", "another", "t0ken"])
    def test_each_of_them_is_enough(self, keyed: Served, key: str) -> None:
        client = keyed.client(ELSEWHERE, Authorization=f"Bearer {key}")
        assert speech(keyed, client, keep_alive="1m").status_code == 200
        assert client.delete("/v1/audio/voices/nobody").status_code == 404

    def test_guessing_is_slowed_down(self, keyed: Served) -> None:
        def status(key: str, address: str = "192.0.2.7") -> int:
            client = keyed.client((address, 4000), **({"Authorization": f"Bearer {key}"} if key else {}))
            answer = client.get("/v1/audio/voices")
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 10
                assert error(answer)["type"] == "rate_limit_error"
            return int(answer.status_code)

        assert status("another") == 200
        assert status("t0ken") == 200
        assert [status(f"guess {number}") for number in range(7)] == [401] * 5 + [429] * 2
        assert status("one-key") == 429, "else one could go on guessing"
        assert status("another") == 200, "its user is not locked out"
        assert status("t0ken") == 200
        assert status("") == 401
        assert status("one-key", "192.0.2.8") == 200
        assert [status("guess", f"2001:db8::{number}") for number in range(1, 8)] == [401] * 5 + [429] * 2

    def test_after_a_while_another_key_may_be_tried(self, keyed: Served) -> None:
        now_s = [1000.0]
        keyed.keys._permissions.guesses._now = lambda: now_s[0]
        client = keyed.client(Authorization="Bearer guess")
        assert [client.get("/v1/models").status_code for _ in range(6)] == [401] * 5 + [429]
        now_s[0] += 10
        assert [client.get("/v1/models").status_code for _ in range(2)] == [401, 429]

    def test_a_token_that_was_not_used_before_is_refused_like_a_key(self, keyed: Served) -> None:
        def status(key: str) -> int:
            return int(keyed.client(ELSEWHERE, Authorization=f"Bearer {key}").get("/v1/models").status_code)

        assert [status(f"guess {number}") for number in range(5)] == [401] * 5
        assert status("t0ken") == 429, "else one could go on guessing"

    def test_wrong_tokens_are_counted_with_the_keys(self, keyed: Served) -> None:
        guesses = [keyed.client(ELSEWHERE, Authorization=f"Bearer {number}") for number in range(6)]
        assert [guess.post("/gpu/release").status_code for guess in guesses[:3]] == [401] * 3
        assert [guess.get("/v1/models").status_code for guess in guesses[3:5]] == [401] * 2
        for refused in (guesses[5].post("/gpu/release"), guesses[5].get("/v1/models")):
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 10

    def test_without_keys_tokens_are_guessed_no_faster_with_changes(self, served: Served) -> None:
        client = served.client(ELSEWHERE, Authorization="Bearer none")
        assert [client.delete("/v1/audio/voices/x").status_code for _ in range(6)] == [401] * 5 + [429]
        assert speech(served, client).status_code == 200, "which needs no key"
        token = served.client(ELSEWHERE, Authorization="Bearer t0ken")
        assert token.delete("/v1/audio/voices/x").status_code == 429

    def test_without_keys_other_machines_may_speak_but_change_nothing(self, served: Served, recording: str) -> None:
        client = served.client(ELSEWHERE)
        assert speech(served, client).status_code == 200
        for refused in (
            store(served, recording, client=client),
            client.delete("/v1/audio/voices/x"),
            speech(served, client, keep_alive=-1),
        ):
            assert refused.status_code == 401
            assert error(refused)["code"] == "not_allowed"


class TestLimits:
    def test_too_many_requests_are_told_to_come_back(self, tmp_path: Path) -> None:
        served, entered, leave = Served(tmp_path, most=1), threading.Event(), threading.Event()

        def slow(*arguments: Any) -> tuple[Any, int]:
            entered.set()
            assert leave.wait(60)
            return np.zeros((1, 2400), np.float32), 24000

        served.tones.clone = slow  # type: ignore[method-assign]
        with served.manager, served.client() as client:
            first = threading.Thread(target=lambda: speech(served, client))
            first.start()
            assert entered.wait(60)
            refused = speech(served, client)
            leave.set()
            first.join()
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert error(refused)["type"] == "rate_limit_error"
            assert speech(served, client).status_code == 200

    @pytest.mark.parametrize("call", ["speech", "edits", "transcriptions", "voices"])
    def test_bodies_that_arrive_slowly_take_no_places(self, tmp_path: Path, call: str) -> None:
        served = Served(tmp_path, most=1, recognize=lambda path: "words")
        server = Server(served.app)
        form = ["content-type: multipart/form-data; boundary=b"] if call == "transcriptions" else []
        begin = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if form else b'{"input": "'
        try:
            with begun(server.port, f"/v1/audio/{call}", begin, *form, length=1000) as slow:
                slow.sendall(b"x")
                url = f"http://127.0.0.1:{server.port}/v1/audio"
                assert wait_until(lambda: httpx.get(f"{url}/voices").status_code == 200)
                body = {"input": "Hello.", "voice": "high", "response_format": "pcm"}
                assert httpx.post(f"{url}/speech", json=body, timeout=60).status_code == 200
        finally:
            server.close()
            served.manager.close()

    def test_json_that_arrives_slowly_is_on_the_disk(self, tmp_path: Path) -> None:
        served = Served(tmp_path, disk=25_000_000)
        server = Server(served.app)
        body = b'{"voice": "high", "input": "' + b"x" * 200_000
        try:
            with begun(server.port, "/v1/audio/speech", body, length=10_000_000):
                assert wait_until(lambda: served.recordings._reserved_bytes >= 9_900_000)
                with begun(server.port, "/v1/audio/speech", body, length=20 << 20) as full:
                    assert full.recv(12) == b"HTTP/1.1 507"
            assert wait_until(lambda: served.recordings._reserved_bytes == 0)
        finally:
            server.close()
            served.manager.close()
        assert served.left() == []

    def test_recordings_in_json_wait_on_the_disk(self, tmp_path: Path, recording: str) -> None:
        sizes: list[float] = []
        served = Served(tmp_path, most=1)
        readable = served.service.incoming.readable

        def seen(path: str | None) -> str:
            sizes.append(served.recordings._reserved_bytes)
            return readable(path)

        served.service.incoming.readable = seen  # type: ignore[method-assign]
        content = Path(recording).read_bytes()
        audio = base64.b64encode(content).decode()
        taken = served.slots.taken

        @contextmanager
        def counted() -> Iterator[None]:
            sizes.append(served.recordings._reserved_bytes)
            with taken():
                yield

        served.slots.taken = counted  # type: ignore[method-assign]
        with served.manager:
            assert speech(served, voice=None, ref_audio=audio, ref_text="words").status_code == 200
        assert sizes == [len(content), len(content)], "its file, then the copy for the engine"
        assert served.recordings._reserved_bytes == 0
        assert served.left() == []


def store(served: Served, recording: str, name: str = "Ada", client: TestClient | None = None, **fields: Any) -> Any:
    data = {"name": name, "text": "the words", **fields}
    with open(recording, "rb") as file:
        return (client or served.client()).post(
            "/v1/audio/voices", data=data, files={"file": ("a.wav", file, "audio/wav")}
        )


class TestVoices:
    @pytest.mark.parametrize(("name", "status"), [("ADA", 409), ("high", 409), ("../x", 400)])
    def test_the_name_is_checked_before_the_recording(
        self, tmp_path: Path, recording: str, name: str, status: int
    ) -> None:
        heard: list[str] = []
        served = Served(tmp_path, recognize=lambda path: heard.append(path) or "heard")
        with served.manager:
            assert store(served, recording).status_code == 201
            refused = store(served, recording, name, text="")
        assert (refused.status_code, error(refused)["param"]) == (status, "name")
        assert heard == []

    def test_one_is_stored_spoken_with_and_deleted(self, served: Served, recording: str) -> None:
        assert store(served, recording).status_code == 201
        listed = served.client().get("/v1/audio/voices").json()["voices"]
        assert [(voice["id"], voice["stored"]) for voice in listed] == [("high", False), ("low", False), ("Ada", True)]
        assert speech(served, voice="ada").status_code == 200
        assert served.tones.asked[-1][1] == "the words"
        assert served.client().delete("/v1/audio/voices/Ada").json() == {"id": "Ada", "deleted": True}
        assert served.client().delete("/v1/audio/voices/Ada").status_code == 404
        assert served.left() == []

    def test_as_json(self, served: Served, recording: str) -> None:
        audio = base64.b64encode(Path(recording).read_bytes()).decode()
        for name, text in (("Ada", audio), ("Bob", f"data:audio/wav;base64,{audio}")):
            body = {"name": name, "text": "words", "audio": text}
            assert served.client().post("/v1/audio/voices", json=body).status_code == 201

    def test_its_words_are_written_where_there_is_a_recognizer(self, tmp_path: Path, recording: str) -> None:
        served = Served(tmp_path, recognize=lambda path: " heard ")
        with served.manager:
            assert store(served, recording, text="").json()["text"] == "heard"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"name": ""}, "name"), ({"name": "../up"}, "name"), ({"text": ""}, "text"), ({"text": "x" * 5001}, "text")],
    )
    def test_bad_fields(self, served: Served, recording: str, fields: dict[str, str], param: str | None) -> None:
        refused = store(served, recording, **fields)
        assert refused.status_code == 400
        assert error(refused)["param"] == param
        assert served.left() == []

    def test_a_name_that_is_taken(self, served: Served, recording: str) -> None:
        assert store(served, recording).status_code == 201
        assert store(served, recording).status_code == 409

    @pytest.mark.parametrize("audio", ["", "%%%", "aGVsbG8", "data:,", "aGVsbG8gd29ybGQ="])
    def test_broken_base64_and_what_is_no_recording(self, served: Served, audio: str) -> None:
        refused = served.client().post("/v1/audio/voices", json={"name": "Ada", "text": "x", "audio": audio})
        assert refused.status_code == 400
        error(refused)
        assert served.left() == []
        assert len(served.voices.all()) == 2

    @pytest.mark.parametrize(
        "content",
        [b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc', b"\0" * 99],
    )
    def test_broken_forms(self, served: Served, content: bytes) -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        refused = served.client().post("/v1/audio/voices", content=content, headers=headers)
        assert refused.status_code == 400
        error(refused)
        assert served.left() == []

    def test_a_form_without_boundary_or_file(self, served: Served) -> None:
        for headers in ({"Content-Type": "multipart/form-data"}, {"Content-Type": "multipart/form-data; boundary="}):
            assert served.client().post("/v1/audio/voices", content=b"x", headers=headers).status_code == 400
        refused = served.client().post("/v1/audio/voices", data={"name": "a"}, files={"other": b"x"})
        assert error(refused)["param"] == "file"


class TestFormsOnDisk:
    """Forms of more than 1 MB, which do not stay in memory."""

    @staticmethod
    def large(folder: Path) -> Path:
        path = folder / "large.wav"
        soundfile.write(path, np.random.default_rng(1).uniform(-0.5, 0.5, 1_000_000), 24000, subtype="PCM_16")
        return path

    @staticmethod
    def post(served: Served, path: Path, *, chunked: bool = False) -> Any:
        form = httpx.Request("POST", "http://any", files={"file": path.read_bytes()})
        body = form.read()
        pieces = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
        headers = {"Content-Type": form.headers["content-type"]}
        content = pieces if chunked else body
        return served.client().post("/v1/audio/transcriptions", content=content, headers=headers)

    def test_are_kept_in_the_folder_of_the_recordings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        served = Served(tmp_path, recognize=lambda path: "words")
        assert self.post(served, self.large(tmp_path)).json() == {"text": "words"}
        assert served.left() == []

    @pytest.mark.parametrize("chunked", [False, True])
    def test_count_while_they_are_read_and_used(self, tmp_path: Path, chunked: bool) -> None:
        reserved: list[float] = []
        served = Served(tmp_path, recognize=lambda path: str(reserved.append(served.recordings._reserved_bytes)))
        served.recordings._most_bytes = 20_000_000
        assert self.post(served, self.large(tmp_path), chunked=chunked).status_code == 200
        assert 2_000_000 <= reserved[0] < 4_000_000, "the copy for the engine, no longer the form"
        assert served.recordings._reserved_bytes == 0

    @pytest.mark.parametrize("chunked", [False, True])
    def test_are_refused_if_there_is_no_room_for_them(self, tmp_path: Path, chunked: bool) -> None:
        served = Served(tmp_path, recognize=lambda path: "words", disk=1_500_000)
        answer = self.post(served, self.large(tmp_path), chunked=chunked)
        assert answer.status_code == 507
        assert error(answer)["code"] == "disk_full"
        assert served.recordings._reserved_bytes == 0
        assert served.left() == []


class TestEdits:
    def test_a_new_text_that_the_engine_does_not_speak_is_refused_before_the_conversion(
        self, tmp_path: Path, recording: str
    ) -> None:
        heard: list[str] = []
        served = Served(tmp_path, recognize=lambda path: heard.append(path) or "heard")
        served.service.edit_types = {**served.service.edit_types, "paralinguistic": []}
        audio = base64.b64encode(Path(recording).read_bytes()).decode()
        body = {"audio": audio, "task": "paralinguistic", "tagged_text": "жук [Laughter]"}
        with served.manager:
            refused = served.client().post("/v1/audio/edits", json=body)
            assert (refused.status_code, error(refused)["param"]) == (400, "tagged_text")
            assert (heard, served.tones.asked) == ([], [])
            answer = served.client().post("/v1/audio/edits", json={**body, "tagged_text": "bug", "text": "жук"})
            assert answer.status_code == 200, "the words of the recording may be in any language"

    def test_a_recording_is_changed(self, served: Served, recording: str) -> None:
        with open(recording, "rb") as file:
            answer = served.client().post(
                "/v1/audio/edits", data={"task": "emotion", "sub_task": "sad", "text": "words"}, files={"file": file}
            )
        assert answer.status_code == 200, answer.text
        assert soundfile.info(io.BytesIO(answer.content)).frames == 5000
        assert served.tones.asked == [("edit", "words", "emotion", "sad")]
        assert served.left() == []

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"task": "clone"}, "task"), ({"task": "paint"}, "task"), ({"task": "emotion"}, "sub_task"), ({}, "task"),
         ({"task": "emotion", "sub_task": "bored"}, "sub_task"),
         ({"task": "vad", "response_format": "x"}, "response_format"), ({"task": "vad", "text": "x" * 5001}, "text")],
    )  # fmt: skip
    def test_bad_tasks(self, served: Served, recording: str, fields: dict[str, str], param: str) -> None:
        with open(recording, "rb") as file:
            refused = served.client().post("/v1/audio/edits", data={"text": "w", **fields}, files={"file": file})
        assert refused.status_code == 400
        assert error(refused)["param"] == param
        assert served.left() == []


class TestTranscriptions:
    def test_without_a_recognizer(self, served: Served, recording: str) -> None:
        with open(recording, "rb") as file:
            refused = served.client().post("/v1/audio/transcriptions", files={"file": file})
        assert refused.status_code == 400
        assert "--enable-auto-transcribe" in error(refused)["message"]

    @pytest.mark.parametrize(
        ("form", "answer"), [("json", '{"text": "heard"}'), ("text", "heard\n"), (None, '{"text": "heard"}')]
    )
    def test_with_one(self, tmp_path: Path, recording: str, form: str | None, answer: str) -> None:
        served = Served(tmp_path, recognize=lambda path: f" heard{'' if soundfile.info(path).frames else ' nothing'} ")
        with served.manager, open(recording, "rb") as file:
            data = {"model": "whisper-1", **({"response_format": form} if form else {})}
            assert served.client().post("/v1/audio/transcriptions", data=data, files={"file": file}).text == answer
        assert served.left() == []

    def test_without_a_manager_one_at_a_time(self, tmp_path: Path, recording: str) -> None:
        gate, current, most = Gate(), list[str](), list[int]()

        def recognize(path: str) -> str:
            current.append(path)
            gate.pass_through()
            most.append(len(current))
            current.remove(path)
            return "heard"

        served = Served(tmp_path, recognize=recognize, managed=False)
        server = Server(served.app)
        try:
            url = f"http://127.0.0.1:{server.port}/v1/audio/transcriptions"
            form = httpx.Request("POST", url, files={"file": Path(recording).read_bytes()})
            content, kind = form.read(), {"content-type": form.headers["content-type"]}
            first = Worker(lambda: httpx.post(url, content=content, headers=kind).text)
            gate.wait_for_arrival()
            second = Worker(lambda: httpx.post(url, content=content, headers=kind).text)
            assert wait_until(lambda: served.service.running == 2)
            with begun(server.port, "/v1/audio/transcriptions", content, f"content-type: {kind['content-type']}"):
                assert wait_until(lambda: served.service.running == 3)
            assert wait_until(lambda: served.service.running == 2), "a client that leaves leaves the queue"
            gate.open()
            assert [each.result() for each in (first, second)] == ['{"text": "heard"}'] * 2
        finally:
            gate.open()
            server.close()
        assert most == [1, 1]

    def test_empty_fields_are_as_if_absent(self, tmp_path: Path, recording: str) -> None:
        served = Served(tmp_path, recognize=lambda path: "heard")
        data = dict.fromkeys(("model", "language", "prompt", "response_format", "temperature", "stream"), "")
        with served.manager, open(recording, "rb") as file:
            answer = served.client().post("/v1/audio/transcriptions", data=data, files={"file": file})
            assert answer.text == '{"text": "heard"}'

    def test_openais_client_reads_a_stream(self, tmp_path: Path, recording: str) -> None:
        served = Served(tmp_path, recognize=lambda path: "words that 听到")
        server = Server(served.app)
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
                ask: Any = client.audio.transcriptions.create
                events = list(ask(model="gpt-4o-transcribe", file=Path(recording), language="en", stream=True))
            assert [event.type for event in events] == ["transcript.text.delta", "transcript.text.done"]
            assert events[0].delta == events[1].text == "words that 听到"
            described = served.app.openapi()["paths"]["/v1/audio/transcriptions"]["post"]
            assert "text/event-stream" in described["responses"]["200"]["content"]
            fields = described["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
            assert fields["stream"]["type"] == "boolean"
        finally:
            server.close()
            served.manager.close()

    def test_a_stream_that_is_neither_true_nor_false(self, tmp_path: Path, recording: str) -> None:
        served = Served(tmp_path, recognize=lambda path: "heard")
        with served.manager, open(recording, "rb") as file:
            refused = served.client().post("/v1/audio/transcriptions", data={"stream": "x"}, files={"file": file})
        assert (refused.status_code, error(refused)["param"]) == (400, "stream")
        assert "应为 true 或 false" in error(refused)["message"]

    def test_json_is_refused(self, served: Served) -> None:
        refused = served.client().post("/v1/audio/transcriptions", json={"file": "x"})
        assert "multipart/form-data" in error(refused)["message"]

    def test_formats_with_times_are_refused(self, tmp_path: Path, recording: str) -> None:
        served = Served(tmp_path, recognize=lambda path: "heard")
        with served.manager, open(recording, "rb") as file:
            data = {"response_format": "srt"}
            refused = served.client().post("/v1/audio/transcriptions", data=data, files={"file": file})
        assert error(refused)["param"] == "response_format"


def test_models(served: Served, tmp_path: Path) -> None:
    models = served.client().get("/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["tones"]
    hearing = Served(tmp_path, recognize=lambda path: "")
    with hearing.manager:
        assert [model["id"] for model in hearing.client().get("/v1/models").json()["data"]] == ["tones", "whisper-1"]


def test_they_are_described_with_or_without_management(served: Served) -> None:
    with_gpu = served.client().get("/openapi.json").json()
    assert {"/v1/audio/speech", "/gpu/status"} <= set(with_gpu["paths"])
    speech = with_gpu["paths"]["/v1/audio/speech"]["post"]
    assert set(speech["responses"]["200"]["content"]) >= {"audio/mpeg", "audio/wav"}


def test_each_call_lists_the_codes_that_it_can_return(served: Served) -> None:
    paths = served.client().get("/openapi.json").json()["paths"]
    listed = {
        (method, path): {int(code) for code in call["responses"]}
        for path, calls in paths.items()
        if path.startswith("/v1/")
        for method, call in calls.items()
    }
    work = {403, 413, 429, 500, 503, 507}
    assert listed == {
        ("get", "/v1/models"): {200, 401, 403, 429},
        ("post", "/v1/audio/speech"): {200, 400, 401, 404} | work,
        ("post", "/v1/audio/edits"): {200, 400, 401} | work,
        ("post", "/v1/audio/transcriptions"): {200, 400, 401, 404} | work,
        ("get", "/v1/audio/voices"): {200, 401, 403, 429, 503},
        ("post", "/v1/audio/voices"): {201, 400, 401, 409} | work,
        ("delete", "/v1/audio/voices/{name}"): {200, 400, 401, 403, 404, 429, 503, 507},
    }


def test_refusals_have_examples(served: Served) -> None:
    paths = served.client().get("/openapi.json").json()["paths"]
    for path, calls in paths.items():
        for code, answer in (each for call in calls.values() for each in call["responses"].items()):
            if path.startswith("/v1/") and code >= "400" and code not in ("403", "500"):
                example = answer["content"]["application/json"]["example"]["error"]
                assert " / " in example["message"]
                assert answer["description"]
    missing = paths["/v1/audio/voices/{name}"]["delete"]["responses"]["404"]
    assert "voice" in missing["description"]
    assert missing["content"]["application/json"]["example"]["error"]["code"] == "voice_not_found"
