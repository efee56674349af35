"""Engines whose loaders can be sent to a worker process: they refer to no object of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from residency.devices import SimulatedDevice


class RecordingEngine:
    """Logs its calls, and answers. ``raises``: errors of the first calls; ``passes``: called within each call."""

    def __init__(self, raises: Sequence[Exception] = (), passes: Callable[[], object] = lambda: None) -> None:
        self.weights = torch.ones(4)
        self.calls: list[tuple] = []
        self.raises = list(raises)
        self.passes = passes
        self.answer = torch.arange(10.0)[None], 24000

    def _call(self, *arguments: object) -> tuple[torch.Tensor, int]:
        self.calls.append(arguments)
        self.passes()
        assert self.weights.sum() == 4
        if self.raises:
            raise self.raises.pop(0)
        return self.answer

    def clone(self, prompt_wav_path, prompt_text, target_text):
        return self._call("clone", prompt_wav_path, prompt_text, target_text)

    def edit(self, input_audio_path, audio_text, edit_type, edit_info=None, text=None):
        return self._call("edit", input_audio_path, audio_text, edit_type, edit_info, text)


def hanging(pipe: Path) -> RecordingEngine:
    """A loader that waits while there is a named pipe, until it is opened for writing."""
    if pipe.exists():
        pipe.read_bytes()
    return RecordingEngine()


class Rich(torch.nn.Module):
    """An engine with parts, containers, private methods, and methods that answer generators."""

    def __init__(self, given: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])
        self.named = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
        self.caches: dict[str, torch.Tensor] = {"latest": torch.ones(3)}
        self.weights, self.prompt, self.calls = torch.ones(3), "Edit.", 0
        self.given = given

    clone = edit = _build = lambda self, *arguments: arguments

    def stream(self, count: int) -> Iterator[torch.Tensor]:
        self.calls += 1
        return (self.weights * number for number in range(count))


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


class LostDevice(SimulatedDevice):
    def is_usable(self) -> bool:
        return False
