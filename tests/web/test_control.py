from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pytest
from fakes import Gate, Worker, Workshop
from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gpu_manager import DeviceLost, DeviceOutOfMemory, GPUResourceManager, State
from residency.errors import InvalidInput, WorkerEnded
from residency.status_types import DeviceStatus, MemorySizes, ModelStatus, Status, UsageHistory
from residency.web.api.control import build, route_to
from residency.web.server.layers import beneath
from residency.web.server.permissions import Permissions
from residency.web.shared.language import en
from residency.web.ui.gpu_panel import GpuPanel

HERE, ELSEWHERE = ("127.0.0.1", 4000), ("192.0.2.7", 4000)


@lru_cache(1)
def built(manager: GPUResourceManager, **keywords: Any) -> FastAPI:
    """Takes a tenth of a second, and some tests have several clients."""
    return build(manager, Permissions(**keywords))


def client(manager: GPUResourceManager, address: tuple[str, int] = HERE, **keywords: Any) -> TestClient:
    return TestClient(
        built(manager, **keywords), "http://127.0.0.1:7860", client=address, raise_server_exceptions=False
    )


@pytest.fixture
def used(manager: GPUResourceManager) -> GPUResourceManager:
    with manager.lease("tts"):
        pass
    return manager


def test_healthy_and_ready(manager: GPUResourceManager) -> None:
    for path in ("/healthz", "/readyz"):
        answer = client(manager).get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert client(manager).head(path).status_code == 200


def test_it_is_ready_once_the_page_beside_it_answers(manager: GPUResourceManager) -> None:
    serves = False
    web = TestClient(build(manager, Permissions(), page_serves=lambda: serves), "http://127.0.0.1:7860", client=HERE)
    refused = web.get("/readyz")
    assert refused.status_code == 503
    assert "starting" in refused.json()["error"]
    assert web.get("/healthz").status_code == 200
    serves = True
    assert web.get("/readyz").status_code == 200


@pytest.mark.parametrize("prefix", ["", "/tts"])
def test_its_paths_are_those_of_the_page_with_and_without_a_root_path(manager: GPUResourceManager, prefix: str) -> None:
    """Starlette looks for static files under the root path, which `beneath` has removed."""
    layers = [Middleware(beneath("/tts")), Middleware(route_to(build(manager, Permissions())))]
    page = Route("/{rest:path}", lambda request: PlainTextResponse("the page"))
    web = TestClient(Starlette(routes=[page], middleware=layers), "http://127.0.0.1:7860", client=HERE)
    for path in ("/healthz", "/gpu/status", "/metrics", "/docs", "/docs/static/swagger-ui.css"):
        answer = web.get(prefix + path)
        assert (answer.status_code, answer.text == "the page") == (200, False), path
    for path in ("/", "/gpu", "/docsx", "/config"):
        assert web.get(prefix + path).text == "the page"


def test_status_is_the_managers(used: GPUResourceManager) -> None:
    shown, told = client(used).get("/gpu/status").json(), used.status()
    assert (shown["device"], shown["models"]) == (told["device"], told["models"])
    assert shown["enabled"] is True


@pytest.mark.parametrize("body", ["", "{}", '{"model": null}', '{"model": "tts"}'])
def test_release_answers_the_status_once_done(used: GPUResourceManager, body: str) -> None:
    answer = client(used).post("/gpu/release", content=body)
    assert answer.status_code == 200
    assert answer.json()["models"]["tts"]["state"] == "released"


def test_programs_need_not_name_the_type_of_the_body(used: GPUResourceManager) -> None:
    """``curl -d`` sends the type of a form; FastAPI parses only bodies that are called JSON."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client(used).post("/gpu/release", content='{"model": "tts"}', headers=form)
    assert answer.status_code == 200
    assert answer.json()["models"]["tts"]["state"] == "released"


def test_what_is_asked_during_a_request_is_accepted_and_follows(manager: GPUResourceManager) -> None:
    with manager.lease("tts"):
        answer = client(manager).post("/gpu/release", json={"model": "tts"})
        assert answer.status_code == 202
        assert answer.json()["models"]["tts"] | {"state": "gpu", "pending": "release"} == answer.json()["models"]["tts"]
    assert manager.status()["models"]["tts"]["state"] == "released"


def test_warming_has_begun_or_is_done(manager: GPUResourceManager, workshop: Workshop) -> None:
    workshop.gate = gate = Gate()
    assert client(manager).post("/gpu/warm", json={}).status_code == 202
    gate.open()
    with manager.lease("tts"):
        assert client(manager).post("/gpu/warm", json={}).status_code == 200


def test_status_answers_while_a_release_moves(used: GPUResourceManager, workshop: Workshop) -> None:
    workshop.resident.gates["release"] = gate = Gate()
    calls = client(used)
    release = Worker(lambda: calls.post("/gpu/release").status_code)
    gate.wait_for_arrival()
    assert client(used).get("/gpu/status").json()["models"]["tts"]["state"] == "moving"
    gate.open()
    assert release.result() == 200


def test_an_unknown_model_is_404_and_names_the_known(manager: GPUResourceManager) -> None:
    answer = client(manager).post("/gpu/offload", json={"model": "asr"})
    assert answer.status_code == 404
    assert answer.json()["known"] == ["tts"]
    assert "asr" in answer.json()["error"]
    assert client(manager).post("/gpu/offload", content='{"model": "\\ud800"}').status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        "tts",
        "[]",
        '{"model": 1}',
        "\xff",
        '{"modle": "tts"}',
        "[" * 5000,
        "9" * 9000,
        " " * 20000,
    ],
)
def test_a_garbled_body_is_422_and_changes_nothing(used: GPUResourceManager, body: str) -> None:
    answer = client(used).post("/gpu/release", content=body)
    assert answer.status_code == 422
    assert '{"model": "tts"}' in answer.json()["error"]
    assert used.status()["models"]["tts"]["state"] == "cpu"


def test_how_long_it_stays_can_be_changed(used: GPUResourceManager) -> None:
    answer = client(used).post("/gpu/configure", json={"model": "tts", "keep_warm": "30s", "idle_timeout": -1})
    assert answer.status_code == 200
    shown = answer.json()["models"]["tts"]
    assert (shown["keep_warm_s"], shown["idle_timeout_s"]) == (30, -1)
    assert client(used).post("/gpu/configure", json={"keep_warm": "auto"}).json()["models"]["tts"]["policy"] == "auto"
    for wrong in ({"keep_warm": "soon"}, {"idle_timeout": []}, {"idle_timeout": -2}):
        assert client(used).post("/gpu/configure", json=wrong).status_code == 422
    for number in ("1e400", "Infinity", "NaN"):
        assert client(used).post("/gpu/configure", content=f'{{"keep_warm": {number}}}').status_code == 422
    assert used.status()["models"]["tts"]["idle_timeout_s"] == -1


def test_history_is_the_managers(used: GPUResourceManager) -> None:
    shown = client(used).get("/gpu/history").json()
    assert [move["to"] for move in shown["models"]["tts"]["moves"]] == ["gpu", "cpu"]
    assert shown["models"]["tts"]["totals"]["requests"] == {"ok": 1}


def test_what_is_not_there_is_said_and_leads_to_the_description(manager: GPUResourceManager) -> None:
    for path, code in (("/gpu/nothing", 404), ("/gpu/release", 405)):
        answer = client(manager).get(path)
        assert answer.status_code == code
        assert "/docs" in answer.json()["error"]


def test_the_description_tells_all_calls_and_brings_its_own_files(manager: GPUResourceManager) -> None:
    calls = client(manager)
    described = calls.get("/openapi.json").json()["paths"]
    assert {path for path in described if path.startswith("/gpu/")} == {
        f"/gpu/{call}"
        for call in ("status", "history", "events", "offload", "release", "warm", "configure", "neighbors/ask")
    }
    needed = {path for path, call in described.items() if call.get("post", {}).get("requestBody", {}).get("required")}
    assert {path for path in needed if path.startswith("/gpu/")} == {"/gpu/neighbors/ask"}
    page = calls.get("/docs").text
    for file in re.findall(r"""(?:href|src)="([^"]+)""", page):
        assert file.startswith("/docs/"), "the page asks the internet for something"
        assert calls.get(file).status_code == 200


def test_the_page_is_told_what_it_does_not_know(used: GPUResourceManager) -> None:
    panel = GpuPanel(used, Permissions())
    calls = TestClient(build(used, Permissions(), panel.news), "http://127.0.0.1:7860")
    for language, word in (("zh-CN,zh", "在内存中"), ("en", "In main memory")):
        answer = calls.get("/gpu/panel", headers={"Accept-Language": language})
        assert word in answer.json()["pieces"]["model-tts"]
        assert answer.json()["moving"] is False
    version = answer.json()["version"]
    assert calls.get(f"/gpu/panel?known={version}").status_code == 204
    assert calls.get(f"/gpu/panel?known={version - 1}").status_code == 200
    used.release()
    assert calls.get(f"/gpu/panel?known={version}").json()["version"] != version
    refused = calls.get("/gpu/panel?known=old")
    assert (refused.status_code, list(refused.json())) == (422, ["error"])
    assert "known" in refused.json()["error"]
    assert client(used).get("/gpu/panel").status_code == 404


def test_the_page_is_told_what_came_of_a_press_once_it_is_settled(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    panel = GpuPanel(manager, Permissions())

    def outcome() -> Any:
        news = panel.news(en)
        assert news
        return news["outcomes"]["tts"]

    assert "tts has been released." in outcome()
    workshop.gate = gate = Gate()
    manager.warm("tts")
    gate.wait_for_arrival()
    assert outcome() is None
    gate.open()
    with manager.lease("tts"):
        assert "tts is on the simulated GPU now." in outcome()
        manager.release("tts")
        assert outcome() is None
    workshop.gate, workshop.fail_next = None, InvalidInput("No <weights>: give a folder", "没有权重")
    manager.warm("tts")
    assert manager.wait_for("tts", State.RELEASED)
    assert "tts: No &lt;weights&gt;: give a folder" in outcome()


def test_answers_are_as_described(used: GPUResourceManager) -> None:
    calls = client(used)
    status, history = TypeAdapter(Status), TypeAdapter(UsageHistory)
    status.validate_python(calls.get("/gpu/status").json(), strict=True)
    history.validate_python(calls.get("/gpu/history").json(), strict=True)
    with used.lease("tts"):
        assert used.status()["models"]["tts"]["holder"]
        status.validate_python(used.status(), strict=True)
        history.validate_python(used.history(), strict=True)
        status.validate_python(calls.post("/gpu/release").json(), strict=True)
    # No field is missing in the types, and none is left over.
    assert used.status().keys() == Status.__annotations__.keys()
    for name, fields in (("tts", ModelStatus), ("device", DeviceStatus), ("host", MemorySizes)):
        shown: Any = used.status()["models"]["tts"] if name == "tts" else used.status()[name]  # type: ignore[literal-required]
        assert shown.keys() == fields.__required_keys__


def test_each_field_of_an_answer_is_described(manager: GPUResourceManager) -> None:
    schemas = client(manager).get("/openapi.json").json()["components"]["schemas"]
    assert {"Status", "ModelStatus", "UsageHistory", "Event", "Refusal"} <= schemas.keys()
    without = [
        f"{kind}.{name}"
        for kind, schema in schemas.items()
        for name, field in schema["properties"].items()
        if not field.get("description")
    ]
    assert without == []


def test_answers_are_described_as_they_are(manager: GPUResourceManager) -> None:
    description = client(manager).get("/openapi.json").json()
    assert "Event" in description["components"]["schemas"]
    kinds = {
        (path, int(code)): list(answer["content"])
        for path, calls in description["paths"].items()
        for call in calls.values()
        for code, answer in call["responses"].items()
    }
    assert {path for path, code in kinds if code == 202} == {"/gpu/offload", "/gpu/release", "/gpu/warm"}
    assert {path for path, code in kinds if code == 413} == {path for path, code in kinds if code == 422}
    others = {("/gpu/events", 200): "text/event-stream", ("/metrics", 200): "text/plain"}
    for (path, code), named in kinds.items():
        early = "text/plain" if code in (403, 413) else "application/json"
        assert named == [others.get((path, code), early)], (path, code)
        assert (path, 403) in kinds


def test_an_error_that_nobody_expects_is_500_with_a_sentence(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "status", lambda: 1 // 0)
    answer = client(manager).get("/gpu/status")
    assert answer.status_code == 500
    assert "by zero" in answer.json()["error"]


def test_a_failed_move_is_500_with_its_sentence(used: GPUResourceManager, workshop: Workshop) -> None:
    workshop.resident.fail_next["release"] = DeviceOutOfMemory(10, 5, "card")
    answer = client(used).post("/gpu/release")
    assert answer.status_code == 500
    assert "card" in answer.json()["error"]


def test_after_close_it_is_alive_but_not_ready(manager: GPUResourceManager) -> None:
    manager.close()
    assert client(manager).get("/healthz").status_code == 200
    assert client(manager).get("/readyz").status_code == 503
    assert client(manager).post("/gpu/release", json={"model": "tts"}).status_code == 503


def test_with_a_gpu_that_has_failed_for_good_it_is_alive_but_not_ready(
    manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.fail_next = DeviceLost("an illegal memory access was encountered")
    with pytest.raises(DeviceLost), manager.lease("tts"):
        pass
    assert client(manager).get("/healthz").status_code == 200
    answer = client(manager).get("/readyz")
    assert (answer.status_code, "Restart the app" in answer.json()["error"]) == (503, True)


def test_after_the_end_of_a_worker_process_one_may_try_again(
    manager: GPUResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(name: str | None) -> bool:
        raise WorkerEnded("tts")

    monkeypatch.setattr(manager, "release", ended)
    answer = client(manager).post("/gpu/release")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


class TestWhoMayChange:
    """Looking is free; changing takes being on this machine, or the token."""

    def test_others_need_the_token(self, manager: GPUResourceManager) -> None:
        calls = client(manager, ELSEWHERE, token="secret")
        assert calls.post("/gpu/release").status_code == 401
        assert calls.post("/gpu/release", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert calls.post("/gpu/release", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert calls.post("/gpu/release", headers={"X-Control-Token": "secret"}).status_code == 200
        assert calls.get("/gpu/status").status_code == 200

    def test_guesses_of_the_token_are_limited_per_address(self, manager: GPUResourceManager) -> None:
        calls = client(manager, ELSEWHERE, token="secret")

        def status(token: str, call: str = "release") -> int:
            answer = calls.post(f"/gpu/{call}", headers={"Authorization": f"Bearer {token}"})
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 10
                assert " / " in answer.json()["error"]
            return int(answer.status_code)

        assert [status(f"guess {number}") for number in range(6)] == [401] * 5 + [429]
        assert status("secret") == 429, "else one could go on guessing"
        assert status("guess", "warm") == 429
        assert calls.post("/sleep", headers={"X-Control-Token": "guess"}).status_code == 429
        assert calls.post("/gpu/release").status_code == 401, "without a token"
        assert calls.get("/gpu/status", headers={"Authorization": "Bearer guess"}).status_code == 200

    def test_a_token_that_was_used_before_is_not_locked_out(self, manager: GPUResourceManager) -> None:
        calls = client(manager, ELSEWHERE, token="secret")
        secret = {"Authorization": "Bearer secret"}
        assert calls.post("/gpu/release", headers=secret).status_code == 200
        for _ in range(7):
            calls.post("/gpu/release", headers={"X-Control-Token": "guess"})
        assert calls.post("/gpu/release", headers=secret).status_code == 200

    def test_without_a_token_nothing_is_guessed(self, manager: GPUResourceManager) -> None:
        calls = client(manager, ELSEWHERE)
        codes = {calls.post("/gpu/release", headers={"Authorization": "Bearer x"}).status_code for _ in range(7)}
        assert codes == {401}

    def test_this_machine_is_not_counted(self, manager: GPUResourceManager) -> None:
        calls = client(manager, token="secret")
        codes = {calls.post("/gpu/release", headers={"Authorization": "Bearer x"}).status_code for _ in range(7)}
        assert codes == {200}

    def test_without_a_token_others_cannot(self, manager: GPUResourceManager) -> None:
        calls = client(manager, ELSEWHERE)
        for headers in ({}, {"Authorization": "Bearer "}, {"X-Control-Token": "None"}):
            assert calls.post("/gpu/release", headers=headers).status_code == 401
        assert "--control-token" in calls.post("/gpu/release").json()["error"]

    def test_the_body_of_others_is_not_read(self, manager: GPUResourceManager) -> None:
        """FastAPI reads it before it calls anything that could check the permission."""
        for body in (b"{", b'{"model": 5}'):
            assert client(manager, ELSEWHERE).post("/gpu/release", content=body).status_code == 401
            assert client(manager).post("/gpu/release", content=body).status_code == 422

    def test_this_machine_needs_none(self, manager: GPUResourceManager) -> None:
        assert client(manager, token="secret").post("/gpu/release").status_code == 200
        for address in ("::1", "::ffff:127.0.0.1"):  # the latter where one socket listens for IPv4 and IPv6
            assert client(manager, (address, 4000), token="secret").post("/gpu/release").status_code == 200
        elsewhere = client(manager, ("::ffff:192.0.2.7", 4000), token="secret")
        assert elsewhere.post("/gpu/release").status_code == 401

    @pytest.mark.parametrize("address", [HERE, ("::1", 4000)])
    @pytest.mark.parametrize(
        "header", ["X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "Forwarded", "Via", "x-forwarded-host"]
    )
    def test_what_a_proxy_on_this_machine_passes_on_is_not_from_it(
        self, manager: GPUResourceManager, header: str, address: tuple[str, int]
    ) -> None:
        calls = client(manager, address, token="secret")
        assert calls.post("/gpu/release", headers={header: "127.0.0.1"}).status_code == 401
        passed_on = {header: "127.0.0.1", "Authorization": "Bearer secret"}
        assert calls.post("/gpu/release", headers=passed_on).status_code == 200

    def test_behind_a_tunnel_everybody_does(self, manager: GPUResourceManager) -> None:
        calls = client(manager, token="secret", trust_local=False)
        assert calls.post("/gpu/release").status_code == 401
        assert calls.post("/gpu/release", headers={"Authorization": "Bearer secret"}).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"Origin": "http://127.0.0.1:7860"}, 200),
            ({"Origin": "http://evil.example"}, 401),
            ({"Origin": "http://127.0.0.1:9999"}, 401),
            ({"Origin": "null"}, 401),
            ({"Origin": "http://[::1"}, 401),
            ({"Sec-Fetch-Site": "cross-site"}, 401),
            ({"Sec-Fetch-Site": "same-site"}, 401),
            # A proxy on this machine that changes the host and says nothing, and a page that was served through it.
            ({"Sec-Fetch-Site": "same-origin", "Origin": "https://tts.example"}, 401),
            ({"Host": "[::1"}, 401),
            ({"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}, 401),
            ({"Host": "localhost:7860", "Origin": "http://localhost:7860"}, 200),
        ],
    )
    def test_a_page_of_another_site_cannot(
        self, manager: GPUResourceManager, headers: dict[str, str], code: int
    ) -> None:
        assert client(manager).post("/gpu/release", headers=headers).status_code == code


class TestWhoMayLookWhereThePageAsksForAPassword:
    LOOKING = ("/gpu/status", "/gpu/history", "/gpu/panel", "/metrics")

    def client(self, manager: GPUResourceManager, address: tuple[str, int]) -> TestClient:
        permissions = Permissions("secret")
        panel = GpuPanel(manager, permissions)
        app = build(manager, permissions, panel.news, lambda request: request.cookies.get("name"))
        return TestClient(app, "http://127.0.0.1:7860", client=address)

    def test_others_may_not(self, manager: GPUResourceManager) -> None:
        calls = self.client(manager, ELSEWHERE)
        for path in (*self.LOOKING, "/gpu/events"):
            answer = calls.get(path)
            assert (answer.status_code, "--auth" in answer.json()["error"]) == (401, True)
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert calls.get(path).status_code == 200

    def test_who_has_signed_in_or_is_here_or_has_the_token_may(self, manager: GPUResourceManager) -> None:
        here, elsewhere = self.client(manager, HERE), self.client(manager, ELSEWHERE)
        for path in self.LOOKING:
            assert here.get(path).status_code == 200
            assert elsewhere.get(path, headers={"Cookie": "name=me"}).status_code == 200
            assert elsewhere.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({}, 401),
            ({"Cookie": "name=me"}, 200),
            ({"Cookie": "name=me", "Origin": "http://127.0.0.1:7860"}, 200),
            ({"Cookie": "name=me", "Origin": "http://evil.example"}, 401),
            ({"Cookie": "name=me", "Origin": "null"}, 401),
            ({"Cookie": "name=me", "Sec-Fetch-Site": "cross-site"}, 401),
            ({"Cookie": "name=me", "Sec-Fetch-Site": "same-site"}, 401),
        ],
    )
    def test_who_has_signed_in_may_change_things_but_no_other_site_in_their_browser(
        self, manager: GPUResourceManager, headers: dict[str, str], code: int
    ) -> None:
        assert self.client(manager, ELSEWHERE).post("/gpu/release", headers=headers).status_code == code


class TestPanelsTimes:
    """What is written into the panel's boxes."""

    @pytest.mark.parametrize(
        ("boxes", "times"),
        [((" 90s ", ""), (90, 600)), ((None, "1h"), (0, 3600)), (("-1", "-1"), (-1, -1))],
    )
    def test_what_is_empty_stays(
        self, manager: GPUResourceManager, boxes: tuple[str | None, str | None], times: tuple[float, float]
    ) -> None:
        manager.configure("tts", keep_warm=0, idle_timeout=600)
        assert GpuPanel(manager, Permissions()).configure("tts", *boxes).endswith("Changed; it applies from now on.")
        model = manager.status()["models"]["tts"]
        assert (model["keep_warm_s"], model["idle_timeout_s"]) == times

    @pytest.mark.parametrize("boxes", [("", None), (None, " "), ("99999999999999999999999h", "")])
    def test_nothing_is_changed_by_nothing_and_by_nonsense(
        self, manager: GPUResourceManager, boxes: tuple[str | None, str | None]
    ) -> None:
        before = manager.status()["models"]["tts"]
        assert "Changed" not in GpuPanel(manager, Permissions()).configure("tts", *boxes)
        assert manager.status()["models"]["tts"] == before

    def test_what_is_wrong_is_said(self, manager: GPUResourceManager) -> None:
        assert "'soon' is not a valid duration" in GpuPanel(manager, Permissions()).configure(None, "soon", "")
        assert "asr" in GpuPanel(manager, Permissions()).configure("asr", "5", "")
