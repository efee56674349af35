"""No use of an engine's tensor ends the process or returns a wrong value."""

from __future__ import annotations

import os

import tensor_uses


def test_any_use_of_any_tensor_in_any_state_ends_in_its_value_or_in_the_named_error() -> None:
    """400 random cases from a seed; all cases: ``python tests/support/tensor_uses.py``."""
    seed = int(os.environ.get("EVERY_USE_SEED", "1"))
    ends, failures = tensor_uses.run(tensor_uses.sample(seed, 400), batch=200)
    assert not failures, "\n".join(failures)
    assert ends["away"] > 100
    assert ends["value"] > 100


def test_the_uses_are_many() -> None:
    assert len(set(tensor_uses.USES)) >= 200
