"""Every likely or malicious change of weights is detected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from residency.memory import checksum
from residency.memory.checksum import checksums, host_checksum, multilinear

CPU = torch.device("cpu")


@pytest.fixture(params=["xxh3", "multilinear"])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Returns the checksums of several uint8 tensors, computed in both ways."""
    if request.param == "xxh3":
        return lambda *raws: checksums(raws, len(raws))
    monkeypatch.setattr(checksum, "SPAN_BYTES", 1 << 16)
    return lambda *raws: multilinear(raws, len(raws), CPU)


def bytes_like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).view(-1)


def test_equal_bytes_have_equal_fingerprints_wherever_they_lie(of: Callable[..., list[int]]) -> None:
    first = bytes_like(torch.randn(1001))
    second = torch.cat([torch.zeros(8, dtype=torch.uint8), first])[8:]
    assert of(first) == of(second) == of(first.clone())
    assert len(set(of(first, second, first[4:]))) == 2


def test_each_bit_counts(of: Callable[..., list[int]]) -> None:
    for length in (1, 2, 3, 4, 5, 7, 8, 64, 251):
        raw = torch.randint(0, 256, (length,), dtype=torch.uint8)
        flipped = []
        for bit in range(length * 8):
            copy = raw.clone()
            copy[bit // 8] ^= 1 << bit % 8
            flipped.append(copy)
        assert len(set(of(raw, *flipped))) == length * 8 + 1


def test_the_last_bytes_count_as_much_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "SPAN_BYTES", 1024)
    ends = [torch.tensor([number, 2, 3], dtype=torch.uint8) for number in range(1, 100)]
    assert max(abs(number) for number in multilinear(ends, len(ends), CPU)) > 2**40


def changes(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns changes that a sum, an xor or a position-independent hash would miss."""
    length = len(tensor)
    swapped, negated, sign, zeros, moved = (tensor.clone() for _ in range(5))
    swapped[[3, length - 5]] = tensor[[length - 5, 3]]
    negated[[0, length // 2]] *= -1
    sign[length - 1] *= -1
    zeros[:64] = 0
    moved[128:192] = 0
    moved[:64] = tensor[128:192]
    plus_minus = tensor.clone()
    plus_minus.view(torch.int32)[[7, 8]] += torch.tensor([1, -1], dtype=torch.int32)
    return {
        "swapped": swapped, "negated": negated, "sign": sign, "zeros": zeros, "zeros moved": moved,
        "plus and minus": plus_minus, "rotated": tensor.roll(1), "reversed": tensor.flip(0),
        "blocks swapped": torch.cat([tensor[length // 2 :], tensor[: length // 2]]),
    }  # fmt: skip


def test_values_that_change_places_or_signs_show(of: Callable[..., list[int]]) -> None:
    tensor = torch.randn(4096)
    changed = changes(tensor)
    sums = of(bytes_like(tensor), *map(bytes_like, changed.values()))
    assert len(set(sums)) == len(sums), [*changed]


def test_negated_pairs_in_a_field_of_zeros_show(of: Callable[..., list[int]]) -> None:
    zeros = torch.zeros(4096)
    fields = [zeros]
    for place in (0, 1, 2047, 4095):
        field = zeros.clone()
        field[place] = -0.0
        fields.append(field)
    pair = zeros.clone()
    pair[[1, 2]] = -0.0  # two sign bits, whose sum 2**31 + 2**31 would cancel
    fields.append(pair)
    sums = of(*map(bytes_like, fields))
    assert len(set(sums)) == len(sums)


def test_random_flips_never_collide(of: Callable[..., list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.zeros(4000, dtype=torch.uint8)
    seen = []
    for _ in range(3000):
        changed = raw.clone()
        places = torch.randint(0, 4000, (2,), generator=generator)
        changed[places] = torch.randint(1, 256, (2,), dtype=torch.uint8, generator=generator)
        seen.append(changed)
    assert len(set(of(*seen))) == len({bytes(changed.tolist()) for changed in seen})


def test_xxh3_is_that_of_the_library_and_equal_in_every_process() -> None:
    content = bytes(range(256)) * 5
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert host_checksum(raw) == xxhash.xxh3_64_intdigest(content)


def test_weights_of_the_sums_are_drawn_anew_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the construction of two contents that collide in every process."""
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]; import torch\n"
        "from residency.memory import checksum\n"
        "checksum.SPAN_BYTES = 1024\n"
        "print(checksum.multilinear([torch.ones(100, dtype=torch.uint8)], 1, torch.device('cpu')))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    monkeypatch.setattr(checksum, "SPAN_BYTES", 1024)
    assert answer != f"{multilinear([torch.ones(100, dtype=torch.uint8)], 1, CPU)}\n"


def test_looking_never_makes_a_storage_unresizable() -> None:
    tensor = torch.randn(1000)
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (4000,), (1,))
    checksums([raw], 1)
    host_checksum(raw)
    multilinear([raw], 1, CPU)
    assert tensor.untyped_storage().resizable()
    tensor.untyped_storage().resize_(0)


def test_tensors_are_taken_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch space of one span is freed before the next one."""
    monkeypatch.setattr(checksum, "SPAN_BYTES", 1024)
    alive: list[int] = []

    class Counted:
        count = 0

    def spans() -> object:
        for number in range(5):
            alive.append(Counted.count)
            yield torch.full((100,), number, dtype=torch.uint8)

    assert len(set(multilinear(spans(), 5, CPU))) == 5
    assert len(set(checksums(spans(), 5))) == 5
    assert checksums(iter([]), 0) == []
