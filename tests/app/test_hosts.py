"""Where the app listens, and under which names it answers callers on its own machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import ForkedApp, RunningApp, free_port, wait_until
from gradio_client import Client
from raw_http import ask
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from residency.addresses import serving
from residency.errors import InvalidInput
from residency.launch.listening import check_port
from residency.web.server.hosts import Hosts, container_gateway

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    names = ("--allowed-host", "speech.example.org", "--allowed-host", "https://One.example:8443/, bücher.example")
    with ForkedApp(tmp_path_factory.mktemp("app"), *ARGUMENTS, *names, "--control-token", "t") as app:
        yield app


def test_the_log_tells_on_which_addresses_it_listens(tmp_path: Path) -> None:
    with ForkedApp(tmp_path, *ARGUMENTS, "--server-name", "0.0.0.0") as app:
        line = app.wait_for_line("Serving on")
    assert f"http://localhost:{app.port} " in line
    for words in ("every other address of this machine (0.0.0.0)", "本机的所有地址（0.0.0.0）"):
        assert words in line
    assert line.count("--server-name 127.0.0.1") == 2
    assert serving("127.0.0.1", 7860) == "Serving on http://127.0.0.1:7860 / 服务已启动"
    assert serving("::1", 7860, "https") == "Serving on https://[::1]:7860 / 服务已启动"


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
class TestIPv6:
    @pytest.mark.parametrize("name", ["::1", "[::1]"])
    def test_it_listens_on_its_address(self, tmp_path: Path, name: str) -> None:
        with ForkedApp(tmp_path, *ARGUMENTS, "--server-name", name) as app:
            assert f"http://[::1]:{app.port} " in app.wait_for_line("Serving on")
            assert self.is_local(app, "::1")
            assert Client(f"http://[::1]:{app.port}", verbose=False).predict(api_name="/gpu_status")
            with pytest.raises(ConnectionRefusedError):
                ask(app.port, "/healthz")
            assert "Traceback" not in app.log

    @pytest.mark.parametrize("name", ["::", "[::]"])
    def test_every_address_is_also_every_one_of_ipv4(self, tmp_path: Path, name: str) -> None:
        with ForkedApp(tmp_path, *ARGUMENTS, "--server-name", name) as app:
            line = app.wait_for_line("Serving on")
            assert f"http://localhost:{app.port} " in line
            assert "every other address of this machine (::)" in line
            assert "--server-name 127.0.0.1" in line
            assert self.is_local(app, "::1")
            assert self.is_local(app, "127.0.0.1")
            assert ask(app.port, "/gpu/status", address="::1", host="evil.example").status == 403

    def test_no_proxy_of_the_network_is_in_the_way(self, tmp_path: Path) -> None:
        dead = f"import os; os.environ.update(HTTP_PROXY='http://127.0.0.1:{free_port()}', http_proxy='http://x.invalid')\n"
        with ForkedApp(tmp_path, *ARGUMENTS, "--server-name", "::1", prelude=dead) as app:
            assert ask(app.port, "/readyz", address="::1", host="[::1]").status == 200

    @pytest.mark.parametrize(("name", "taken"), [("::1", "::1"), ("::", "127.0.0.1")])
    def test_a_port_that_is_taken_is_said_at_once(self, tmp_path: Path, name: str, taken: str) -> None:
        family = socket.AF_INET6 if ":" in taken else socket.AF_INET
        with socket.socket(family) as other:
            other.bind((taken, 0))
            other.listen()
            port = other.getsockname()[1]
            app = ForkedApp(tmp_path, *ARGUMENTS, "--server-name", name, "--server-port", str(port))
            assert app.process.wait(60) == 1
            assert "--server-port" in app.wait_for_line(f"Cannot listen on {name}, port {port}")
            app.__exit__()

    @pytest.mark.parametrize("name", ["a..b", ".localhost", "x" * 80])
    def test_what_is_no_name_of_a_host_is_said(self, name: str) -> None:
        with pytest.raises(InvalidInput, match=r"Cannot listen on .* --server-name"):
            check_port(name, 7860)

    def is_local(self, app: RunningApp, address: str) -> bool:
        host = f"[{address}]" if ":" in address else address
        status = ask(app.port, "/gpu/release", method="POST", address=address, host=f"{host}:{app.port}").status
        return status == 200 and ask(app.port, "/", address=address, host=f"{host}:{app.port}").status == 200


class TestContainers:
    """A container with a network of its own (``docker run -p``): callers on the host have its gateway's address."""

    ROUTES = (
        "Iface\tDestination\tGateway\tFlags\n"
        "eth0\t000011AC\t00000000\t0001\n"
        f"eth0\t00000000\t{int.from_bytes(socket.inet_aton('172.17.0.1'), sys.byteorder):08X}\t0003\n"
    )

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "proc/net").mkdir(parents=True)
        (tmp_path / "proc/net/route").write_text(self.ROUTES)
        (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
        (tmp_path / ".dockerenv").touch()
        return tmp_path

    def test_the_gateway_is_the_host(self, root: Path) -> None:
        assert container_gateway(root) == "172.17.0.1"

    def test_podman_makes_such_containers_too(self, root: Path) -> None:
        (root / ".dockerenv").unlink()
        (root / "run").mkdir()
        (root / "run/.containerenv").touch()
        assert container_gateway(root) == "172.17.0.1"

    def test_a_machine_and_a_container_with_its_network_have_none(self, root: Path) -> None:
        (root / "sys/class/net/docker0").mkdir()
        assert container_gateway(root) is None
        (root / "sys/class/net/docker0").rmdir()
        (root / ".dockerenv").unlink()
        assert container_gateway(root) is None

    @pytest.mark.parametrize("routes", [None, "", "Iface\n", "Iface\neth0\n", "Iface\neth0 00000000 xyz\n"])
    def test_without_a_readable_route_there_is_none(self, root: Path, routes: str | None) -> None:
        (root / "proc/net/route").unlink()
        if routes is not None:
            (root / "proc/net/route").write_text(routes)
        assert container_gateway(root) is None

    @pytest.mark.parametrize("client", ["172.17.0.1", "::ffff:172.17.0.1"])
    @pytest.mark.parametrize(("host", "status"), [("evil.example", 403), ("localhost:7860", 200), ("192.0.2.7", 200)])
    def test_a_foreign_name_is_refused_to_callers_on_the_host(self, client: str, host: str, status: int) -> None:
        app = Hosts(gateway="172.17.0.1").around(PlainTextResponse("served"))
        assert TestClient(app, client=(client, 4444)).get("/", headers={"host": host}).status_code == status

    def test_callers_elsewhere_use_any_name(self) -> None:
        app = Hosts(gateway="172.17.0.1").around(PlainTextResponse("served"))
        caller = TestClient(app, client=("172.17.0.9", 4444))
        assert caller.get("/", headers={"host": "speech.example"}).status_code == 200


class TestNames:
    PATHS = ("/", "/config", "/gpu/status", "/metrics", "/gpu/history", "/healthz", "/docs", "/gradio_api/info",
             "/theme.css", "/gradio_api/queue/status", "/gradio_api/here/x", "/no/such/page")  # fmt: skip

    @pytest.mark.parametrize("path", PATHS)
    def test_a_foreign_one_is_refused_with_what_to_do(self, app: RunningApp, path: str) -> None:
        answer = ask(app.port, path, host=f"evil.example:{app.port}")
        assert answer.status == 403
        for words in (
            "--allowed-host evil.example ",
            "GPU_TTS_ALLOWED_HOSTS=evil.example",
            f"localhost:{app.port}",
            "其他网站",
        ):
            assert words in answer.text

    @pytest.mark.parametrize(
        "header",
        ["X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: 203.0.113.9:4444", "X-Forwarded-Host: localhost",
         "X-Real-IP: 203.0.113.9", "Forwarded: for=203.0.113.9;host=localhost", "Via: 1.1 proxy",
         "Origin: http://evil.example", "Sec-Fetch-Site: same-origin"],
    )  # fmt: skip
    def test_no_header_helps_since_a_page_may_send_any(self, app: RunningApp, header: str) -> None:
        for method, path in (("GET", "/gpu/status"), ("POST", "/gpu/release"), ("POST", "/gradio_api/queue/join")):
            assert ask(app.port, path, header, method=method, host="evil.example").status == 403

    @pytest.mark.parametrize(
        "host",
        ["localhost", "LOCALHOST.", "tts.localhost", "127.0.0.1", "127.8.9.1", "[::1]", "[::ffff:127.0.0.1]", "::1",
         "192.0.2.1", socket.gethostname(), "speech.example.org", "Speech.Example.ORG.", "one.example",
         "xn--bcher-kva.example"],
    )  # fmt: skip
    @pytest.mark.parametrize("port", ["", ":7860"])
    def test_those_of_this_machine_and_the_allowed_are_answered(self, app: RunningApp, host: str, port: str) -> None:
        assert ask(app.port, "/gpu/status", host=host + port).status == 200

    @pytest.mark.parametrize("host", ["localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example", "[::1", "@",
                                      "x" * 300, "sub.speech.example.org", "<b>", "evil.example#localhost",
                                      "localhost:1:2"])  # fmt: skip
    def test_what_only_looks_like_one_is_refused(self, app: RunningApp, host: str) -> None:
        assert ask(app.port, "/gpu/status", host=host).status in (400, 403)

    def test_health_checks_of_balancers_send_no_name(self, app: RunningApp) -> None:
        assert ask(app.port, "/healthz", host=None, version="1.0").status == 200

    def test_who_knows_the_token_may_use_any(self, app: RunningApp) -> None:
        answer = ask(app.port, "/gpu/release", "Authorization: Bearer t", method="POST", host="evil.example")
        assert answer.status == 200

    def test_the_token_is_guessed_no_faster_with_unknown_names(self, tmp_path: Path) -> None:
        with ForkedApp(tmp_path, *ARGUMENTS, "--control-token", "t") as app:
            for number in range(6):
                guess = f"Authorization: Bearer guess {number}"
                assert ask(app.port, "/gpu/status", guess, host="evil.example").status == 403
            assert ask(app.port, "/gpu/status", "Authorization: Bearer t", host="evil.example").status == 403

    def test_an_allowed_one_is_not_this_machine(self, app: RunningApp) -> None:
        for host, status in (("speech.example.org", 401), ("localhost", 200)):
            assert ask(app.port, "/gpu/release", method="POST", host=host).status == status

    def test_the_environment_allows_names_too(self, tmp_path: Path) -> None:
        prelude = "import os; os.environ['GPU_TTS_ALLOWED_HOSTS'] = 'a.example, b.example'\n"
        with ForkedApp(tmp_path, *ARGUMENTS, prelude=prelude) as app:
            for host, status in (("a.example", 200), ("b.example:80", 200), ("c.example", 403)):
                assert ask(app.port, "/gpu/status", host=host).status == status

    def test_where_a_password_is_asked_for_a_name_reveals_nothing(self, tmp_path: Path) -> None:
        with ForkedApp(tmp_path, *ARGUMENTS, "--auth", "me:secret") as app:
            assert ask(app.port, "/", host="evil.example").status == 200
            for path in ("/gpu/status", "/metrics", "/config", "/gradio_api/info"):
                assert ask(app.port, path, host="evil.example").status == 401

    def test_a_public_link_is_allowed_and_no_other_of_its_kind(self, tmp_path: Path) -> None:
        prelude = "from gradio import networking\nnetworking.setup_tunnel = lambda **_: 'https://abc.gradio.live'\n"
        with ForkedApp(tmp_path, *ARGUMENTS, "--share", prelude=prelude) as app:
            app.wait_for_line("Public link")
            for host, status in (("abc.gradio.live", 200), ("def.gradio.live", 403), ("localhost", 200)):
                assert ask(app.port, "/gpu/status", host=host).status == status

    def test_callers_at_the_machines_own_address_are_on_it(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing
            except OSError:
                pytest.skip("needs a network")
            address = probe.getsockname()[0]
        with ForkedApp(tmp_path, *ARGUMENTS, "--server-name", "0.0.0.0") as app:
            assert ask(app.port, "/gpu/status", address=address, host=address).status == 200
            assert ask(app.port, "/gpu/status", address=address, host="evil.example").status == 403


class TestThisMachine:
    """Changing calls without a token."""

    @pytest.mark.parametrize(
        ("host", "version"), [("speech.example.org", "1.1"), ("localhost", "1.0"), (None, "1.0"), ("192.0.2.1", "1.0")]
    )
    def test_what_a_silent_proxy_passes_on_is_not_from_it(
        self, app: RunningApp, host: str | None, version: str
    ) -> None:
        for path in ("/gpu/release", "/gpu/offload", "/gpu/warm", "/gpu/configure"):
            assert ask(app.port, path, method="POST", host=host, version=version).status == 401

    @pytest.mark.skipif(NGINX is None and os.environ.get("REQUIRE_NGINX") != "1", reason="needs nginx")
    @pytest.mark.parametrize(
        ("settings", "look"),
        [("", 200), ("proxy_set_header Host $host;", 200), ("proxy_set_header Host evil.example;", 403),
         ("proxy_set_header X-Forwarded-For $remote_addr; proxy_http_version 1.1;", 200),
         ("proxy_set_header Host speech.example.org; proxy_http_version 1.1;", 200)],
    )  # fmt: skip
    def test_what_nginx_passes_on_is_not_from_it(
        self, app: RunningApp, tmp_path: Path, settings: str, look: int
    ) -> None:
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"pid nginx.pid; error_log stderr; events {{}} http {{ access_log off; server {{ listen 127.0.0.1:{port}; "
            f"location / {{ proxy_pass http://127.0.0.1:{app.port}; {settings} }} }} }}"
        )
        assert NGINX
        nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", "nginx.conf", "-g", "daemon off;"])
        try:
            assert wait_until(lambda: listens(port))
            assert ask(port, "/gpu/status").status == look
            for headers in ((), ("Host: 127.0.0.1",)):
                assert ask(
                    port, "/gpu/release", *headers, method="POST", host=None if headers else "localhost"
                ).status in (401, 403)
        finally:
            nginx.terminate()
            nginx.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
