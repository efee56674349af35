"""Loading a model must not change the random numbers of the request that caused it.

Some loaders seed Python, numpy and torch (FunASR's ``AutoModel`` sets all three to 0), and building modules
draws from torch's generator for weights that are then overwritten.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch back as they were before the block.

    Libraries that are not imported yet have no state that anybody could have set, and are left alone.
    """
    python_state = random.getstate()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    numpy_state = numpy.random.get_state() if numpy else None
    torch_state = torch.random.get_rng_state() if torch else None
    cuda_states = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        if torch and torch_state is not None:
            torch.random.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
