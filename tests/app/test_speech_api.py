"""The speech API of a served app, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import soundfile
from app_process import ForkedApp, RunningApp, wait_until
from gated_engine import close_gate, open_gate
from raw_http import ask

from residency.web.speech.sample_voices import FOLDER, VOICES

KEY = "a-key-of-the-app"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """The built-in engine on a simulated card; pages of one other site may call it."""
    folder = tmp_path_factory.mktemp("app")
    arguments = (
        "--enable-gpu-management", "--simulate-gpu", "48GB", "--api-key", KEY, "--voices-dir", str(folder / "voices"),
        "--cors-origin", "https://chat.example.org",
    )  # fmt: skip
    with ForkedApp(folder / "tmp", *arguments) as app:
        yield app


@pytest.fixture(scope="module")
def client(app: RunningApp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def left(app: RunningApp) -> list[str]:
    return [str(path) for path in app.tmp_dir.rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_a_page_that_stays_open_beside_keys_is_warned_of(app: RunningApp) -> None:
    assert "--api-key closes /v1 only" in app.log
    assert "--auth USER:PASSWORD" in app.log


class TestOpenAisClient:
    def test_speech_to_a_file(self, client: openai.OpenAI, tmp_path: Path) -> None:
        answer = client.audio.speech.create(model="tts-1", voice="high", input="Good morning.")
        answer.write_to_file(tmp_path / "speech.mp3")
        assert soundfile.info(tmp_path / "speech.mp3").duration > 0.5

    @pytest.mark.parametrize("form", ["wav", "flac", "opus", "mp3"])
    def test_formats(self, client: openai.OpenAI, form: Any) -> None:
        spoken = client.audio.speech.create(model="tts-1", voice="low", input="Good morning.", response_format=form)
        assert 0.2 < soundfile.info(io.BytesIO(spoken.content)).duration < 2

    def test_a_stream(self, client: openai.OpenAI) -> None:
        with client.audio.speech.with_streaming_response.create(
            model="gpt-4o-mini-tts", voice="high", input="One sentence. And another sentence.", response_format="pcm"
        ) as answer:
            pieces = list(answer.iter_bytes(4096))
        assert len(b"".join(pieces)) > 2 * 24000
        assert "wait;dur=" in answer.headers["server-timing"]

    def test_a_conversation_prefetched_in_parallel_is_answered_in_order(self, app: RunningApp) -> None:
        answered: list[str] = []
        lengths: dict[str, int] = {}

        async def converse(*texts: str) -> None:
            async with openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key=KEY, max_retries=0) as client:

                async def say(text: str) -> None:
                    asked = client.audio.speech.with_streaming_response.create(
                        model="tts-1", voice="high", input=text, response_format="pcm"
                    )
                    async with asked as spoken:
                        lengths[text] = sum([len(piece) async for piece in spoken.iter_bytes()])
                    answered.append(text)

                requests = []
                for text in texts:
                    requests.append(asyncio.ensure_future(say(text)))
                    waiting = len(requests) - 1
                    await asyncio.to_thread(wait_until, lambda waiting=waiting: is_under_way(waiting))
                await asyncio.gather(*requests)

        def is_under_way(waiting: int) -> bool:
            model = app.model()
            return bool(answered) or model["leases"] + model["waiting"] > waiting

        conversation = ("Yes, of course I do, and I always did.", "No.", "Let me think about it for a while.")
        asyncio.run(converse(*conversation))
        assert tuple(answered) == conversation
        assert lengths[conversation[1]] < lengths[conversation[2]]

    @pytest.mark.parametrize("brings_recording", [False, True], ids=["named voice", "own recording"])
    def test_so_are_three_that_are_sent_at_once(self, app: RunningApp, brings_recording: bool) -> None:
        """The first has a long text, or a recording of one megabyte; the others are checked sooner."""
        recording = io.BytesIO()
        spoken, sample_rate = soundfile.read(FOLDER / VOICES["high"].file)
        soundfile.write(recording, spoken, sample_rate, "DOUBLE", format="wav")
        own = {"ref_audio": base64.b64encode(recording.getvalue()).decode(), "ref_text": VOICES["high"].says}
        answered: list[int] = []

        async def say(client: openai.AsyncOpenAI, number: int, text: str, own: dict[str, str]) -> None:
            asked = client.audio.speech.with_streaming_response.create(
                model="tts-1", voice="high", input=text, response_format="pcm", extra_body=own
            )
            async with asked as spoken:
                answered.append(number)
                assert await spoken.read()

        async def converse() -> None:
            async with openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key=KEY, max_retries=0) as client:
                await client.models.list()  # the first request of a client begins in another thread
                first = say(client, 0, "Yes, of course I do. " * 8, own if brings_recording else {})
                await asyncio.gather(first, say(client, 1, "No.", {}), say(client, 2, "Well, let me think.", {}))

        asyncio.run(converse())
        assert answered == [0, 1, 2]

    def test_events_and_voices(self, client: openai.OpenAI) -> None:
        with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="high", input="Good morning.", stream_format="sse"
        ) as answer:
            events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
        assert [events[0]["type"], events[-1]["type"]] == ["speech.audio.delta", "speech.audio.done"]
        voices = client.get("/audio/voices", cast_to=dict[str, Any])  # type: ignore[arg-type]
        assert [voice["id"] for voice in voices["voices"]] == ["high", "low"]

    def test_errors_are_its_own(self, app: RunningApp, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="choose one of") as wrong_voice:
            client.audio.speech.create(model="tts-1", voice="nobody", input="Hi")
        assert wrong_voice.value.param == "voice"
        with pytest.raises(openai.NotFoundError):
            client.audio.speech.create(model="gpt-9", voice="high", input="Hi")
        for text in ("Доброе утро", "Guten Tag, wie geht es Ihnen heute? Ich freue mich sehr."):
            with pytest.raises(openai.BadRequestError, match="English"):
                client.audio.speech.create(model="tts-1", voice="high", input=text)
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{app.url}/v1", api_key="x") as other:
            other.models.list()

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["builtin"]

    def test_nothing_is_left(self, app: RunningApp, client: openai.OpenAI) -> None:
        client.audio.speech.create(model="tts-1", voice="high", input="Good morning.")
        assert left(app) == []


@pytest.mark.parametrize("path", ["/v1/audio/voices/a%00b", "/v1/audio/speech%00"])
def test_a_null_byte_in_a_path(app: RunningApp, path: str) -> None:
    refused = ask(app.port, path, f"Authorization: Bearer {KEY}", method="DELETE")
    assert refused.status == 404
    assert set(json.loads(refused.text)["error"]) == {"message", "type", "param", "code"}


class TestOtherSites:
    ORIGIN = "Origin: https://chat.example.org"
    JSON = ("Content-Type: application/json", f"Authorization: Bearer {KEY}", "Sec-Fetch-Site: cross-site")

    def test_a_named_site_may_call_it(self, app: RunningApp) -> None:
        preflight = ask(
            app.port, "/v1/audio/speech", self.ORIGIN, "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type", "Sec-Fetch-Site: cross-site",
            method="OPTIONS",
        )  # fmt: skip
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example.org"
        body = json.dumps({"input": "Hi there.", "voice": "high", "response_format": "wav"}).encode()
        spoken = ask(app.port, "/v1/audio/speech", self.ORIGIN, *self.JSON, method="POST", body=body)
        assert spoken.status == 200
        assert spoken.headers["access-control-allow-origin"] == "https://chat.example.org"

    @pytest.mark.parametrize("origin", ["https://evil.example.org", "null", "https://chat.example.org.evil.org"])
    def test_no_other_may(self, app: RunningApp, origin: str) -> None:
        refused = ask(app.port, "/v1/audio/speech", f"Origin: {origin}", *self.JSON, method="POST", body=b"{}")
        assert refused.status == 403
        assert "message" in json.loads(refused.text)["error"], "in the interface's shape"
        declared = app.get("/openapi.json")[1]["paths"]["/v1/audio/speech"]["post"]["responses"]["403"]["content"]
        assert set(declared) == {refused.headers["content-type"]}
        assert "access-control-allow-origin" not in refused.headers

    def test_the_named_site_may_call_nothing_else(self, app: RunningApp) -> None:
        headers = (self.ORIGIN, "Sec-Fetch-Site: cross-site", "Content-Type: application/json")
        assert ask(app.port, "/gpu/release", *headers, method="POST", body=b"{}").status == 403


def test_uploads_have_their_own_limit(tmp_path: Path) -> None:
    with ForkedApp(tmp_path / "tmp", "--max-upload", "1MB", "--voices-dir", str(tmp_path / "voices")) as app:
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        body = head + b"\0" * (2 << 20) + b"\r\n--x--\r\n"
        refused = ask(
            app.port, "/v1/audio/voices", "Content-Type: multipart/form-data; boundary=x", method="POST", body=body
        )
        assert refused.status == 413
        assert "--max-upload" in json.loads(refused.text)["error"]["message"]
        status, _ = app.get("/v1/models")
        assert status == 200, "also without GPU management"
        assert ask(app.port, "/gpu/status").status == 404
        assert ask(app.port, "/docs").status == 200


class TestLeaving:
    @pytest.fixture
    def gates(self, tmp_path: Path) -> Path:
        folder = tmp_path / "gates"
        folder.mkdir()
        return folder

    @staticmethod
    def speak(app: RunningApp) -> socket.socket:
        """Sends a request whose answer nobody reads; returns its connection."""
        body = json.dumps({"input": "Good morning. How are you today?", "voice": "high"}).encode()
        sender = socket.create_connection(("127.0.0.1", app.port))
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        sender.sendall(head.encode() + body)
        return sender

    def test_in_the_middle_of_the_body(self, app: RunningApp) -> None:
        app.forget_log()
        with socket.create_connection(("127.0.0.1", app.port)) as sender:
            key = f"Authorization: Bearer {KEY}"
            head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\n{key}\r\nContent-Length: 100\r\n\r\n"
            sender.sendall(head.encode() + b'{"input": "Good')
            sender.shutdown(socket.SHUT_WR)
            sender.recv(1000)
        assert ask(app.port, "/healthz").status == 200
        assert "Traceback" not in app.log

    @pytest.mark.parametrize(
        "management", [(), ("--enable-gpu-management", "--simulate-gpu", "48GB")], ids=["off", "on"]
    )
    def test_a_closed_connection_frees_the_queue_at_once(
        self, tmp_path: Path, gates: Path, management: tuple[str, ...]
    ) -> None:
        with ForkedApp(tmp_path / "tmp", *management, gates=gates) as app:
            close_gate(gates, "speak")
            running = self.speak(app)
            app.wait_for_line("at the gate: speak")
            waiting = [self.speak(app) for _ in range(3)]
            if management:
                assert wait_until(lambda: app.model()["waiting"] == 3)
            for connection in waiting:
                connection.close()
            if management:
                assert wait_until(lambda: app.model()["waiting"] == 0)
            running.close()
            open_gate(gates, "speak")
            body = json.dumps({"input": "Hi there.", "voice": "high"}).encode()
            assert ask(app.port, "/v1/audio/speech", method="POST", body=body).status == 200
            assert wait_until(lambda: left(app) == [])
            assert app.log.count("Good morning") <= 1, "those that waited were never spoken"
