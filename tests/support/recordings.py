"""Recordings for tests that look at what becomes of a request, not at the sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def write_tone(path: Path, seconds: float = 1, **keywords: Any) -> str:
    """A file with a tone at 16 kHz; ``keywords`` as of `soundfile.write`. Returns its path."""
    soundfile.write(path, np.sin(np.arange(round(16000 * seconds)) * 0.03), 16000, **keywords)
    return str(path)
