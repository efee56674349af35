"""vLLM: sleep mode, level 1. The weights move to main memory; the KV cache is discarded.

Its engine runs in a process of its own, with several GPUs in several. It needs ``LLM(enable_sleep_mode=True)``, and
CUDA or ROCm. Its users report that 1 to 1.4 GB stay on the GPU during sleep: CUDA context, graphs, libraries.
Source: https://docs.vllm.ai/en/latest/features/sleep_mode/
"""

from __future__ import annotations

from typing import Any

from .moves import OwnMoves


def _worker_ended(llm: Any) -> None:
    """Ends calls that wait for the engine's process. If it is killed, calls of vLLM (0.32) may never return."""
    core = llm.llm_engine.engine_core
    error = RuntimeError("A worker process of vLLM has ended")
    for future in list(getattr(core, "utility_results", {}).values()):  # sleep, wake_up
        if not future.done():
            future.set_exception(error)
    if (outputs := getattr(core, "outputs_queue", None)) is not None:  # generate
        outputs.put_nowait(error)


MOVES = {
    "vllm.LLM": OwnMoves(
        offload=lambda llm: llm.sleep(level=1),
        restore=lambda llm: llm.wake_up(),
        release=lambda llm: llm.llm_engine.engine_core.shutdown(),
        worker_ended=_worker_ended,
        remedy=(
            "build it with enable_sleep_mode=True, on CUDA or ROCm",
            "请以 enable_sleep_mode=True 构建（需要 CUDA 或 ROCm）",
        ),
    )
}
