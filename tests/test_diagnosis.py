"""Full, lost or neither: what the sentences of torch, CUDA and ONNX Runtime mean."""

from __future__ import annotations

import weakref

import pytest

from residency.diagnosis import empty_frames, is_device_lost, is_out_of_device_memory, lacking_bytes, loss_beyond_repair
from residency.errors import DeviceLost, DeviceOutOfMemory


class AcceleratorError(RuntimeError):
    """As torch calls it since 2.9."""


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


FULL = [
    DeviceOutOfMemory(10, 5, "card"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"),
    RuntimeError("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED"),
]
LOST = [
    RuntimeError("CUDA error: device-side assert triggered"),
    AcceleratorError("an illegal memory access was encountered"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0"),
    RuntimeError("CUDA failure 214: uncorrectable ECC error encountered"),
    DeviceLost("unspecified launch failure"),
]
NEITHER = [ValueError("no such voice"), OSError("CUDA error"), MemoryError(), None]


def raised(error: BaseException, how: str) -> BaseException:
    """Another error that somebody raised because of this one."""
    try:
        try:
            raise error
        except BaseException as cause:
            if how == "from":
                raise KeyError("the engine") from cause
            if how == "from None":
                raise KeyError("the engine") from None
            raise KeyError("the engine")  # noqa: B904 - that is the case
    except KeyError as other:
        return other


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_device_is_full_and_not_lost(error: BaseException) -> None:
    for found in (error, raised(error, "from"), raised(error, "while handling")):
        assert is_out_of_device_memory(found)
        assert not is_device_lost(found)


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_device_is_lost_and_not_full(error: BaseException) -> None:
    for found in (error, raised(error, "from"), raised(error, "while handling")):
        assert is_device_lost(found)
        assert not is_out_of_device_memory(found)
        assert loss_beyond_repair(found) is (error if isinstance(error, DeviceLost) else None)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_all_else_is_neither(error: BaseException | None) -> None:
    assert not is_device_lost(error)
    assert not is_out_of_device_memory(error)


def test_what_was_put_aside_counts_no_more() -> None:
    assert not is_out_of_device_memory(raised(FULL[0], "from None"))


def test_what_is_lacking_is_found_wherever_it_is_said() -> None:
    assert lacking_bytes(raised(DeviceOutOfMemory(10, 4, "card"), "while handling")) == 6
    assert lacking_bytes(RuntimeError("CUDA out of memory")) == 1
    assert lacking_bytes(DeviceOutOfMemory(10, None, "card")) == 1


@pytest.mark.parametrize("how", ["from", "from None", "while handling"])
def test_no_frame_of_any_of_them_holds_what_it_has_made(how: str) -> None:
    class Weights:
        pass

    def build() -> None:
        weights = Weights()
        seen.append(weakref.ref(weights))
        raise OSError("the second half is missing")

    seen: list[weakref.ref[Weights]] = []
    try:
        build()
    except OSError as error:
        other = raised(error, how)
    empty_frames(other)
    assert seen[0]() is None
