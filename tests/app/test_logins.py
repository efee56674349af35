"""Signing in and out where the page asks for a password."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import ForkedApp, RunningApp
from raw_http import Answer, ask

from residency.web.server.rate_limit import RateLimit

FORM = "Content-Type: application/x-www-form-urlencoded"
#: Many failures take no time, and the clock is the test's: SIGALRM moves it by ten seconds.
PRELUDE = """
from residency.web.server import logins
logins._FAILED_AFTER_S = 0
clock = [1000.0]
init = logins.Logins.__init__
logins.Logins.__init__ = lambda self, sign_out: init(self, sign_out, lambda: clock[0])
def on_alarm():
    clock[0] += 10
    return "it is later"
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    arguments = ("--enable-gpu-management", "--simulate-gpu", "48GB", "--auth", "me:secret")
    with ForkedApp(tmp_path_factory.mktemp("app"), *arguments, prelude=PRELUDE) as app:
        yield app


@pytest.fixture
def app(shared: RunningApp) -> RunningApp:
    """Long after the last test."""
    for _ in range(12):
        later(shared)
    return shared


def later(app: RunningApp) -> None:
    app.forget_log()
    app.process.send_signal(signal.SIGALRM)
    app.wait_for_line("it is")


def sign_in(app: RunningApp, password: str, *headers: str, address: str = "192.0.2.1") -> Answer:
    body = f"username=me&password={password}".encode()
    return ask(app.port, "/login", FORM, f"X-Forwarded-For: {address}", *headers, method="POST", body=body)


def cookie(answer: Answer, name: str) -> str:
    found = re.search(rf"{name}[\w-]*=[^;]+", answer.headers["set-cookie"])
    assert found, answer
    return f"Cookie: {found[0]}"


def knows(app: RunningApp, header: str) -> bool:
    return ask(app.port, "/gradio_api/login_check", header).status == 200


class TestGuessing:
    def test_after_some_failures_an_address_has_to_wait(self, app: RunningApp) -> None:
        answers = [sign_in(app, f"guess-{number}") for number in range(8)]
        assert [answer.status for answer in answers] == [400] * 5 + [429] * 3
        assert answers[-1].headers["retry-after"] == "10"
        assert "wait 10 s" in answers[-1].text
        assert "请等待 10 秒" in answers[-1].text
        assert sign_in(app, "secret").status == 429, "or the right password would tell"
        assert sign_in(app, "secret", address="192.0.2.2").status == 200, "others are not concerned"

    def test_it_may_try_again_after_a_while(self, app: RunningApp) -> None:
        for _ in range(6):
            sign_in(app, "guess")
        later(app)
        assert [sign_in(app, "guess").status for _ in range(2)] == [400, 429]
        later(app)
        assert sign_in(app, "secret").status == 200

    def test_those_who_know_the_password_are_not_counted(self, app: RunningApp) -> None:
        assert {sign_in(app, "secret").status for _ in range(60)} == {200}

    def test_many_addresses_do_not_help(self, app: RunningApp) -> None:
        statuses = [sign_in(app, "guess", address=f"192.0.{number}.1").status for number in range(60)]
        assert statuses == [400] * 50 + [429] * 10

    def test_nor_do_many_addresses_of_one_customer(self, app: RunningApp) -> None:
        statuses = [sign_in(app, "guess", address=f"2001:db8::{number}").status for number in range(1, 8)]
        assert statuses == [400] * 5 + [429] * 2

    def test_a_browser_that_was_signed_in_gets_in_however_many_others_guess(self, app: RunningApp) -> None:
        known = cookie(sign_in(app, "secret"), "known-browser")
        for number in range(60):
            sign_in(app, "guess", address=f"192.0.{number}.1")
        for _ in range(6):
            sign_in(app, "guess")
        assert sign_in(app, "secret").status == 429
        assert sign_in(app, "secret", known).status == 200
        assert [sign_in(app, "guess", known).status for _ in range(6)] == [400] * 5 + [429], "it cannot guess either"

    @pytest.mark.parametrize("value", ["", ".", "x", "x.y", "x." + "0" * 64, "\xff.\xff"])
    def test_such_a_browser_cannot_be_made_up(self, app: RunningApp, value: str) -> None:
        made_up = f"Cookie: known-browser-{app.port}={value}"
        assert [sign_in(app, "guess", made_up).status for _ in range(6)] == [400] * 5 + [429]

    def test_only_those_are_remembered_that_have_to_wait(self) -> None:
        pace = RateLimit(at_once=5, every_s=10)
        for second in range(1000):
            pace.take(f"address {second}", second)
        assert len(pace) == 10
        pace.take("address 1", 5000)
        assert len(pace) == 1

    def test_what_is_no_form_is_no_guess(self, app: RunningApp) -> None:
        for path in ("/login", "/login/"):
            assert {ask(app.port, path, method="POST", body=b"{").status for _ in range(8)} == {422}

    def test_both_paths_are_counted_together(self, app: RunningApp) -> None:
        body = b"username=me&password=guess"
        statuses = [ask(app.port, path, FORM, method="POST", body=body).status for path in ["/login", "/login/"] * 3]
        assert statuses == [400] * 5 + [429]

    @pytest.mark.parametrize(
        ("language", "said"), [("zh-CN", "请等待"), ("en", "wait 10 s"), (None, "wait 10 s, then try")]
    )
    def test_how_long_to_wait_is_said_in_the_language_that_is_read(
        self, app: RunningApp, language: str | None, said: str
    ) -> None:
        headers = [f"Accept-Language: {language}"] if language else []
        answers = [sign_in(app, "guess", *headers) for _ in range(6)]
        assert said in answers[-1].text
        assert ("wait" in answers[-1].text) == (language != "zh-CN")


class TestSigningOut:
    @pytest.fixture
    def me(self, app: RunningApp) -> str:
        header = cookie(sign_in(app, "secret"), "access-token-unsecure")
        assert knows(app, header)
        return header

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    @pytest.mark.parametrize("path", ["/logout", "/logout/", "/logout?all_session=true"])
    def test_other_sites_cannot_do_it(self, app: RunningApp, me: str, site: str, path: str) -> None:
        answer = ask(app.port, path, me, f"Sec-Fetch-Site: {site}", "Sec-Fetch-Mode: navigate")
        assert (answer.status, "set-cookie" in answer.headers) == (403, False)
        assert knows(app, me)
        assert ask(app.port, path, me, "Origin: http://evil.example", method="POST").status == 403
        assert knows(app, me)

    @pytest.mark.parametrize(("path", "page"), [("/logout", "./"), ("/logout/", "../")])
    def test_it_leads_to_the_page(self, app: RunningApp, me: str, path: str, page: str) -> None:
        answer = ask(app.port, path, me, "Sec-Fetch-Site: same-origin")
        assert (answer.status, answer.headers["location"]) == (302, page)

    def test_where_the_browser_does_not_say_whence_it_comes_it_is_asked_first(self, app: RunningApp, me: str) -> None:
        for headers in ((), ("Referer: http://evil.example/",), ("Referer: http://[::1",)):
            answer = ask(app.port, "/logout", me, *headers, "Accept-Language: en")
            assert (answer.status, "set-cookie" in answer.headers) == (403, False)
            assert '<form method="post"><button>Sign out</button>' in answer.text
            assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
        assert "退出登录" in ask(app.port, "/logout", me, "Accept-Language: zh").text
        assert knows(app, me)

    @pytest.mark.parametrize(
        ("method", "header"),
        [("GET", "Sec-Fetch-Site: same-origin"), ("GET", "Sec-Fetch-Site: none"), ("GET", "Referer: http://localhost/"),
         ("POST", "Origin: http://localhost"), ("POST", "Sec-Fetch-Site: same-origin"), ("POST", "Accept: */*")],
    )  # fmt: skip
    def test_who_has_signed_in_can_and_others_of_that_name_stay(
        self, app: RunningApp, me: str, method: str, header: str
    ) -> None:
        other = cookie(sign_in(app, "secret"), "access-token-unsecure")
        answer = ask(app.port, "/logout", me, header, method=method)
        assert (answer.status, answer.headers["location"]) == (302, "./")
        assert "Max-Age=0" in answer.headers["set-cookie"]
        assert not knows(app, me)
        assert knows(app, other)

    def test_it_leads_nowhere_else(self, app: RunningApp, me: str) -> None:
        answer = ask(app.port, "/logout", me, "X-Forwarded-Host: evil.example", "Sec-Fetch-Site: same-origin")
        assert answer.headers["location"] == "./"


def test_a_failure_takes_half_a_second(tmp_path: Path) -> None:
    prelude = (
        "from residency.web.server import logins\n"
        "async def sleep(s): print('slept', s, flush=True)\n"
        "logins.anyio.sleep = sleep\n"
    )
    with ForkedApp(tmp_path, "--auth", "me:secret", prelude=prelude) as app:
        assert sign_in(app, "guess").status == 400
        assert app.wait_for_line("slept 0.5")
