"""Full, maybe lost, or neither: what the sentences of torch, CUDA and ONNX Runtime mean."""

from __future__ import annotations

import weakref

import pytest

from residency.errors import CaptureUnderWay, DeviceLost, DeviceOutOfMemory
from residency.observability.error_classification import (
    empty_frames,
    is_capture_under_way,
    is_out_of_device_memory,
    loss_beyond_repair,
    may_be_device_loss,
    shortfall_bytes,
)


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
    RuntimeError("CUDA driver error: out of memory"),
]
#: What a full device says, and a device that is gone as well.
FULL_OR_LOST = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; GPU=0"),
]
CAPTURE = [
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    AcceleratorError("CUDA error: operation would make the legacy stream depend on a capturing blocking stream: "
                     "cudaErrorStreamCaptureImplicit"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 900: operation not permitted ; GPU=0"),
    CaptureUnderWay("card"),
]  # fmt: skip
MAYBE_LOST = [
    RuntimeError("CUDA error: invalid device ordinal"),
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("CUDA driver error: unknown error"),
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
        assert not may_be_device_loss(found)


@pytest.mark.parametrize("error", FULL_OR_LOST, ids=str)
def test_a_library_that_gets_no_handle_means_a_full_device_unless_that_is_gone(error: BaseException) -> None:
    for found in (error, raised(error, "from"), raised(error, "while handling")):
        assert is_out_of_device_memory(found)
        assert may_be_device_loss(found)


@pytest.mark.parametrize("error", CAPTURE, ids=str)
def test_a_capture_that_forbids_a_call_is_told_from_all_else(error: BaseException) -> None:
    for found in (error, raised(error, "from"), raised(error, "while handling")):
        assert is_capture_under_way(found)
        assert not is_out_of_device_memory(found)
    for other in (*FULL, *MAYBE_LOST, *NEITHER):
        assert not is_capture_under_way(other)


@pytest.mark.parametrize("error", MAYBE_LOST, ids=str)
def test_an_error_of_cuda_is_a_reason_to_ask_the_device_and_says_nothing_of_its_memory(error: BaseException) -> None:
    for found in (error, raised(error, "from"), raised(error, "while handling")):
        assert may_be_device_loss(found)
        assert not is_out_of_device_memory(found)
        assert loss_beyond_repair(found) is (error if isinstance(error, DeviceLost) else None)


def test_onnx_runtime_has_errors_of_its_own_kind() -> None:
    kind = pytest.importorskip("onnxruntime").capi.onnxruntime_pybind11_state.Fail
    assert may_be_device_loss(kind("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access"))
    assert not may_be_device_loss(kind("[ONNXRuntimeError] : 1 : FAIL : no such input"))
    full = kind("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0")
    assert is_out_of_device_memory(full)
    assert not may_be_device_loss(full)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_all_else_is_neither(error: BaseException | None) -> None:
    assert not may_be_device_loss(error)
    assert not is_out_of_device_memory(error)


def test_what_was_put_aside_counts_no_more() -> None:
    assert not is_out_of_device_memory(raised(FULL[0], "from None"))


def test_what_is_lacking_is_found_wherever_it_is_said() -> None:
    assert shortfall_bytes(raised(DeviceOutOfMemory(10, 4, "card"), "while handling")) == 6
    assert shortfall_bytes(RuntimeError("CUDA out of memory")) == 1
    assert shortfall_bytes(DeviceOutOfMemory(10, None, "card")) == 1


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
