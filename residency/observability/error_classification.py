"""Classifies errors: a full device, a possible loss of the device, or a CUDA graph capture.

Messages do not show whether a device is lost: those of harmless CUDA errors, such as "invalid argument", do not differ
from others, such as "illegal memory access". They only show whether to test the device (`Device.is_usable`).
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from ..contracts import Device
from ..errors import CaptureUnderWay, DeviceLost, DeviceOutOfMemory, ResidencyError
from ..memory_errors import RemoteFrames
from ..sentences import Sentence

_NO_HANDLE = r"CU(BLAS|DNN)_STATUS_NOT_INITIALIZED"
"""Raised by cuBLAS and cuDNN if there is no room for their handles, or if the device is lost."""


def in_words(error: BaseException) -> Sentence:
    """Returns type and message of an error, or only the type if its ``str`` fails.

    For this project's errors, the halves ``en`` and ``zh`` are without the type.
    """
    try:
        whole = f"{type(error).__name__}: {error}"
    except Exception:
        whole = type(error).__name__
    return Sentence(error.en, error.zh, whole) if isinstance(error, ResidencyError) else Sentence.of(whole)


def message_of(error: BaseException) -> Sentence:
    """Returns an error's message without its type; for errors without a message, such as MemoryError(), the type.

    The same in both languages for errors of other libraries.
    """
    if isinstance(error, ResidencyError):
        return Sentence(error.en, error.zh)
    return Sentence.of(str(error) or type(error).__name__)


def is_out_of_device_memory(error: BaseException | None) -> bool:
    """Returns whether an error or its causes mean a full device: for errors of this project, torch and ONNX Runtime."""
    return any(map(says_full, all_of(error)))


def may_be_device_loss(error: BaseException | None) -> bool:
    """Returns whether an error or its causes come from CUDA, so that the device must be tested.

    CUDA reports a failed kernel at every later call of the process, but an invalid call once. torch raises
    AcceleratorError (before 2.9, a RuntimeError that begins with "CUDA error"), ONNX Runtime "CUDA failure" with the
    number of the error.
    """
    return any(map(_comes_from_cuda, all_of(error)))


def is_capture_under_way(error: BaseException | None) -> bool:
    """Returns whether a CUDA graph capture, which is temporary, caused an error."""
    signs = r"stream is capturing|StreamCapture(Unsupported|Implicit)|CUDA failure 90[06]\b|captures_underway"
    return any(isinstance(one, CaptureUnderWay) or re.search(signs, in_words(one)) for one in all_of(error))


def loss_beyond_repair(error: BaseException | None) -> DeviceLost | None:
    """Returns the `DeviceLost` in an error or its causes, or None."""
    return next((found for found in all_of(error) if isinstance(found, DeviceLost)), None)


def shortfall_bytes(error: BaseException | None) -> int:
    """Returns the shortfall in bytes of an out-of-memory error; at least 1, since free memory may be fragmented."""
    found = next((found for found in all_of(error) if isinstance(found, DeviceOutOfMemory)), None)
    if found is None or found.free_bytes is None:
        return 1
    return max(1, found.needed_bytes - found.free_bytes)


def empty_frames(error: BaseException | None) -> None:
    """Clears the locals of an error's frames, such as a half-built model; keeps line numbers."""
    for found in all_of(error, hidden=True):
        traceback.clear_frames(found.__traceback__)


def says_full(error: BaseException) -> bool:
    """Returns whether this error itself, not its causes, means a full device."""
    # cudaErrorMemoryAllocation (2) is not sticky: the next call may succeed.
    signs = rf"CUDA out of memory|CUDA (driver )?error: out of memory|CUDA failure 2\b|ALLOC_FAILED|{_NO_HANDLE}"
    named = isinstance(error, DeviceOutOfMemory) or type(error).__name__ == "OutOfMemoryError"
    return named or re.search(signs, in_words(error)) is not None


def _comes_from_cuda(error: BaseException) -> bool:
    words = in_words(error)
    named = type(error).__name__ == "AcceleratorError" or re.search("CUDA (driver )?error|CUDA failure", words)
    # ONNX Runtime's errors are not RuntimeErrors.
    if not (isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")):
        return isinstance(error, DeviceLost)
    return re.search(_NO_HANDLE, words) is not None or (bool(named) and not says_full(error))


def all_of(error: BaseException | None, hidden: bool = False) -> Iterator[BaseException]:
    """Yields an error and its causes; ``hidden``: also those suppressed by ``raise ... from None``.

    Without `RemoteFrames`, whose text quotes source lines.
    """
    todo, seen = [error], set[int]()
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen or isinstance(found, RemoteFrames):
            continue
        seen.add(id(found))
        yield found
        if hidden or not found.__suppress_context__:
            todo.append(found.__context__)
        todo += [found.__cause__, *getattr(found, "exceptions", ())]


def device_is_lost(error: BaseException | None, device: Device) -> bool:
    """Returns whether the device has failed: by the error or, if that suggests it, by a test of some seconds."""
    if error is None:
        return False
    return loss_beyond_repair(error) is not None or (may_be_device_loss(error) and not device.is_usable())
