"""The seven edits of docs/en/library.md, carried out on an app in miniature, which is then run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
from app_process import free_port, wait_until
from gradio_client import Client, handle_file
from guide_edits import edited, edits
from miniature_checkout import CHECKOUT, ROOT, make_recording, make_weights

PRETEND = """
import runpy, sys
from cuda_on_cpu import pretend_cuda
pretend_cuda()
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, sys.argv.pop(1))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextmanager
def running(app: Path, models: Path, *arguments: str) -> Iterator[Client]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", PRETEND, str(app), str(CHECKOUT), "--model-path", str(models),
         "--server-name", "127.0.0.1", "--server-port", str(port), *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "GRADIO_TEMP_DIR": str(app.parent)},
        cwd=models,
    )  # fmt: skip
    try:
        clients: list[Client] = []

        def serves() -> bool:
            assert process.poll() is None, "it has ended"
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


def test_the_app_with_seven_edits_gives_the_gpu_back_and_without_the_flag_is_what_it_was(tmp_path: Path) -> None:
    assert len(edits()) == 7
    app = tmp_path / "app.py"
    app.write_text(edited((CHECKOUT / "app.py").read_text()))
    models, recording = make_weights(tmp_path / "models"), make_recording(tmp_path / "voice.wav")

    def spoken(client: Client) -> int:
        said = client.predict("said", handle_file(str(recording)), "to say", api_name="/generate_clone")
        return soundfile.info(said).frames

    with running(app, models) as client:
        frames = spoken(client)
        assert frames > 0
    with running(app, models, "--enable-gpu-management") as client:
        status = "/get_gpu_status"
        assert client.predict(api_name=status)["models"]["tts"]["state"] == "released", "nothing is loaded at the start"
        assert spoken(client) == frames
        assert client.predict(api_name=status)["models"]["tts"]["state"] == "cpu"
        client.predict(api_name="/force_release")
        assert client.predict(api_name=status)["models"]["tts"]["state"] == "released"
        assert spoken(client) == frames


def test_an_edit_that_does_not_fit_is_noticed() -> None:
    with pytest.raises(AssertionError, match="0 places"):
        edited("print('another program')")
