"""What every kind does with servers that are away, older, guarded, broken, or of another kind."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
from recorded_server import Reply, recorded

from residency.errors import InvalidInput, NeighborRefused, NeighborUnreachable
from residency.neighbors import KINDS, Held, neighbor, parse, server

each_kind = pytest.mark.parametrize("kind", KINDS)
OLLAMA = {"GET /api/ps": Reply({"models": [{"name": "tiny", "size_vram": 5}]})}


@each_kind
def test_a_server_that_does_not_run_is_unreachable(kind: str) -> None:
    with socket.socket() as bound:  # it does not listen
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(NeighborUnreachable, match="Check that it runs"):
            neighbor(kind, f"http://127.0.0.1:{bound.getsockname()[1]}").held()


@each_kind
def test_an_older_server_without_the_call_says_what_to_do(kind: str) -> None:
    with recorded({}) as server, pytest.raises(NeighborUnreachable, match=r"it has no GET .*(Update|Start)"):
        neighbor(kind, server.url).held()


@each_kind
@pytest.mark.parametrize("status", [401, 403])
def test_a_guarded_server_needs_a_token(kind: str, status: int) -> None:
    unauthorized = Reply({"detail": "Unauthorized"}, status)
    with recorded({}, unauthorized) as server, pytest.raises(NeighborUnreachable, match="it needs a token"):
        neighbor(kind, server.url).held()


@each_kind
def test_a_failing_server_is_quoted(kind: str) -> None:
    failed = Reply("out\nof memory", 500)
    with recorded({}, failed) as server, pytest.raises(NeighborUnreachable, match="answered 500: out of memory"):
        neighbor(kind, server.url).held()


@each_kind
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", "<html>hello</html>", None, [], {}, 5, "text", {"models": 5}, {"models": [5]},
     {"data": [{"id": "x"}]}, {"running": [{}]}, {"is_sleeping": "no"}, {"enable_memory_saver": True}, {"state": 5},
     {"loads": [{}]}, {"exec_info": {"queue_remaining": "many"}}, {"models": {"tts": {"leases": 1}}}, "[" * 100_000],
)  # fmt: skip
def test_other_answers_are_errors(kind: str, body: object) -> None:
    data = body if isinstance(body, bytes) else Reply(body).data
    with recorded({}, Reply(data)) as server, pytest.raises(NeighborUnreachable):
        neighbor(kind, server.url).held()


@each_kind
def test_answers_have_a_limit(kind: str) -> None:
    long = Reply(b" " * (1 << 20) + b"{}")
    with recorded({}, long) as server, pytest.raises(NeighborUnreachable, match="longer than 1,048,576 bytes"):
        neighbor(kind, server.url).held()


@each_kind
def test_redirects_are_not_followed(kind: str) -> None:
    with recorded({}) as other, recorded({}, Reply(b"", 307, {"Location": f"{other.url}/elsewhere"})) as server:
        with pytest.raises(NeighborUnreachable, match=f"redirected to '{other.url}/elsewhere'"):
            neighbor(kind, server.url, "secret").held()
        assert other.calls == []


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers, like a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@each_kind
def test_a_stopped_server_costs_the_time_limit(kind: str, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HELD_S", 0.05)
    with pytest.raises(NeighborUnreachable, match=r"no answer to GET .* within 0\.05 s"):
        neighbor(kind, silent).held()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: ", b"HT"])
def test_the_time_limit_is_that_of_the_whole_answer(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, but not all of them: of the body, the headers, or the first line."""
    monkeypatch.setattr(server, "HELD_S", 0.3)
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(head)
            with contextlib.suppress(OSError):  # the client has left
                for _ in range(500):
                    if over.wait(0.02):
                        break
                    connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        with pytest.raises(NeighborUnreachable, match=r"within 0\.3 s"):
            neighbor("ollama", f"http://127.0.0.1:{listener.getsockname()[1]}").held()
        over.set()
        thread.join()


def test_an_answer_may_end_the_connection_before_it_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.13 does: the last bytes close it (https://github.com/python/cpython/issues/113199)."""
    read1 = http.client.HTTPResponse.read1

    def closes(self: http.client.HTTPResponse, n: int = -1) -> bytes:
        part = read1(self, n)
        if self.length == 0:
            self.close()
        return part

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closes)
    with recorded(OLLAMA) as server:
        assert neighbor("ollama", server.url).held() == Held(False, 5, ("tiny",))
        assert server.headers["Connection"] == "close"


@each_kind
def test_an_answer_that_breaks_off_is_no_answer(kind: str) -> None:
    whole = Reply("vllm:num_requests_running 0\n", headers={"Content-Length": "500"})
    with recorded({}, whole) as server, pytest.raises(NeighborUnreachable, match="IncompleteRead"):
        neighbor(kind, server.url).held()


def test_no_http_at_all_is_unreachable() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"\x00\x01 this is another protocol\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with pytest.raises(NeighborUnreachable):
            neighbor("ollama", f"http://127.0.0.1:{listener.getsockname()[1]}").held()
        thread.join()


def test_a_refusal_is_quoted() -> None:
    refused = {"POST /api/generate": Reply({"error": "model 'tiny' not found"}, 500)}
    with recorded(OLLAMA | refused) as server, pytest.raises(NeighborRefused, match="model 'tiny' not found"):
        neighbor("ollama", server.url).ask()


def test_the_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with recorded(OLLAMA) as server:
        assert neighbor("ollama", server.url).held() == Held(False, 5, ("tiny",))


def test_tokens_are_sent_and_not_shown() -> None:
    with recorded(OLLAMA) as server:
        bearer = parse(f"ollama={server.url.replace('//', '//se%63ret@')}")
        assert bearer is not None
        bearer.held()
        assert server.headers["Authorization"] == "Bearer secret"
        basic = parse(f"ollama={server.url.replace('//', '//me:secret@')}")
        assert basic is not None
        basic.held()
        assert server.headers["Authorization"] == "Basic bWU6c2VjcmV0"
        server.replies.clear()
        with pytest.raises(NeighborUnreachable) as raised:
            basic.held()
        assert "secret" not in f"{bearer!r} {bearer.url} {basic!r} {basic.url} {raised.value!r}"
        assert bearer.url == server.url


def test_an_address_may_have_a_path() -> None:
    with recorded({"GET /chat/api/ps": Reply({"models": []})}) as server:
        assert neighbor("ollama", f"{server.url}/chat/").held() == Held(False, 0)


@pytest.mark.parametrize("text", ["auto", " AUTO "])
def test_auto_is_no_single_server(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_flag_names_the_kind_and_the_address(kind: str) -> None:
    server = parse(f" {kind.upper()}=http://LOCALHOST:1234/ ")
    assert server is not None
    assert (server.kind, server.url) == (kind, "http://localhost:1234")
    assert server == neighbor(kind, "http://localhost:1234")


def test_an_address_without_a_port_and_one_of_ipv6() -> None:
    assert neighbor("vllm", "https://gpu.example").url == "https://gpu.example"
    assert neighbor("vllm", "http://[::1]:8000").url == "http://[::1]:8000"


@pytest.mark.parametrize("kind", ["", "lmstudio", "Ollama"])
def test_an_unknown_kind_lists_the_known_ones(kind: str) -> None:
    with pytest.raises(InvalidInput, match=", ".join(KINDS)):
        neighbor(kind, "http://127.0.0.1:1")


def test_a_flag_without_a_kind_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=", ".join(KINDS)):
        parse("http://127.0.0.1:11434")


@pytest.mark.parametrize("text", ["http://SECRET=@host:80", "http://me:SECRET=@host", "SECRET=@host:80", "SECRET="])
def test_a_token_in_a_flag_without_a_kind_is_not_shown(text: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse(text)
    assert "secret" not in repr(raised.value).lower()


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:11434", "ftp://x", "http://", "http://:80", "http://x:0", "http://x:port", "http://x:99999",
     "http://x/?a=1", "http://x/#a", "http://x y", "http://x\r\nA: b", "http://[::1", "http://ä..b", "file:///etc"],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        neighbor("ollama", url)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nb", "ä"])
def test_tokens_that_no_header_holds_are_refused(token: str) -> None:
    with pytest.raises(InvalidInput):
        neighbor("ollama", "http://127.0.0.1:1", token)
