"""The global random states. Isolates loads from them: a load neither changes those of its request nor depends on them.

Some loaders seed Python, numpy and torch (FunASR's ``AutoModel`` sets all three to 0), and building modules draws from
torch's generator: for weights that are then overwritten, and for buffers that are kept (a vocoder's noise).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from .modules import imported


class RandomState:
    """The global random states of Python, numpy and torch (with CUDA) at its creation."""

    def __init__(self, cuda: bool = True) -> None:
        numpy, torch = imported("numpy"), imported("torch")
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy else None
        self._torch = torch.random.get_rng_state() if torch else None
        self._torch_seed = torch.random.initial_seed() if torch else None
        self._values: tuple[object, ...] | None = None
        self._cuda = torch.cuda.get_rng_state_all() if cuda and torch and torch.cuda.is_initialized() else None

    def put_back(self) -> None:
        """Restores all states.

        If torch was imported later, it gets its default seed; numpy, which has none, is left unchanged. If CUDA was
        initialised later, it gets torch's seed.
        """
        numpy, torch = imported("numpy"), imported("torch")
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

    def differs_from(self, other: RandomState | None) -> bool:
        """Returns whether any state but those of CUDA is another one."""
        return other is None or self._plain() != other._plain()

    def continue_here(self, before: RandomState | None, cuda: bool) -> None:
        """Sets the states of this process to those of another one, as if it had drawn the numbers since ``before``.

        ``cuda``: seeds CUDA's generators too, if the other process has seeded torch since.
        """
        numpy, torch = imported("numpy"), imported("torch")
        random.setstate(self._python)
        if numpy and self._numpy is not None:
            numpy.random.set_state(self._numpy)
        if torch and self._torch is not None and (before is None or self._plain()[2] != before._plain()[2]):
            torch.random.set_rng_state(self._torch)
            seeded = torch.Generator().manual_seed(self._torch_seed).get_state()
            if torch.equal(seeded, self._torch):
                torch.random.default_generator.manual_seed(self._torch_seed)  # keeps `initial_seed`
                if cuda:
                    torch.cuda.manual_seed_all(self._torch_seed)  # waits until CUDA is initialised

    def _plain(self) -> tuple[object, ...]:
        if self._values is None:
            array = self._numpy and (self._numpy[0], self._numpy[1].tobytes(), *self._numpy[2:])
            self._values = self._python, array, None if self._torch is None else self._torch.numpy().tobytes()
        return self._values


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the global random states of Python, numpy and torch after the block."""
    before = RandomState()
    try:
        yield
    finally:
        before.put_back()
