"""Frames over a Unix socket between a manager and a worker: a pickle, and its large buffers in shared memory.

Buffers of tensors and arrays are pickled out of band (protocol 5) into one anonymous file (memfd) for each frame, whose
descriptor is sent along. The receiver maps it, so that they are copied once.
"""

from __future__ import annotations

import array
import contextlib
import functools
import importlib.util
import io
import mmap
import os
import pickle
import socket
import struct
import sys
import sysconfig
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle  # type: ignore[import-untyped]

from ..engines.answers import view_of
from ..engines.part_proxy import Part
from ..errors import NotHandedOut
from ..locks import owned_by_this_thread

if TYPE_CHECKING:
    import torch

SHARED_FROM_BYTES = 32 << 10
"""Buffers of at least this size are sent in shared memory."""

_HEADER = struct.Struct("!BQQI")
_SLOT = struct.Struct("!QQ")


class Kind(IntEnum):
    """The kinds of frames. The first are requests of the manager, the others come from the worker."""

    CALL = 1
    CANCEL = 2
    PING = 3
    ANSWER = 16
    ERROR = 17
    PROGRESS = 18
    LOG = 19
    PONG = 20


@dataclass(frozen=True)
class Frame:
    """One frame. ``call`` is the number of the call to which it belongs; `unpickled` returns its content."""

    kind: Kind
    call: int
    data: bytes
    buffers: Sequence[memoryview] = ()

    def unpickled(self, load_part: Callable[[Any], Any], installed_only: bool = False) -> Any:
        """``installed_only``: raises `NotHandedOut` for classes of modules that are neither imported nor installed."""
        return unpickled(self.data, self.buffers, load_part, installed_only)


class Packed(NamedTuple):
    """A pickle, and its large buffers."""

    data: bytes
    buffers: list[memoryview]


class Channel:
    """One end of the connection. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.RLock()

    def send(self, kind: Kind, call: int, content: Packed | None = None) -> None:
        """Sends a frame. Raises OSError if the other end has closed; MemoryError without room for the buffers."""
        data, buffers = content or (b"", [])
        fd = _in_shared_memory(buffers) if buffers else None
        try:
            slots = b"".join(_SLOT.pack(*slot) for slot in _slots(buffers))
            head = _HEADER.pack(kind, call, len(data), len(buffers)) + slots
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            with self._sending:
                try:
                    sent = self._socket.sendmsg([head], rights)
                    self._socket.sendall(head[sent:] + data)
                except BaseException:  # an interrupt: the rest of the frame is missing
                    self.close()
                    raise
        finally:
            if fd is not None:
                os.close(fd)

    @property
    def sends_here(self) -> bool:
        """Whether this thread is within `send`: a finalizer that runs in there cannot send."""
        return owned_by_this_thread(self._sending)

    def receive(self) -> Frame:
        """Waits for the next frame; raises EOFError if the other end has closed, or has died."""
        try:
            head, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
            head += self._read(_HEADER.size - len(head)) if head else b""
            if not head:
                raise EOFError
            kind, call, length, count = _HEADER.unpack(head)
            try:
                slots = [_SLOT.unpack(self._read(_SLOT.size)) for _ in range(count)]
                data = self._read(length)
                return Frame(Kind(kind), call, data, _mapped(fds[0], slots) if fds else ())
            finally:
                for fd in fds:
                    os.close(fd)
        except OSError as error:
            raise EOFError from error

    def close(self) -> None:
        """Closes this end, and ends a `receive` of another thread."""
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def packed(content: Any, save_part: Callable[[Part], Any] | None = None) -> Packed:
    """Pickles with large buffers apart; see `pickled`."""
    buffers: list[memoryview] = []
    return Packed(pickled(content, buffers, save_part), buffers)


def pickled(
    content: Any, buffers: list[memoryview] | None = None, save_part: Callable[[Part], Any] | None = None
) -> bytes:
    """Pickles; functions and classes that cannot be imported are pickled by value (cloudpickle).

    Large buffers are appended to ``buffers``. ``save_part`` replaces each `Part` by a value from which ``load_part``
    of the other side makes its own.
    """
    file = io.BytesIO()
    _Pickler(file, buffers, save_part).dump(content)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(
        self, file: io.BytesIO, buffers: list[memoryview] | None, save_part: Callable[[Part], Any] | None
    ) -> None:
        super().__init__(file, 5, buffer_callback=self._in_band)
        self._buffers = buffers
        self._save_part = save_part
        self._views: dict[Hashable, torch.Tensor] = {}

    def persistent_id(self, thing: Any) -> Any:
        return self._save_part(thing) if self._save_part is not None and isinstance(thing, Part) else None

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        if kind.__name__ == "Tensor" and kind.__module__ == "torch":
            return self._same_view(thing) or _reduced(thing)
        if kind.__name__ == "UntypedStorage" and kind.__module__ == "torch.storage":
            return _storage, (_bytes_of(thing),)
        if kind is memoryview:  # cloudpickle would send bytes
            return _memory, (pickle.PickleBuffer(thing.tobytes()), thing.format, thing.shape)
        return super().reducer_override(thing)

    def _same_view(self, tensor: torch.Tensor) -> Any:
        """Reduces an equal view of a storage to the view that was sent before, if any."""
        import torch

        if tensor.layout is not torch.strided or tensor.is_nested or tensor.requires_grad:
            return None
        first = self._views.setdefault(view_of(tensor), tensor)
        return None if first is tensor else (_detached, (first,))

    def _in_band(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if self._buffers is None or raw.nbytes < SHARED_FROM_BYTES:
            return True
        self._buffers.append(raw)
        return False


def unpickled(
    data: bytes, buffers: Sequence[memoryview], load_part: Callable[[Any], Any], installed_only: bool = False
) -> Any:
    """Loads what `pickled` has saved; see `Frame.unpickled`."""
    return _Unpickler(data, buffers, load_part, installed_only).load()


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, buffers: Sequence[memoryview], load_part: Callable[[Any], Any], installed_only: bool
    ) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._load_part = load_part
        self._installed_only = installed_only

    def persistent_load(self, saved: Any) -> Any:
        return self._load_part(saved)

    def find_class(self, module: str, name: str) -> Any:
        # An engine's own modules must not be imported by the manager: they may load models, or use the GPU.
        if self._installed_only and module not in sys.modules and not _is_installed(module.partition(".")[0]):
            raise NotHandedOut(name, module)
        return super().find_class(module, name)


@functools.cache
def _is_installed(package: str) -> bool:
    """Returns whether a package is part of Python or installed, or this one."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    origin = spec.origin or ""
    return (
        package == __name__.partition(".")[0] or origin in ("built-in", "frozen") or origin.startswith(tuple(folders))
    )


def _reduced(tensor: torch.Tensor) -> Any:
    """Reduces a tensor to its bytes; one on a GPU to a copy in main memory, since the receiver may not use the GPU."""
    import torch

    if tensor.is_cuda:
        tensor = tensor.detach().cpu()
    simple = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.requires_grad
    if not simple or tensor.is_quantized or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]
    flat = tensor.detach().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else bytearray()
    return _tensor, (pickle.PickleBuffer(raw), tensor.dtype, tuple(tensor.shape))


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    if memoryview(raw).readonly:  # small ones are part of the pickle
        raw = bytearray(raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storage(content: torch.Tensor) -> torch.UntypedStorage:
    return content.untyped_storage()


def _memory(raw: Any, code: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(bytearray(raw))
    return view if code == "B" and len(shape) == 1 else view.cast(code, shape)  # type: ignore[call-overload]


_ALIGNED = 64


def _slots(buffers: Sequence[memoryview]) -> list[tuple[int, int]]:
    """Returns offset and length of each buffer in the shared memory."""
    slots, offset = [], 0
    for buffer in buffers:
        slots.append((offset, buffer.nbytes))
        offset += -(-buffer.nbytes // _ALIGNED) * _ALIGNED
    return slots


def _in_shared_memory(buffers: Sequence[memoryview]) -> int:
    fd = -1
    try:
        fd = os.memfd_create("gpu-worker", os.MFD_CLOEXEC)
        for (offset, _), buffer in zip(_slots(buffers), buffers, strict=True):
            written = 0
            while written < buffer.nbytes:  # one call writes 2 GB at most
                written += os.pwrite(fd, buffer[written:], offset + written)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            raise MemoryError(
                f"no shared memory for {sum(each.nbytes for each in buffers):,} bytes: {error}"
            ) from error
        raise
    return fd


def _mapped(fd: int, slots: Sequence[tuple[int, int]]) -> list[memoryview]:
    shared = memoryview(mmap.mmap(fd, 0))
    return [shared[offset : offset + length] for offset, length in slots]
