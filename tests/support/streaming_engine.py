"""A small streaming engine with a plain value, a part, and `clone`."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Speaker(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sample_rate = 24_000
        self.voice = torch.nn.Linear(4, 4)

    def stream(self, count: int) -> Iterator[torch.Tensor]:
        """Yields ``count`` tensors, float32 [4, 4]."""
        for _ in range(count):
            yield self.voice.weight.detach().clone()

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        return self.voice.weight.sum().reshape(1, 1), self.sample_rate
