"""What an error says of the device: that it is full, that it may be gone, or that a capture is in the way.

Words do not tell whether a device is gone: CUDA says "invalid argument" and "illegal memory access" in the same way.
They tell whether it is worth asking the device (`Device.is_usable`).
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from ..contracts import Device
from ..errors import CaptureUnderWay, DeviceLost, DeviceOutOfMemory, ResidencyError
from ..sentences import Sentence

_NO_HANDLE = r"CU(BLAS|DNN)_STATUS_NOT_INITIALIZED"


def in_words(error: BaseException) -> Sentence:
    """Kind and message of any error, also of one whose own words fail.

    Its halves are those of the message where the error is one of ours, which says enough without its kind.
    """
    try:
        whole = f"{type(error).__name__}: {error}"
    except Exception:
        whole = type(error).__name__
    return Sentence(error.en, error.zh, whole) if isinstance(error, ResidencyError) else Sentence.of(whole)


def message_of(error: BaseException) -> Sentence:
    """Returns an error's message without its kind; errors of other libraries are the same in both languages."""
    return Sentence(error.en, error.zh) if isinstance(error, ResidencyError) else Sentence.of(str(error))


def is_out_of_device_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that the device has no memory: ours, torch's or ONNX Runtime's."""
    return any(map(_says_full, all_of(error)))


def may_be_device_loss(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, comes from CUDA and is a reason to ask the device whether it is usable.

    CUDA reports a failed kernel to every later call of the process, and a harmless mistake once. torch raises
    AcceleratorError (a RuntimeError that begins with "CUDA error" before 2.9), ONNX Runtime "CUDA failure" with the
    number of the error.
    """
    return any(map(_comes_from_cuda, all_of(error)))


def is_capture_under_way(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that a capture of CUDA graphs forbade a call: later it will pass."""
    signs = r"stream is capturing|StreamCapture(Unsupported|Implicit)|CUDA failure 90[06]\b|captures_underway"
    return any(isinstance(one, CaptureUnderWay) or re.search(signs, in_words(one)) for one in all_of(error))


def loss_beyond_repair(error: BaseException | None) -> DeviceLost | None:
    """The error that says that the device answers nothing to this process any more, if that was found out."""
    return next((found for found in all_of(error) if isinstance(found, DeviceLost)), None)


def lacking_bytes(error: BaseException | None) -> int:
    """Shortfall in bytes, from the out-of-memory error; at least 1, since fragmented free memory may be of no use."""
    found = next((found for found in all_of(error) if isinstance(found, DeviceOutOfMemory)), None)
    if found is None or found.free_bytes is None:
        return 1
    return max(1, found.needed_bytes - found.free_bytes)


def empty_frames(error: BaseException | None) -> None:
    """Let go of what an error's frames hold, such as the half of a model that was made before it; lines stay."""
    for found in all_of(error, hidden=True):
        traceback.clear_frames(found.__traceback__)


def _says_full(error: BaseException) -> bool:
    # An error of cudaErrorMemoryAllocation, whose number is 2, breaks nothing: the next call may succeed.
    signs = r"CUDA out of memory|CUDA (driver )?error: out of memory|CUDA failure 2\b|ALLOC_FAILED"
    # cuBLAS and cuDNN say so when there is no room for their handles, or when the device is gone.
    signs += f"|{_NO_HANDLE}"
    named = isinstance(error, DeviceOutOfMemory) or type(error).__name__ == "OutOfMemoryError"
    return named or re.search(signs, in_words(error)) is not None


def _comes_from_cuda(error: BaseException) -> bool:
    words = in_words(error)
    named = type(error).__name__ == "AcceleratorError" or re.search("CUDA (driver )?error|CUDA failure", words)
    # ONNX Runtime's errors are no RuntimeErrors.
    if not (isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")):
        return isinstance(error, DeviceLost)
    return re.search(_NO_HANDLE, words) is not None or (bool(named) and not _says_full(error))


def all_of(error: BaseException | None, hidden: bool = False) -> Iterator[BaseException]:
    """An error, and those that led to it; ``hidden``: also those that ``raise ... from None`` has put aside."""
    todo, seen = [error], set[int]()
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if hidden or not found.__suppress_context__:
            todo.append(found.__context__)
        todo += [found.__cause__, *getattr(found, "exceptions", ())]


def device_is_lost(error: BaseException | None, device: Device) -> bool:
    """Whether the device has failed, according to the error or, if that suggests it, to the device. Takes seconds."""
    if error is None:
        return False
    return loss_beyond_repair(error) is not None or (may_be_device_loss(error) and not device.is_usable())
