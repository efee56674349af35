"""Processes that are killed while they write, and processes that share a folder. Each scenario runs in its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(scenario: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, scenario, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", ["half", "fsync", "renamed"])
def test_after_a_kill_while_writing_the_next_process_cleans_up_and_speaks(tmp_path: Path, moment: str) -> None:
    killed = start(f"stop_at_{moment}", tmp_path)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "here\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    killed.stdout.close()
    assert len(hidden(tmp_path)) == (0 if moment == "renamed" else 1)
    assert finish(start("speak_release_speak", tmp_path)) == "spoke the same after 1 load\n"
    assert hidden(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_that_write_the_same_snapshot_at_the_same_time_all_read_it_back(tmp_path: Path) -> None:
    processes = [start("write_and_read_often", tmp_path) for _ in range(2)]
    assert [finish(process) for process in processes] == ["all were whole\n"] * 2
    assert hidden(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1


# -- in the other process ---------------------------------------------------------------------------------------


def speak_release_speak(folder: Path) -> None:
    import torch
    from engine_strategies import bytes_of

    from gpu_manager import GPUResourceManager, SimulatedDevice

    loads = []

    def load() -> torch.nn.Module:
        loads.append(1)
        generator = torch.Generator().manual_seed(0)
        engine = torch.nn.Linear(1000, 1000, bias=False)
        engine.weight.data.copy_(torch.randn(1000, 1000, generator=generator))
        return engine

    with GPUResourceManager(SimulatedDevice(1 << 30), snapshot_dir=folder) as manager:
        manager.register("tts", load)
        with manager.lease("tts") as engine:
            before = bytes_of(engine.weight)
        manager.release("tts")
        with manager.lease("tts") as engine:
            assert bytes_of(engine.weight) == before
        print(f"spoke the same after {len(loads)} load")
        manager.release("tts")


def stop_here() -> None:
    print("here", flush=True)
    signal.pause()


def stop_at_half(folder: Path) -> None:
    from residency.memory import snapshot

    def write_half(file: BinaryIO, header: bytes, data: memoryview) -> None:
        file.write(header + bytes(data[: len(data) // 2]))
        stop_here()

    snapshot._write_file = write_half
    speak_release_speak(folder)


def stop_at_fsync(folder: Path) -> None:
    os.fsync = lambda handle: stop_here()
    speak_release_speak(folder)


def stop_at_renamed(folder: Path) -> None:
    replace: Callable[..., None] = os.replace

    def replace_and_stop(source: Path, target: Path) -> None:
        replace(source, target)
        stop_here()

    os.replace = replace_and_stop
    speak_release_speak(folder)


def write_and_read_often(folder: Path) -> None:
    import torch

    from residency.memory import snapshot
    from residency.memory.checksum import host_checksum
    from residency.memory.snapshot import SnapshotFolder

    raw = torch.arange(1 << 20, dtype=torch.int32).view(torch.uint8)
    hashes = [host_checksum(raw)]
    store = SnapshotFolder(folder)
    # As if it were never there already, so that both really write, again and again.
    is_whole = snapshot._is_whole
    for _ in range(15):
        snapshot._is_whole = lambda *_: False
        store.write("tts", [(0, len(raw))], hashes, raw)
        snapshot._is_whole = is_whole
        target = torch.zeros_like(raw)
        SnapshotFolder(folder).read("tts", [(0, len(raw))], hashes, target)
        assert torch.equal(raw, target)
    print("all were whole")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
