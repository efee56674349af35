"""The engine on other machines: replicas on Ray Serve, and the engine's interface in front of them."""

from __future__ import annotations

from collections.abc import Sequence


def is_builtin(flags: Sequence[str]) -> bool:
    """Returns whether the flags of app.py choose the built-in engine. Reads no files, which other machines have."""
    names = [flag.partition("=")[0] for flag in flags]
    chosen = {flag.removeprefix("--engine=") for flag in flags if flag.startswith("--engine=")}
    if "--engine" in flags:
        chosen.update(flags[flags.index("--engine") + 1 :][:1])
    return "step-audio" not in chosen and ("builtin" in chosen or "--model-path" not in names)
