"""Recordings for tests of requests, with arbitrary sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def write_tone(path: Path, seconds: float = 1, **keywords: Any) -> str:
    """Writes a tone at 16 kHz; ``keywords`` as of `soundfile.write`. Returns its path."""
    soundfile.write(path, np.sin(np.arange(round(16000 * seconds)) * 0.03), 16000, **keywords)
    return str(path)
