"""``app.py`` with a Step-Audio-EditX checkout (in miniature), as its users start it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from app_process import ForkedApp, RunningApp, free_port, run_app, wait_until
from gradio_client import Client, handle_file
from miniature_checkout import CHECKOUT, make_newer_checkout, make_recording, make_weights

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

# For the newer generation: its stand-in for vLLM, and the arguments of the engine in the log.
NEWER = (
    PRETEND
    + """
sys.path.insert(0, "tests/support/stand_in_vllm")
from residency.engines import step_audio
def build(*arguments, builds=step_audio.build, **flags):
    engine = builds(*arguments, **flags)
    from vllm import LLM
    print("arguments:", {**engine.arguments, "sleeps": LLM.built[-1]["enable_sleep_mode"]}, flush=True)
    return engine
step_audio.build = build
"""
)

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


# -- the newer generation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory, models: Path) -> list[str]:
    checkout = make_newer_checkout(tmp_path_factory.mktemp("newer") / "checkout")
    return ["--model-path", str(models / "Step-Audio-EditX"), "--step-audio-root", str(checkout)]


def built(app: RunningApp) -> dict[str, Any]:
    """The arguments that the engine got."""
    arguments: dict[str, Any] = ast.literal_eval(app.wait_for_line("arguments:").partition("arguments:")[2].strip())
    return arguments


def test_the_newer_engine_is_managed_and_its_page_is_as_in_its_app(
    tmp_path: Path, newer: list[str], recording: Path
) -> None:
    with ForkedApp(tmp_path / "recordings", *MANAGED, *newer, prelude=NEWER) as app:
        assert app.model()["state"] == "released"
        assert spoken(app, recording) > 0
        assert (app.model()["state"], app.model()["device_bytes"]) == ("cpu", 0)
        arguments = built(app)
        assert arguments["sleeps"]
        assert arguments["cosyvoice_cuda_graph"] is False
        assert arguments["max_model_len"] == 3072
        page = str(Client(app.url, verbose=False).config)
        assert "its result is appended to the history" in page
        assert "[Laughter]" in page
        assert "[clears throat]" in page
        assert "Traceback" not in app.log


def test_without_management_the_newer_engine_is_built_as_by_its_app(
    tmp_path: Path, newer: list[str], recording: Path
) -> None:
    flags = ("--max-model-len", "4096", "--quantization", "fp8", "--enforce-eager", "--cosyvoice-dtype", "bfloat16")
    with ForkedApp(tmp_path / "recordings", *newer, *flags, prelude=NEWER) as app:
        arguments = built(app)
        assert not arguments["sleeps"]
        assert arguments["cosyvoice_cuda_graph"] is True
        assert (arguments["max_model_len"], arguments["quantization"]) == (4096, "fp8")
        assert (arguments["enforce_eager"], arguments["cosyvoice_dtype"]) == (True, "bfloat16")
        assert arguments["gpu_memory_utilization"] == 0.5
        assert spoken(app, recording) > 0


def test_cuda_graphs_in_a_managed_vocoder_are_a_choice_with_a_warning(
    tmp_path: Path, newer: list[str], recording: Path
) -> None:
    with ForkedApp(tmp_path / "recordings", *MANAGED, *newer, "--cosyvoice-cuda-graph", prelude=NEWER) as app:
        assert "only be released" in app.wait_for_line("captures CUDA graphs")
        app.post("/gpu/warm", {"model": "tts"})
        assert built(app)["cosyvoice_cuda_graph"] is True


def test_a_recording_longer_than_the_context_of_the_generation_is_refused(
    tmp_path: Path, arguments: list[str], newer: list[str]
) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, np.random.default_rng(1).normal(size=200 * 8000) * 0.1, 8000)
    for where, prelude, said in (
        (newer, NEWER, r"a context of 3,072 tokens\): shorten it or raise --max-model-len"),
        (arguments, PRETEND, r"a context of 8,192 tokens\): shorten it /"),
    ):
        running = ForkedApp(tmp_path / "recordings", *MANAGED, *where, prelude=prelude)
        with running as app, pytest.raises(Exception, match=said):
            spoken(app, long)


@pytest.mark.parametrize("managed", [(), MANAGED])
@pytest.mark.parametrize(
    ("generation", "flags", "said"),
    [
        ("older", ["--max-model-len", "4096", "--dtype", "float16"], "--max-model-len, --dtype: only"),
        ("older", ["--cosyvoice-cuda-graph"], "--cosyvoice-cuda-graph: only"),
        ("older", ["--quantization", "awq"], "--quantization awq"),
        ("newer", ["--torch-dtype", "bfloat16"], "--torch-dtype: only"),
        ("newer", ["--quantization", "awq-4bit"], "--quantization awq-4bit"),
    ],
)
def test_a_flag_of_the_other_generation_is_refused_at_the_start(
    arguments: list[str], newer: list[str], generation: str, flags: list[str], said: str, managed: tuple[str, ...]
) -> None:
    port = str(free_port())
    where = arguments if generation == "older" else newer
    done = run_app(*where, *flags, *managed, "--server-name", "127.0.0.1", "--server-port", port)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Serving on" not in done.stderr


def test_an_unknown_generation_is_refused_at_the_start(tmp_path: Path, newer: list[str]) -> None:
    checkout = make_newer_checkout(tmp_path / "checkout")
    engine = checkout / "tts.py"
    engine.write_text(engine.read_text().replace("max_model_len=8192", "context=8192"))
    done = run_app(*newer[:2], "--step-audio-root", str(checkout), *MANAGED, "--server-port", str(free_port()))
    assert done.returncode == 1
    assert "no known generation" in done.stderr
    assert "has max_model_len, this one has context" in done.stderr
