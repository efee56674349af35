"""Unique storages: sharing, constant values, and copies to new storages."""

from __future__ import annotations

import logging

import pytest
import torch
from engine_strategies import DTYPES, bytes_of

from residency.memory.storages import ManagedStorage, managed_storages

LARGE = 1 << 20


def piece_of(tensor: torch.Tensor) -> ManagedStorage:
    [piece] = managed_storages({"t": tensor})
    return piece


def repeating(element: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(element * count), dtype=torch.uint8).clone().view(dtype)


def test_tensors_are_grouped_by_storage_and_those_without_bytes_left_out() -> None:
    base = torch.randn(10)
    module = torch.nn.Linear(2, 2)
    module.tied = module.weight
    pieces = managed_storages({
        "base": base, "slice": base[3:], "weight": module.weight, "tied": module.tied, "data": module.weight.data,
        "meta": torch.empty(5, device="meta"), "empty": torch.empty(0), "sparse": torch.eye(3).to_sparse(),
    })  # fmt: skip
    assert [list(piece.tensors) for piece in pieces] == [["base", "slice"], ["weight", "tied", "data"]]
    assert [piece.nbytes for piece in pieces] == [40, 16]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not torch.complex128])
@pytest.mark.parametrize("byte", [0, 1, 0x80, 0xFF])
def test_a_storage_of_one_value_is_recognised_bit_for_bit(dtype: torch.dtype, byte: int) -> None:
    if dtype is torch.bool and byte > 1:
        pytest.skip("a bool is 0 or 1")
    itemsize = torch.empty((), dtype=dtype).element_size()
    element = bytes([byte] + [3] * (itemsize - 2) + [byte])[:itemsize] if itemsize > 1 else bytes([byte])
    tensor = repeating(element, dtype, LARGE // itemsize + 3)
    piece = piece_of(tensor)
    piece.constant = piece.find_constant()
    assert piece.constant == element
    before = bytes_of(tensor)
    piece.byte_view.zero_()
    piece.write_constant(piece.byte_view)
    assert bytes_of(tensor) == before


@pytest.mark.parametrize("where", [0, 1, 4095, 4096, 4097, LARGE // 4 - 1])
@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_that_differs_anywhere_is_noticed(where: int, bit: int) -> None:
    tensor = torch.zeros(LARGE // 4)
    tensor.view(torch.int32)[where] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert piece_of(tensor).find_constant() is None


def test_a_difference_behind_the_first_pieces_is_noticed() -> None:
    tensor = torch.zeros((17 << 20) + 5, dtype=torch.uint8)
    for place in (4096 + (8 << 20) - 1, 4096 + (8 << 20), (17 << 20) + 4):
        tensor[place] = 1
        assert piece_of(tensor).find_constant() is None
        tensor[place] = 0
    assert piece_of(tensor).find_constant() == b"\0"


def test_nan_is_equal_to_itself_and_minus_zero_is_not_zero() -> None:
    assert piece_of(torch.full((LARGE // 4,), float("nan"))).find_constant() == b"\0\0\xc0\x7f"
    tensor = torch.zeros(LARGE // 4)
    tensor[7] = -0.0
    assert piece_of(tensor).find_constant() is None


def test_small_ragged_and_wide_storages_are_copied_like_any_other() -> None:
    assert piece_of(torch.zeros(100)).find_constant() is None
    assert piece_of(torch.zeros(LARGE, dtype=torch.complex128)).find_constant() is None
    ragged = torch.zeros(LARGE + 1, dtype=torch.uint8)[: LARGE // 4 * 4].view(torch.float32)
    assert piece_of(ragged).find_constant() is None


def test_what_numpy_or_a_file_owns_gets_a_home_of_its_own_with_all_its_ties() -> None:
    owned = torch.from_numpy(torch.randn(6, 4).numpy().copy())
    parameter = torch.nn.Parameter(owned.t())
    window = owned[1:3, 2:]
    before = bytes_of(owned)
    [piece] = managed_storages({"owned": owned, "parameter": parameter, "window": window})
    assert piece.make_resizable()
    assert piece.storage.resizable()
    assert len({tensor.untyped_storage()._cdata for tensor in piece.tensors.values()}) == 1
    assert owned.untyped_storage()._cdata == piece.storage._cdata
    assert bytes_of(owned) == before
    assert piece.byte_view.data_ptr() == owned.data_ptr()
    assert (parameter.stride(), window.storage_offset(), parameter.requires_grad) == ((1, 4), 6, True)
    ours = piece.storage
    assert piece.make_resizable()
    assert piece.storage is ours, "once is enough"


def test_a_tensor_that_refuses_a_new_home_leaves_all_where_they_were(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = torch.from_numpy(torch.randn(6).numpy().copy())

    class Stubborn(torch.Tensor):
        def set_(self, *_: object) -> torch.Tensor:
            raise RuntimeError("will not move")

    stubborn = owned[:3].as_subclass(Stubborn)
    storage = owned.untyped_storage()._cdata
    [piece] = managed_storages({"owned": owned, "stubborn": stubborn})
    with caplog.at_level(logging.WARNING):
        assert not piece.make_resizable()
    assert "owned, stubborn cannot be moved" in caplog.text
    assert owned.untyped_storage()._cdata == storage == stubborn.untyped_storage()._cdata
