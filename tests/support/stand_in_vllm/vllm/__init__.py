"""Stand-in for vLLM with its interface as far as engines use it: a worker process holds weights and KV cache.

Tokens depend on the weights and the prompt only. ``LLM.fault`` makes the worker fail in the next call of that name:
``die`` (kill -9), ``error``, ``full`` (out of memory), ``ignore`` (frees nothing).
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import platforms

__version__ = "0.14.0"
__all__ = ["LLM", "SamplingParams", "platforms"]

WEIGHT_BYTES = 96 << 20
CACHE_BYTES = 48 << 20


class EngineDeadError(Exception):
    pass


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    skip_special_tokens: bool = True


class LLM:
    built: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, model: str, *, enable_sleep_mode: bool = False, **arguments: Any) -> None:
        LLM.built.append({"model": model, "enable_sleep_mode": enable_sleep_mode, **arguments})
        self.fault: tuple[str, str] | None = None
        self._sleeps = enable_sleep_mode
        self._worker = _Worker()
        self.llm_engine = SimpleNamespace(engine_core=self._worker)
        self._worker.call("load", WEIGHT_BYTES, CACHE_BYTES)

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], parameters: SamplingParams, use_tqdm: bool = True
    ) -> list[Any]:
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=self._call("generate", *prompt["prompt_token_ids"]))],
            )
            for prompt in prompts
        ]

    def sleep(self, level: int = 1) -> None:
        self._call("sleep" if self._sleeps else "ignore", level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._call("wake_up" if self._sleeps else "ignore")

    def _call(self, name: str, *values: int) -> list[int]:
        fault, self.fault = (self.fault[1], None) if self.fault and self.fault[0] == name else ("", self.fault)
        return self._worker.call("ignore" if fault == "ignore" else name, *values, fault=fault)


class _Worker:
    def __init__(self) -> None:
        command = [sys.executable, "-S", str(Path(__file__).with_name("worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, _end, self.process)  # as vLLM does

    def call(self, name: str, *values: int, fault: str = "") -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(name, fault or "-", *values, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline().split()
        except (OSError, ValueError):
            answer = []
        if not answer:
            self.process.wait()
            raise EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        if answer[0] == "error":
            raise RuntimeError("CUDA error: out of memory" if fault == "full" else "an error of the worker")
        return [int(token) for token in answer[1:]]

    def shutdown(self) -> None:
        _end(self.process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
