"""Each kind against answers of the real server's form, as its source has them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from recorded_server import Conversation, Reply, recorded

from residency.errors import NeighborRefused, NeighborUnreachable
from residency.neighbors import Held, neighbor

OLLAMA = {
    "models": [
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "size": 3500000000, "size_vram": 3400000000,
         "digest": "a80c4f17acd5", "details": {"format": "gguf"}, "expires_at": "2026-01-01T12:00:00Z",
         "context_length": 4096},
        {"name": "all-minilm:latest", "model": "all-minilm:latest", "size": 50000000, "size_vram": 0,
         "digest": "1b226e2802db", "details": {"format": "gguf"}, "expires_at": "2026-01-01T12:00:00Z",
         "context_length": 256},
    ]
}  # fmt: skip


def test_ollama_is_asked_for_each_model_on_the_card() -> None:
    unloaded = Reply({"model": "llama3.2:latest", "response": "", "done": True, "done_reason": "unload"})
    with recorded({"GET /api/ps": Reply(OLLAMA), "POST /api/generate": unloaded}) as server:
        ollama = neighbor("ollama", server.url)
        assert ollama.held() == Held(False, 3_400_000_000, ("llama3.2:latest",))
        ollama.ask()
        assert server.calls[2:] == ['POST /api/generate {"model": "llama3.2:latest", "keep_alive": 0}']
        ollama.give_back()
        assert len(server.calls) == 3
        assert not ollama.gives_back


@pytest.mark.parametrize("models", [[], None])
def test_ollama_without_models_gives_up_nothing(models: object) -> None:
    with recorded({"GET /api/ps": Reply({"models": models})}) as server:
        assert neighbor("ollama", server.url).held() == Held(False, 0)
        neighbor("ollama", server.url).ask()
        assert server.calls == ["GET /api/ps"] * 2


def comfyui(remaining: int, kind: str = "cuda") -> Conversation:
    device = {"name": "cuda:0 NVIDIA", "type": kind, "index": 0, "vram_total": 25 << 30, "vram_free": 5 << 30,
              "torch_vram_total": 18 << 30, "torch_vram_free": 2 << 30}  # fmt: skip
    return {
        "GET /prompt": Reply({"exec_info": {"queue_remaining": remaining}}),
        "GET /system_stats": Reply({"system": {"os": "posix", "comfyui_version": "0.10.0"}, "devices": [device]}),
        "POST /free": Reply(),
    }


def test_comfyui_unloads_models_and_keeps_results() -> None:
    with recorded(comfyui(0)) as server:
        comfy = neighbor("comfyui", server.url)
        assert comfy.held() == Held(False, 18 << 30)
        comfy.ask()
        assert server.calls == ["GET /prompt", "GET /system_stats", 'POST /free {"unload_models": true}']


def test_comfyui_is_in_use_while_workflows_run_or_wait_and_holds_nothing_on_a_cpu() -> None:
    with recorded(comfyui(2, kind="cpu")) as server:
        assert neighbor("comfyui", server.url).held() == Held(True, 0)


def vllm(asleep: list[bool], running: float = 0.0, waiting: float = 0.0) -> Conversation:
    labels = '{engine="%d",model_name="tiny"}'
    metrics = "".join(
        f"# HELP vllm:{name} Number of requests.\n# TYPE vllm:{name} gauge\n"
        f"vllm:{name}{labels % 0} 0.0\nvllm:{name}{labels % 1} {value}\n"
        for name, value in (("num_requests_running", running), ("num_requests_waiting", waiting))
    )
    more = 'vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 7.0\n'

    def changes(to: bool, answer: object) -> Reply:
        asleep[0] = to
        return Reply(answer)

    return {
        "GET /is_sleeping": lambda: Reply({"is_sleeping": asleep[0]}),
        "GET /metrics": Reply(metrics + more),
        "POST /sleep?level=1&mode=wait": lambda: changes(True, {"status": "sleeping", "level": 1}),
        "POST /wake_up": lambda: changes(False, {"status": "awake", "tags": None}),
    }


def test_vllm_sleeps_and_is_woken_up() -> None:
    with recorded(vllm([False])) as server:
        engine = neighbor("vllm", server.url)
        assert engine.gives_back
        assert engine.held() == Held(False, None)
        engine.ask()
        engine.ask()
        assert engine.held() == Held(False, 0)
        engine.give_back()
        engine.give_back()
        assert engine.held() == Held(False, None)
        changes = [call for call in server.calls if call.startswith("POST")]
        assert changes == ["POST /sleep?level=1&mode=wait", "POST /wake_up"]


@pytest.mark.parametrize(("running", "waiting"), [(1.0, 0.0), (0.0, 3.0)])
def test_vllm_is_in_use_while_an_engine_has_requests(running: float, waiting: float) -> None:
    with recorded(vllm([False], running, waiting)) as server:
        assert neighbor("vllm", server.url).held() == Held(True, None)


def test_vllm_whose_counts_are_no_numbers_is_not_taken_for_idle() -> None:
    with recorded(vllm([False], running=float("nan"))) as server:
        assert neighbor("vllm", server.url).held().in_use


def test_vllm_without_counts_of_requests_is_not_taken_for_idle() -> None:
    replies = vllm([False])
    replies["GET /metrics"] = Reply("# no statistics\n")
    with recorded(replies) as server, pytest.raises(NeighborUnreachable):
        neighbor("vllm", server.url).held()


def events(*events: tuple[str, object]) -> Reply:
    """The stream has no end: the server says neither its length nor that it is complete."""
    lines = [json.dumps({"type": kind, "data": json.dumps(data)}, separators=(",", ":")) for kind, data in events]
    text = "".join(f"event:message\ndata:{line}\n\n" for line in lines)
    return Reply(text, headers={"Content-Type": "text/event-stream", "Content-Length": ""})


def llama_swap(state: str, in_flight: object) -> Conversation:
    log = ("logData", {"source": "proxy", "data": 'a log line with "type":"inflight" in it\n'})
    running = [{"model": "qwen", "state": state, "cmd": "llama-server", "proxy": "http://localhost:5800", "ttl": 300,
                "name": "", "description": ""}]  # fmt: skip
    return {
        "GET /running": Reply({"running": running}),
        "GET /api/events": events(log, ("modelStatus", []), ("inflight", in_flight)),
        "POST /api/models/unload": Reply({"msg": "ok"}),
    }


@pytest.mark.parametrize(
    ("state", "in_flight", "in_use"),
    [
        ("ready", {"operation": "snapshot"}, False),  # without requests
        ("ready", {"operation": "upsert", "request": {"id": "1", "model": "qwen"}}, True),
        ("ready", {"operation": "snapshot", "requests": [{"id": "1", "model": "qwen"}]}, True),
        ("ready", {"requests": []}, False),  # v235
        ("ready", {"total": 2}, True),  # v218
        ("starting", {"total": 0}, True),
    ],
)
def test_llama_swap_is_in_use_while_requests_are_in_flight(state: str, in_flight: object, in_use: bool) -> None:
    with recorded(llama_swap(state, in_flight)) as server:
        swap = neighbor("llama-swap", server.url)
        assert swap.held() == Held(in_use, None, ("qwen",))
        swap.ask()
        assert server.calls[-1] == "POST /api/models/unload"


def test_llama_swap_that_has_started_this_app_is_not_asked() -> None:
    """It would end this app. The test is llama-swap here, and a child process the app."""
    program = (
        "import sys; from residency.errors import InvalidInput; from residency.neighbors import neighbor\n"
        "server = neighbor('llama-swap', sys.argv[1])\n"
        "try: server.ask()\nexcept InvalidInput as error: print(error.en)"
    )
    with recorded(llama_swap("ready", {"operation": "snapshot"})) as server:
        app = subprocess.run([sys.executable, "-c", program, server.url], capture_output=True, text=True, check=True)
        assert "it has started this app" in app.stdout
        assert server.calls == []


def test_llama_swap_without_servers_gives_up_nothing() -> None:
    with recorded({"GET /running": Reply({"running": []})}) as server:
        assert neighbor("llama-swap", server.url).held() == Held(False, 0)


@pytest.mark.parametrize("told", [("modelStatus", []), ("inflight", {"total": 0})])
def test_an_older_llama_swap_is_not_taken_for_idle(told: tuple[str, object]) -> None:
    """v200 counted no requests: its total was 0 while they ran."""
    replies = llama_swap("ready", {}) | {"GET /api/events": events(told)}
    with recorded(replies) as server, pytest.raises(NeighborUnreachable, match="v235 or newer"):
        neighbor("llama-swap", server.url).held()


def llama_cpp(state: str, processing: bool, metrics: bool) -> Conversation:
    of_model = "?model=ggml-org%2Fgemma%3AQ4&autoload=false"
    text = f"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing {int(processing)}\n"
    text += "# TYPE llamacpp:requests_deferred gauge\nllamacpp:requests_deferred 0\n"
    no_metrics = {"error": {"code": 501, "message": "This server does not support metrics endpoint.", "type": "x"}}
    return {
        "GET /models": Reply(
            {
                "data": [
                    {"id": "ggml-org/gemma:Q4", "object": "model", "status": {"value": state, "args": []}},
                    {"id": "other", "object": "model", "status": {"value": "unloaded"}},
                    {"id": "asleep", "object": "model", "status": {"value": "sleeping"}},
                ],
                "object": "list",
            }
        ),
        f"GET /metrics{of_model}": Reply(text) if metrics else Reply(no_metrics, 501),
        f"GET /slots{of_model}": Reply([{"id": 0, "is_processing": False}, {"id": 1, "is_processing": processing}]),
        "POST /models/unload": Reply({"success": True}),
    }


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize(("state", "processing", "in_use"), [("loaded", False, False), ("loaded", True, True)])
def test_llama_cpp_is_in_use_while_a_slot_computes(state: str, processing: bool, in_use: bool, metrics: bool) -> None:
    with recorded(llama_cpp(state, processing, metrics)) as server:
        router = neighbor("llama.cpp", server.url)
        assert router.held() == Held(in_use, None, ("ggml-org/gemma:Q4",))
        router.ask()
        assert server.calls[-1] == 'POST /models/unload {"model": "ggml-org/gemma:Q4"}'
        assert not any("slots" in call for call in server.calls) or not metrics


def test_llama_cpp_is_in_use_while_a_model_loads() -> None:
    with recorded(llama_cpp("loading", False, True)) as server:
        assert neighbor("llama.cpp", server.url).held().in_use


def test_llama_cpp_is_in_use_while_the_process_of_a_model_ends() -> None:
    dead = Reply("proxy error: Could not establish connection", 500)
    gone = Reply({"error": {"code": 400, "message": "model is not loaded", "type": "invalid_request_error"}}, 400)
    for metrics, ending in itertools.product((True, False), (dead, gone)):
        replies = llama_cpp("loaded", False, metrics)
        replies |= {call: ending for call in replies if call.startswith(f"GET /{'metrics' if metrics else 'slots'}")}
        with recorded(replies) as server:
            assert neighbor("llama.cpp", server.url).held().in_use


def test_llama_cpp_without_slots_and_metrics_is_not_taken_for_idle() -> None:
    replies = llama_cpp("loaded", False, False)
    replies |= {call: Reply({"error": {}}, 501) for call in replies if call.startswith("GET /slots")}
    with recorded(replies) as server, pytest.raises(NeighborUnreachable, match="with --metrics or --slots"):
        neighbor("llama.cpp", server.url).held()


def test_llama_cpp_may_unload_a_model_by_itself_meanwhile() -> None:
    replies = llama_cpp("loaded", False, True)

    def not_running() -> Reply:
        replies["GET /models"] = Reply({"data": []})
        return Reply({"error": {"code": 400, "message": "model is not running"}}, 400)

    replies["POST /models/unload"] = not_running
    with recorded(replies) as server:
        neighbor("llama.cpp", server.url).ask()
    replies = llama_cpp("loaded", False, True) | {"POST /models/unload": Reply({"error": {}}, 400)}
    with recorded(replies) as server, pytest.raises(NeighborRefused):
        neighbor("llama.cpp", server.url).ask()


def test_llama_cpp_without_models_gives_up_nothing() -> None:
    with recorded(llama_cpp("unloaded", False, True)) as server:
        assert neighbor("llama.cpp", server.url).held() == Held(False, 0)
        neighbor("llama.cpp", server.url).ask()
        assert server.calls == ["GET /models"] * 2


def test_llama_cpp_with_one_model_is_no_router() -> None:
    one = {"object": "list", "data": [{"id": "tiny.gguf", "object": "model", "owned_by": "llamacpp", "meta": {}}]}
    with recorded({"GET /models": Reply(one)}) as server, pytest.raises(NeighborUnreachable):
        neighbor("llama.cpp", server.url).held()


def sdwebui(job: str = "", job_count: int = 0) -> Conversation:
    state = {"skipped": False, "interrupted": False, "job": job, "job_count": job_count, "job_no": 0}
    cuda = {"system": {"free": 1, "used": 2, "total": 3}, "reserved": {"current": 7 << 30, "peak": 9 << 30}}
    return {
        "GET /sdapi/v1/progress?skip_current_image=true": Reply({"progress": 0.0, "eta_relative": 0.0, "state": state}),
        "GET /sdapi/v1/memory": Reply({"ram": {"used": 1}, "cuda": cuda}),
        "POST /sdapi/v1/unload-checkpoint": Reply({}),
        "POST /sdapi/v1/reload-checkpoint": Reply({}),
    }


def test_sdwebui_unloads_and_reloads_its_checkpoint() -> None:
    with recorded(sdwebui()) as server:
        webui = neighbor("sdwebui", server.url)
        assert webui.held() == Held(False, 7 << 30)
        webui.ask()
        webui.give_back()
        assert webui.gives_back
        assert server.calls[2:] == ["POST /sdapi/v1/unload-checkpoint", "POST /sdapi/v1/reload-checkpoint"]


@pytest.mark.parametrize(("job", "job_count"), [("txt2img", 1), ("task(x)", -1), ("", 2)])
def test_sdwebui_is_in_use_while_it_generates(job: str, job_count: int) -> None:
    replies = sdwebui(job, job_count) | {"GET /sdapi/v1/memory": Reply({"ram": {}, "cuda": {"error": "unavailable"}})}
    with recorded(replies) as server:
        assert neighbor("sdwebui", server.url).held() == Held(True, None)


def gpu_manager(**changes: object) -> Conversation:
    idle = {"state": "gpu", "device_bytes": 5 << 30, "leases": 0, "waiting": 0, "keep_warm_s": 600.0}
    models = {
        "tts": idle | changes,
        "asr": idle | {"device_bytes": 1 << 30},
        "always": idle | {"keep_warm_s": -1},
        "away": idle | {"state": "cpu", "device_bytes": 0},
    }
    return {"GET /gpu/status": Reply({"models": models}), "POST /gpu/offload": Reply({"models": models}, 202)}


def test_an_app_of_this_project_offloads_each_model_that_may_leave() -> None:
    with recorded(gpu_manager()) as server:
        app = neighbor("gpu-manager", server.url, token="secret")
        assert app.held() == Held(False, 6 << 30, ("tts", "asr"))
        app.ask()
        assert server.calls[2:] == ['POST /gpu/offload {"model": "tts"}', 'POST /gpu/offload {"model": "asr"}']
        assert server.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("change", [{"leases": 1}, {"waiting": 1}, {"state": "moving"}])
def test_an_app_of_this_project_is_in_use_while_a_model_is(change: dict[str, object]) -> None:
    with recorded(gpu_manager(**change)) as server:
        assert neighbor("gpu-manager", server.url).held().in_use
