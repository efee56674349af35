"""Isolates loads from random numbers: a load neither changes those of its request nor depends on them.

Some loaders seed Python, numpy and torch (FunASR's ``AutoModel`` sets all three to 0), and building modules draws from
torch's generator: for weights that are then overwritten, and for buffers that are kept (a vocoder's noise).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RandomState:
    """The global random states of Python, numpy and torch (with CUDA) at its creation."""

    def __init__(self) -> None:
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy else None
        self._torch = torch.random.get_rng_state() if torch else None
        self._torch_seed = torch.random.initial_seed() if torch else None
        self._cuda = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None

    def put_back(self) -> None:
        """Restores all states.

        If torch was imported later, it gets its default seed; numpy, which has none, is left unchanged. If CUDA was
        initialised later, it gets torch's seed.
        """
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        random.setstate(self._python)
        if numpy and self._numpy is not None:
            numpy.random.set_state(self._numpy)
        if torch and self._torch is None:
            torch.manual_seed(torch.Generator().initial_seed())
        elif torch:
            torch.random.set_rng_state(self._torch)
            if self._cuda is not None:
                torch.cuda.set_rng_state_all(self._cuda)
            elif torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(self._torch_seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the global random states of Python, numpy and torch after the block."""
    before = RandomState()
    try:
        yield
    finally:
        before.put_back()
