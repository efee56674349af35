"""The seven edits of docs/en/library.md, carried out on the app of each generation in miniature, which is then run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
from app_process import free_port, wait_until
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from guide_edits import edited, edits
from miniature_checkout import CHECKOUT, ROOT, STAND_IN, make_newer_checkout, make_recording, make_weights

PRETEND = """
import runpy, sys
from cuda_on_cpu import pretend_cuda
pretend_cuda()
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, sys.argv.pop(1))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


RELEASED = {"tts": "released", "asr": "released"}
ELSEWHERE = {"X-Forwarded-For": "203.0.113.7"}
"""Uvicorn takes the client's address from this header, if a proxy on this machine has sent it."""


@dataclass
class App:
    """An edited app, with the checkout whose modules it imports, and the folder that is its model path."""

    file: Path
    checkout: Path
    models: Path

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Client]:
        port = free_port()
        paths = ":".join(map(str, (ROOT, ROOT / "tests/support", STAND_IN)))
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PRETEND, str(self.file), str(self.checkout), "--model-path", str(self.models),
                 "--server-name", "127.0.0.1", "--server-port", str(port), *arguments],
                env={**os.environ, "PYTHONPATH": paths, "GRADIO_TEMP_DIR": str(self.file.parent)},
                cwd=self.models, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            clients: list[Client] = []

            def serves() -> bool:
                assert process.poll() is None, self.log.read_text()
                try:
                    clients.append(Client(f"http://127.0.0.1:{port}", verbose=False))
                except Exception:  # not yet
                    return False
                return True

            assert wait_until(serves)
            yield clients[0]
        finally:
            process.kill()
            process.wait()

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return handle_file(str(make_recording(tmp_path_factory.mktemp("voice") / "voice.wav")))


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> App:
    folder = tmp_path_factory.mktemp("edited")
    models = make_weights(folder / "models")
    newer = request.param == "vllm"
    checkout = make_newer_checkout(folder / "newer") if newer else CHECKOUT
    file = folder / "app.py"
    file.write_text(edited((checkout / "app.py").read_text()))
    return App(file, checkout, models / "Step-Audio-EditX" if newer else models)


@pytest.fixture(scope="module")
def heard(app: App, recording: Any) -> tuple[int, str]:
    """The frames of a clone and the transcription by the edited app without the new flag."""
    with app.running("--enable-auto-transcribe") as client:
        assert "gpu_status" not in str(client.view_api(return_format="dict"))
        return frames_of(client, recording), transcribed(client, recording)


@pytest.fixture(scope="module")
def managed(app: App, heard: tuple[int, str]) -> Iterator[Client]:
    with app.running("--enable-auto-transcribe", "--enable-gpu-management") as client:
        assert states(client) == RELEASED, "nothing is loaded at the start"
        yield client


@pytest.fixture
def client(managed: Client) -> Client:
    assert states(managed, "/gpu_release") == RELEASED
    return managed


def frames_of(client: Client, recording: Any) -> int:
    spoken = client.predict("said", recording, "to say", api_name="/generate_clone")
    return soundfile.info(spoken).frames


def transcribed(client: Client, recording: Any) -> str:
    return str(client.predict(recording, "", api_name="/transcribe_audio"))


def states(client: Client, call: str = "/gpu_status") -> dict[str, str]:
    return {name: model["state"] for name, model in client.predict(api_name=call)["models"].items()}


def test_there_are_seven_edits() -> None:
    assert len(edits()) == 7


def test_the_edited_app_speaks_as_without_the_flag_and_frees_the_gpu(
    app: App, client: Client, heard: tuple[int, str], recording: Any
) -> None:
    assert heard[0] > 0
    assert frames_of(client, recording) == heard[0]
    assert states(client) == {"tts": "cpu", "asr": "released"}
    assert states(client, "/gpu_release") == RELEASED
    assert frames_of(client, recording) == heard[0]
    assert states(client, "/gpu_offload") == {"tts": "cpu", "asr": "released"}
    assert "CUDA graph" not in app.log.read_text(), "the engine is built so that it can be offloaded"


def test_whisper_is_managed_too(client: Client, heard: tuple[int, str], recording: Any) -> None:
    assert heard[1] == "16000 samples"
    assert transcribed(client, recording) == heard[1]
    assert states(client) == {"tts": "released", "asr": "cpu"}
    assert states(client, "/gpu_release") == RELEASED


def test_another_machine_neither_moves_models_nor_reads_the_status(client: Client, recording: Any) -> None:
    frames_of(client, recording)
    elsewhere = Client(client.src, headers=ELSEWHERE, verbose=False)
    for call in ("/gpu_status", "/gpu_offload", "/gpu_release"):
        with pytest.raises(AppError, match="Only on the machine of this app"):
            elsewhere.predict(api_name=call)
    assert states(client) == {"tts": "cpu", "asr": "released"}


def test_an_edit_that_does_not_fit_is_noticed() -> None:
    with pytest.raises(AssertionError, match="0 places"):
        edited("print('another program')")
