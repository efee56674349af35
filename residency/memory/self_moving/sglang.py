"""SGLang: releases weights and KV cache of its scheduler processes. It needs ``Engine(enable_memory_saver=True)``.

Source: https://docs.sglang.ai/advanced_features/sglang_for_rl.html
"""

from __future__ import annotations

from .moves import OwnMoves

MOVES = {
    "sglang.Engine": OwnMoves(
        offload=lambda engine: engine.release_memory_occupation(),
        restore=lambda engine: engine.resume_memory_occupation(),
        release=lambda engine: engine.shutdown(),
        remedy=("build it with enable_memory_saver=True", "请以 enable_memory_saver=True 构建"),
    )
}
