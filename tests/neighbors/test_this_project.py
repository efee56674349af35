"""The app of this project as a neighbour: the real one, with a simulated GPU."""

from __future__ import annotations

from pathlib import Path

from app_process import RunningApp, wait_until

from residency.neighbors import find, neighbor


def test_the_app_gives_up_its_idle_models(tmp_path: Path) -> None:
    with RunningApp(tmp_path, "--enable-gpu-management", "--simulate-gpu", "4GB") as app:
        other = neighbor("gpu-manager", app.url)
        assert other.held().idle_bytes == 0
        app.post("/gpu/warm", {"model": "tts"})
        assert wait_until(lambda: app.model()["state"] == "gpu")
        held = other.held()
        assert (held.in_use, held.idle_bytes, held.models) == (False, app.model()["device_bytes"], ("tts",))
        assert find([app.process.pid], own_pids=()) == [(app.process.pid, other)]
        other.ask()
        assert wait_until(lambda: other.held().idle_bytes == 0)
        assert app.model()["state"] == "cpu"
