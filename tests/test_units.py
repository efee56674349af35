"""One unit for bytes: what the page, the log, the table and the settings call a GB is the same."""

from __future__ import annotations

import pytest

from gpu_manager import SimulatedDevice
from residency.launch.values import size_bytes
from residency.units import readable_bytes, readable_rate


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (None, "?"),
        (0, "0 B"),
        (900, "900 B"),
        (1536, "1.5 KB"),
        (48 << 30, "48 GB"),
        ((1 << 30) - 1, "1024 MB"),
        (int(99.96 * 2**20), "100 MB"),
        (3 << 40, "3 TB"),
    ],
)
def test_bytes(nbytes: int | None, text: str) -> None:
    assert readable_bytes(nbytes) == text


@pytest.mark.parametrize("text", ["48 GB", "1.5 GB", "512 MB", "4 KB", "2 TB"])
def test_what_is_shown_is_what_can_be_set(text: str) -> None:
    assert readable_bytes(size_bytes(text)) == text
    assert text in SimulatedDevice(size_bytes(text)).name


@pytest.mark.parametrize(
    ("bytes_per_s", "text"),
    [
        (0.0, "0 GB/s"),
        (3e6, "< 0.01 GB/s"),
        (0.25 * 2**30, "0.25 GB/s"),
        (2.44 * 2**30, "2.4 GB/s"),
        (24.6 * 2**30, "25 GB/s"),
    ],
)
def test_rates_are_all_in_one_unit(bytes_per_s: float, text: str) -> None:
    assert readable_rate(bytes_per_s) == text
