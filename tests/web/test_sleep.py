"""Routers drive this app as they drive vLLM's server, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from fakes import Client, Gate, Worker, Workshop
from local_server import Served

from gpu_manager import CpuDevice, DeviceOutOfMemory, GPUResourceManager, State
from residency.neighbors import neighbor
from residency.web.api.control import build
from residency.web.server.permissions import Permissions


@pytest.fixture
def router(manager: GPUResourceManager) -> Iterator[httpx.Client]:
    manager.configure(keep_warm=-1)
    with serving(manager) as client:
        yield client


class serving:
    """A client of the API of a manager, in a real server."""

    def __init__(self, manager: GPUResourceManager, **permissions: object) -> None:
        self._served = Served(build(manager, Permissions(**permissions)))  # type: ignore[arg-type]
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._served.port}", timeout=60)

    def __enter__(self) -> httpx.Client:
        return self._client

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()
        self._served.close()


def sleeps(router: httpx.Client) -> bool:
    answer = router.get("/is_sleeping")
    assert (answer.status_code, list(answer.json())) == (200, ["is_sleeping"])
    return bool(answer.json()["is_sleeping"])


def will_leave(manager: GPUResourceManager) -> None:
    """Waits until an offload follows the running request."""
    wishes = manager._managed_models["tts"].wishes
    assert any(wishes.pending_move is State.HOST or manager.wait_for("tts", State.HOST, 0.01) for _ in range(3000))


def use(manager: GPUResourceManager, name: str = "tts") -> None:
    with manager.lease(name):
        pass


@pytest.mark.parametrize(
    ("query", "level", "state"),
    [("", 1, "cpu"), ("?level=1&mode=wait", 1, "cpu"), ("?level=2&tags=weights&tags=kv_cache", 2, "released")],
)
def test_it_sleeps_and_wakes_up(
    router: httpx.Client, manager: GPUResourceManager, query: str, level: int, state: str
) -> None:
    use(manager)
    assert not sleeps(router)
    answer = router.post(f"/sleep{query}")
    assert (answer.status_code, answer.json()) == (200, {"status": "sleeping", "level": level})
    assert sleeps(router)
    assert manager.status()["models"]["tts"]["state"] == state
    answer = router.post("/wake_up?tags=weights")
    assert (answer.status_code, answer.json()) == (200, {"status": "awake", "tags": ["weights"]})
    assert not sleeps(router)
    assert router.post("/wake_up").json() == {"status": "awake", "tags": None}


def test_it_sleeps_before_the_first_request(router: httpx.Client) -> None:
    assert sleeps(router)
    assert router.post("/sleep").status_code == 200


def test_its_own_client_for_vllm_drives_it(router: httpx.Client, manager: GPUResourceManager) -> None:
    use(manager)
    vllm = neighbor("vllm", str(router.base_url))
    vllm.ask()
    assert sleeps(router)
    vllm.give_back()
    assert not sleeps(router)


def test_a_running_request_ends_first(router: httpx.Client, manager: GPUResourceManager) -> None:
    running = Client(manager).comes_in()
    assert not sleeps(router)
    asked = Worker(router.post, "/sleep")
    will_leave(manager)
    assert asked.is_alive()
    running.leaves()
    assert asked.result().status_code == 200
    assert sleeps(router)


def test_a_request_that_waits_brings_its_model_back(router: httpx.Client, manager: GPUResourceManager) -> None:
    running = Client(manager).comes_in()
    waits = Client(manager).queues()
    asked = Worker(router.post, "/sleep")
    will_leave(manager)
    running.leaves()
    waits.comes_in()
    assert asked.result().status_code == 200
    assert not sleeps(router)
    waits.leaves()


def test_a_model_on_its_way_is_awake_and_leaves_after_its_arrival(
    router: httpx.Client, manager: GPUResourceManager, workshop: Workshop
) -> None:
    workshop.gate = gate = Gate()
    router.post("/wake_up")
    gate.wait_for_arrival()
    assert not sleeps(router)
    asked = Worker(router.post, "/sleep?level=2")
    gate.open()
    assert asked.result().status_code == 200
    assert sleeps(router)


def test_a_model_that_leaves_is_there_until_it_has_left(
    router: httpx.Client, manager: GPUResourceManager, workshop: Workshop
) -> None:
    use(manager)
    workshop.resident.gates["offload"] = gate = Gate()
    asked = Worker(router.post, "/sleep")
    gate.wait_for_arrival()
    with httpx.Client(base_url=router.base_url) as other:
        assert not sleeps(other)
    gate.open()
    assert asked.result().status_code == 200


def test_a_model_that_cannot_leave_is_an_error(
    router: httpx.Client, manager: GPUResourceManager, workshop: Workshop
) -> None:
    use(manager)
    workshop.resident.fail_next["offload"] = DeviceOutOfMemory(10, 5, "card")
    answer = router.post("/sleep")
    assert (answer.status_code, "card" in answer.json()["error"]) == (500, True)


@pytest.mark.parametrize(
    "error", [DeviceOutOfMemory(10, 5, "card"), RuntimeError("CUDA error")], ids=["known", "other"]
)
def test_the_call_after_a_failed_one_is_answered(
    error: Exception, router: httpx.Client, manager: GPUResourceManager, workshop: Workshop
) -> None:
    """Clients send it over the same connection unless they are told that it ends."""
    for _ in range(20):
        use(manager)
        workshop.resident.fail_next["offload"] = error
        assert router.post("/sleep").status_code == 500
        assert router.post("/sleep").status_code == 200
        assert sleeps(router)


def test_a_model_that_cannot_leave_after_its_request_is_an_error(
    router: httpx.Client, manager: GPUResourceManager, workshop: Workshop
) -> None:
    running = Client(manager).comes_in()
    workshop.resident.fail_next["offload"] = DeviceOutOfMemory(10, 5, "card")
    asked = Worker(router.post, "/sleep")
    will_leave(manager)
    running.leaves()
    assert (asked.result().status_code, "card" in asked.result().json()["error"]) == (500, True)


@pytest.mark.parametrize("query", ["level=0", "level=3", "level=deep", "mode=abort", "mode=keep"])
def test_what_it_cannot_do_is_400_with_what_it_can(
    router: httpx.Client, manager: GPUResourceManager, query: str
) -> None:
    use(manager)
    answer = router.post(f"/sleep?{query}")
    name, _, value = query.partition("=")
    assert answer.status_code == 400
    assert f"{name} is " in answer.json()["error"]
    assert repr(value) in answer.json()["error"]
    assert not sleeps(router)


def test_the_close_of_the_app_ends_a_wait(router: httpx.Client, manager: GPUResourceManager) -> None:
    running = Client(manager).comes_in()
    asked = Worker(router.post, "/sleep")
    will_leave(manager)
    running.leaves()
    manager.close()
    assert asked.result().status_code == 200
    assert router.post("/sleep").status_code == 503
    assert router.post("/wake_up").status_code == 503


def test_changes_need_the_same_permission_as_an_offload(manager: GPUResourceManager) -> None:
    with serving(manager, token="secret", trust_local=False) as router:
        for path in ("/sleep", "/wake_up", "/gpu/offload"):
            assert router.post(path).status_code == 401
            assert router.post(path, headers={"Authorization": "Bearer secret"}).status_code in (200, 202)
        assert sleeps(router)


def test_without_a_gpu_it_sleeps_when_released() -> None:
    with GPUResourceManager(CpuDevice(), keep_warm=-1) as manager, serving(manager) as router:
        manager.register("tts", object)
        assert sleeps(router)
        use(manager)
        assert router.post("/sleep").status_code == 200
        assert not sleeps(router)
        assert router.post("/sleep?level=2").status_code == 200
        assert sleeps(router)
