"""Handlers that stream from a managed model, in real servers: values read, requests made meanwhile, clients that go."""

from __future__ import annotations

import gc
import http.client
from collections.abc import Iterator

import gradio as gr
import pytest
from fakes import await_that
from fastapi import FastAPI
from gradio_client import Client
from local_server import Served
from starlette.responses import StreamingResponse
from streaming_engine import Speaker

from gpu_manager import GPUResourceManager, SimulatedDevice
from tts_gpu_managed import GPUManagedTTS


@pytest.fixture
def tts() -> Iterator[GPUManagedTTS]:
    with GPUResourceManager(SimulatedDevice(1 << 30), wait_timeout=30) as manager:
        yield GPUManagedTTS(None, manager=manager, load=Speaker)


@pytest.fixture
def served(tts: GPUManagedTTS) -> Iterator[Served]:
    app = FastAPI()

    @app.get("/stream")
    def stream(count: int, second: bool = False) -> StreamingResponse:
        def body() -> Iterator[str]:
            for chunk in tts.stream(count):
                rate = tts.clone("", "", "")[1] if second else tts.sample_rate
                yield f"{len(chunk)} at {rate}\n"

        return StreamingResponse(body())

    @app.get("/bare")
    def bare(count: int) -> StreamingResponse:
        return StreamingResponse(bytes(str(len(chunk)), "ascii") * 4096 for chunk in tts.stream(count))

    served = Served(app)
    yield served
    served.close()


def is_free(tts: GPUManagedTTS) -> bool:
    managed = tts.manager._managed_models["tts"]
    return await_that(tts.manager, managed, lambda: not managed.leases.in_use)


@pytest.mark.parametrize("second", ["false", "true"])
def test_a_streaming_response_reads_and_asks_while_it_streams(tts: GPUManagedTTS, served: Served, second: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", f"/stream?count=5&second={second}")
    assert connection.getresponse().read().decode() == "4 at 24000\n" * 5
    assert is_free(tts)


@pytest.mark.parametrize("path", ["/stream?count=1000000000", "/bare?count=1000000000"])
def test_a_client_that_goes_in_the_middle_gives_the_model_back(tts: GPUManagedTTS, served: Served, path: str) -> None:
    gc.disable()  # a collection may never come
    try:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.read(10)
        answer.close()
        connection.close()
        assert is_free(tts)
        assert tts.clone("", "", "")[1] == 24_000
    finally:
        gc.enable()


@pytest.fixture
def page(tts: GPUManagedTTS) -> Iterator[str]:
    def speak(count: float) -> Iterator[str]:
        for chunk in tts.stream(int(count)):
            yield f"{len(chunk)} at {tts.sample_rate}, {tts.clone('', '', '')[1]}"

    with gr.Blocks() as blocks:
        number, text = gr.Number(), gr.Text()
        gr.Button().click(speak, number, text, api_name="speak")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    blocks.close()


def test_a_handler_of_gradio_reads_and_asks_while_it_streams(tts: GPUManagedTTS, page: str) -> None:
    job = Client(page, verbose=False).submit(4, api_name="/speak")
    assert list(job) == ["4 at 24000, 24000"] * 4
    assert is_free(tts)


def test_a_job_of_gradio_that_is_cancelled_gives_the_model_back(tts: GPUManagedTTS, page: str) -> None:
    client = Client(page, verbose=False)
    job = client.submit(1e9, api_name="/speak")
    next(iter(job))
    job.cancel()
    assert is_free(tts)
    assert tts.clone("", "", "")[1] == 24_000
