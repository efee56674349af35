"""`OwnMoves`: the functions that move one kind of object by its own means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OwnMoves:
    """Functions that move one object; each takes the object. One call at a time, never during a request.

    After an error of ``offload`` or ``restore``, the other one is called to undo it.

    Attributes:
        offload: frees its GPU memory; the object can be restored afterwards.
        restore: restores it; raises if the GPU has no room.
        release: ends it, with its worker processes; the object is unusable afterwards.
        on_gpu: returns whether it uses a GPU; if not, it is only released.
        worker_ended: called from another thread when a worker process of the object ends, also during a request or a
            move: ends calls that wait for it with an error. For objects that would wait forever.
        remedy: for users, in English and Chinese: how it must be built so that ``offload`` frees memory.
    """

    offload: Callable[[Any], object]
    restore: Callable[[Any], object]
    release: Callable[[Any], object] = lambda thing: None
    on_gpu: Callable[[Any], bool] = lambda thing: True
    worker_ended: Callable[[Any], object] | None = None
    remedy: tuple[str, str] | None = None
