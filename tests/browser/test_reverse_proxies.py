"""The page and the API behind real proxies, set up as ``examples/`` has it, and set up with less than that."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp, RunningApp, free_port
from gradio_client import Client, handle_file
from reverse_proxies import NAME, bare_nginx, caddy, nginx

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Page

ARGUMENTS = ("--enable-gpu-management", "--simulate-gpu", "48GB")
ACCOUNT = ("anna", "secret-of-anna")
TOKEN = "token-of-the-test"
PROXIES = {"nginx": nginx, "caddy": caddy}
#: nginx passes on 1 MB at most if it is not told otherwise, and the app reads no more than that of what is no upload.
UPLOAD_BYTES = 3 << 20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app")
    (folder / "gates").mkdir()
    access = ("--auth", ":".join(ACCOUNT), "--control-token", TOKEN)
    with ForkedApp(folder / "tmp", *ARGUMENTS, *access, "--root-path", "/tts/", gates=folder / "gates") as app:
        yield app


@pytest.fixture(params=["nginx keeps", "nginx removes", "caddy keeps", "caddy removes"])
def site(request: pytest.FixtureRequest, app: RunningApp, tmp_path: Path) -> Iterator[str]:
    """The address of the page; the proxy keeps the prefix in what it passes on, or removes it."""
    proxy, way = request.param.split()
    with PROXIES[proxy](app.port, tmp_path / proxy, removes_prefix=way == "removes") as site:
        yield site


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recording") / "long.wav"
    soundfile.write(path, np.sin(np.arange(UPLOAD_BYTES // 2) * 0.03) / 2, 48000)
    assert path.stat().st_size > UPLOAD_BYTES
    return str(path)


# Programs pass all four: here each proxy and each way once.
@pytest.mark.parametrize("site", ["nginx keeps", "caddy removes"], indirect=True)
def test_the_page_works_there(site: str, new_page: Callable[..., Page], recording: str) -> None:
    page = new_page(ignore_https_errors=True)
    # Nothing but what browsers look for by themselves may be asked of the rest of the site.
    strays: list[str] = []
    page.on("request", lambda each: None if each.url.startswith((site, "blob:", "data:")) else strays.append(each.url))
    page.goto(site.rstrip("/"))
    sign_in(page)
    page.locator("#gpu-warm").click()
    expect_state(page, "gpu")
    clone(page, recording)
    page.locator("#gpu-release").click()
    expect_state(page, "released")

    page.goto(f"{site}docs")
    sync_api.expect(page.locator("#swagger-ui .title")).to_contain_text("GPU-managed speech")
    assert not [url for url in strays if not url.endswith(("/manifest.json", "/favicon.ico", "/tts"))]


def test_programs_are_served_there(site: str, recording: str, tmp_path: Path) -> None:
    here = site.replace(NAME, "127.0.0.1")
    assert json.loads(ask(here, "gpu/status").read())["models"]["tts"]["state"] == "released"
    assert json.loads(ask(here, "openapi.json").read())["servers"] == [{"url": "/tts"}]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(here, "gpu/release", {}, token=None)

    with ask(here, "gpu/events") as events:
        assert events.readline() == b"event: status\n"
        ask(here, "gpu/warm", {}).close()
        # Nothing on the way keeps events until there are more.
        assert next(line for line in events if line.startswith(b"event: ") and b"status" not in line)
    ask(here, "gpu/release", {}).close()

    client = Client(here, auth=ACCOUNT, ssl_verify=False, verbose=False, download_files=str(tmp_path))
    spoken = client.predict(handle_file(recording), "said", "to say", api_name="/clone")
    assert soundfile.info(spoken).duration == 1.0
    ask(here, "gpu/release", {}).close()


def test_a_proxy_that_hides_the_address_is_named_with_what_to_set(
    app: RunningApp, new_page: Callable[..., Page], tmp_path: Path
) -> None:
    with bare_nginx(app.port, tmp_path / "nginx", port := free_port()) as site:
        page = new_page(locale="en-US")
        page.goto(f"{site}tts/")
        line = page.locator("#wrong-address")
        sync_api.expect(line).to_contain_text("proxy_set_header Host $http_host")
        sync_api.expect(line).to_contain_text(f"--root-path http://{NAME}:{port}/tts;")
        # Neither scripts nor styles were refused.
        sync_api.expect(page.get_by_label("username")).to_be_visible()
        page.goto(f"{site}tts/docs")
        sync_api.expect(page.locator("#swagger-ui .title")).to_contain_text("GPU-managed speech")

        chinese = new_page(locale="zh-CN")
        chinese.goto(f"{site}tts/")
        sync_api.expect(chinese.locator("#wrong-address")).to_contain_text("请让反向代理传递地址")
        # Forms and programs are refused, as pages of other sites are, and read the same.
        chinese.set_content(f"<form action='{site}login' method=post><button>send</button></form>")
        chinese.get_by_role("button").click()
        sync_api.expect(chinese.get_by_role("alert")).to_contain_text("proxy_set_header Host $http_host")


def test_a_site_under_which_the_app_does_not_know_itself(new_page: Callable[..., Page], tmp_path: Path) -> None:
    (tmp_path / "gates").mkdir()
    with (
        ForkedApp(tmp_path / "tmp", *ARGUMENTS, "--allowed-host", NAME, gates=tmp_path / "gates") as app,
        nginx(app.port, tmp_path / "nginx", removes_prefix=True) as site,
    ):
        page = new_page(ignore_https_errors=True)
        page.goto(site)
        sync_api.expect(page.locator("#wrong-address")).to_contain_text(f"--root-path {site.rstrip('/')};")


def test_the_whole_address_does_without_what_the_proxy_hides(
    new_page: Callable[..., Page], recording: str, tmp_path: Path
) -> None:
    (tmp_path / "gates").mkdir()
    port = free_port()
    address = f"http://{NAME}:{port}/tts"
    access = ("--auth", ":".join(ACCOUNT))
    with (
        ForkedApp(tmp_path / "tmp", *ARGUMENTS, *access, "--root-path", address, gates=tmp_path / "gates") as app,
        bare_nginx(app.port, tmp_path / "nginx", port),
    ):
        page = new_page(locale="en-US")
        page.goto(f"{address}/")
        sign_in(page)
        clone(page, recording)
        assert page.locator("#wrong-address").count() == 0
        # Browsers give a page of another machine the microphone over https only.
        sync_api.expect(page.locator("#no-microphone")).to_contain_text("--ssl-certfile")
        # Through such a proxy, everybody seems to be on this machine.
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"http://127.0.0.1:{port}/tts/", "gpu/release", {}, token=None)


def ask(site: str, path: str, body: dict[str, Any] | None = None, token: str | None = TOKEN) -> Any:
    """The open response to a request of a program."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(site + path, None if body is None else json.dumps(body).encode(), headers)
    unchecked = ssl._create_unverified_context()
    return urllib.request.urlopen(request, timeout=60, context=unchecked)


def sign_in(page: Page) -> None:
    page.get_by_label("username").fill(ACCOUNT[0])
    page.get_by_label("password").fill(ACCOUNT[1])
    page.get_by_role("button", name="Login").click()
    sync_api.expect(page.locator("#gpu-status [data-model=tts]")).to_be_visible()


def clone(page: Page, recording: str) -> None:
    """Upload the recording, and fetch what was spoken as the link beside it does."""
    page.get_by_label("Prompt Text").fill("said")
    page.locator("#prompt-audio input[type=file]").set_input_files(recording)
    sync_api.expect(page.locator("#prompt-audio").get_by_label("Clear")).to_be_visible()
    page.get_by_label("Target Text").fill("to say")
    page.get_by_role("button", name="CLONE", exact=True).click()
    link = page.locator("#history .message-buttons-left a[download], #history .bot-row a[download]").first
    sync_api.expect(link).to_be_attached()
    assert link.evaluate("async link => (await (await fetch(link.href)).text()).slice(0, 4)") == "RIFF"


def expect_state(page: Page, state: str) -> None:
    sync_api.expect(page.locator("#gpu-status [data-model=tts]")).to_have_attribute("data-state", state)
