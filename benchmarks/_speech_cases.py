"""Gives schemathesis, which loads this file, voices that exist and recordings with sound for half of its calls."""

from __future__ import annotations

import base64
import io
import wave
import zlib
from typing import Any

import schemathesis

_OUT = io.BytesIO()
with wave.open(_OUT, "wb") as _sound:
    _sound.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
    _sound.writeframes(b"\0\x10" * 8_000)
_WAV = _OUT.getvalue()
_VALID = {
    "voice": "high", "audio": base64.b64encode(_WAV).decode(), "file": _WAV, "model": None, "task": "vad",
    "input": "Good morning. How are you?",
}  # fmt: skip


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replaces some texts of a body by valid ones, always the same for one body."""
    if isinstance(body, dict):
        seed = zlib.crc32(repr(body).encode(errors="replace"))
        for bit, (name, value) in enumerate(_VALID.items()):
            if isinstance(body.get(name), str | bytes) and seed >> bit & 1:
                body = {**body, name: value}
    return body
