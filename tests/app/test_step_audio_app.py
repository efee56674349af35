"""``app.py`` with a Step-Audio-EditX checkout (in miniature), as its users start it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from app_process import ForkedApp, RunningApp, run_app, wait_until
from gradio_client import Client, handle_file
from miniature_checkout import CHECKOUT, make_recording, make_weights

# Without a GPU "cuda" becomes the CPU; not before the checkout is imported, so that tests see what is imported when.
PRETEND = """
import sys
sys.path.insert(0, "tests/support")
from residency.engines import checkout
def import_from(*arguments, imports=checkout.import_from):
    from cuda_on_cpu import pretend_cuda
    pretend_cuda()
    return imports(*arguments)
checkout.import_from = import_from
"""

MANAGED = ("--enable-gpu-management", "--simulate-gpu", "1GB")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def arguments(models: Path) -> list[str]:
    return ["--model-path", str(models), "--step-audio-root", str(CHECKOUT), "--enable-auto-transcribe"]


@pytest.fixture
def managed(tmp_path: Path, arguments: list[str]) -> Iterator[RunningApp]:
    with RunningApp(tmp_path / "recordings", *MANAGED, *arguments, prelude=PRETEND) as app:
        yield app


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return make_recording(tmp_path / "prompt.wav")


def spoken(app: RunningApp, recording: Path) -> int:
    """How many samples the app answers."""
    client = Client(app.url, verbose=False)
    return soundfile.info(client.predict(handle_file(str(recording)), "said", "to say", api_name="/clone")).frames


def test_the_engine_comes_with_its_first_request_and_leaves_after_it(managed: RunningApp, recording: Path) -> None:
    heavy = {"torch", "transformers", "onnxruntime", "tts", "tokenizer", "whisper_wrapper"}
    assert not managed.modules() & heavy, "the page is there before any of it"
    assert managed.model()["state"] == "released"
    assert spoken(managed, recording) > 0
    assert (managed.model()["state"], managed.model()["device_bytes"]) == ("cpu", 0)
    client = Client(managed.url, verbose=False)
    edited = client.predict(handle_file(str(recording)), "said", "speed", "faster", api_name="/edit")
    assert soundfile.info(edited).samplerate == 24000
    assert "Traceback" not in managed.log


def test_the_checkouts_own_speech_recognition_is_a_model_of_its_own(tmp_path: Path, arguments: list[str]) -> None:
    with ForkedApp(tmp_path / "recordings", *MANAGED, *arguments, prelude=PRETEND) as app:
        assert app.get("/gpu/status")[1]["models"]["asr"]["state"] == "released"
        app.post("/gpu/warm", {"model": "asr"})
        app.wait_for_line("asr: released -> gpu, 16.2 KB")
        assert wait_until(lambda: app.get("/gpu/status")[1]["models"]["asr"]["state"] == "gpu"), "soon after the line"
        assert app.get("/gpu/status")[1]["models"]["asr"]["device_bytes"] == 64 * 64 * 4 + 64 * 4
        assert app.model()["state"] == "released"


def test_without_management_the_checkouts_classes_are_used_as_they_are(
    tmp_path: Path, arguments: list[str], recording: Path
) -> None:
    with RunningApp(tmp_path / "recordings", *arguments, prelude=PRETEND) as app:
        assert {"tts", "tokenizer", "whisper_wrapper"} <= app.modules(), "loaded at the start, as by the public app"
        assert "tts_gpu_managed" not in app.modules()
        assert app.get("/gpu/status")[0] == 404
        assert spoken(app, recording) > 0


def test_what_is_missing_is_said_at_the_start_and_again_to_who_asks(
    tmp_path: Path, models: Path, recording: Path
) -> None:
    broken = Path(shutil.copytree(models, tmp_path / "broken"))
    (broken / "Step-Audio-Tokenizer" / "linguistic_tokenizer.npy").unlink()
    arguments = ("--enable-gpu-management", "--model-path", str(broken), "--step-audio-root", str(CHECKOUT))
    with ForkedApp(tmp_path / "recordings", *arguments, prelude=PRETEND) as app:
        assert "linguistic_tokenizer.npy" in app.wait_for_line("are missing or incomplete")
        with pytest.raises(Exception, match="hf download stepfun-ai/Step-Audio-Tokenizer --local-dir"):
            spoken(app, recording)
    bare = run_app(*arguments[1:], "--server-port", str(app.port), "--tmp-dir", str(tmp_path / "recordings"))
    assert bare.returncode == 1
    assert "linguistic_tokenizer.npy" in bare.stderr
