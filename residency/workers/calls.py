"""What a manager asks a worker, and the answers. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..contracts import Device
from ..engines.part_proxy import Path
from ..memory.self_moving import OwnMoves
from ..random_state import RandomState
from .torch_settings import CallSettings

MARK = "RESIDENCY_FORK_SERVER"
"""Environment variable of workers and of what they start, so that it can be found after the end of the server."""


@dataclass
class Ask:
    """A call. ``random``: the manager's random states, if others than the worker knows. ``settings``: its caller's.

    ``forgotten``: numbers of objects and streams of the worker that the manager has dropped.
    """

    random: RandomState | None = field(default=None, kw_only=True)
    settings: CallSettings | None = field(default=None, kw_only=True)
    forgotten: list[int] = field(default_factory=list, kw_only=True)
    #: Whether the engine computes, so that random states may change.
    draws = False
    #: Whether progress is reported.
    moves = False


@dataclass
class Setup(Ask):
    """The process state that an engine may depend on."""

    environ: dict[str, str]
    folder: str
    path: list[str]
    argv: list[str]
    log_levels: dict[str, int]
    own_moves: dict[str, OwnMoves]
    torch: tuple[Any, ...] | None


@dataclass
class Load(Ask):
    """Builds the engine; see `GPUResourceManager.register`."""

    name: str
    load: Callable[[], Any]
    device: Device
    skip: tuple[str, ...]
    random_state: RandomState | None
    moves = True


@dataclass
class Move(Ask):
    """Calls ``offload``, ``restore`` or ``release`` of the resident."""

    name: str
    moves = True


@dataclass
class Read(Ask):
    """Reads the value at a path."""

    path: Path
    draws = True


@dataclass
class Use(Ask):
    """Calls a function with the object at a path."""

    path: Path
    use: Callable[[Any], Any]
    draws = True


@dataclass
class Call(Ask):
    """Calls the object at a path."""

    path: Path
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    streams: bool
    draws = True


@dataclass
class NextItem(Ask):
    """Gets the next item of a stream, or closes it. Answered by the item or `END`."""

    stream: int
    close: bool = False
    draws = True


@dataclass
class SetValue(Ask):
    """Sets an attribute of the object at a path."""

    path: Path
    name: str
    value: Any


@dataclass(frozen=True)
class Stream:
    """The answer of a call that has returned a generator: its number, for `NextItem`."""

    number: int


@dataclass(frozen=True)
class End:
    """The answer of `NextItem` after the last item, and after a close."""


END = End()


@dataclass(frozen=True)
class Sizes:
    """Properties of the resident in the worker; see `EngineResident`."""

    device_bytes: int = 0
    host_bytes: int = 0
    array_bytes: int = 0
    usable: bool = True
    moves_itself: bool = False
    #: Modules that the worker has imported since its fork.
    modules: int = 0


@dataclass
class Answer:
    """What the frames `ANSWER` and `ERROR` contain.

    ``content``: the pickle of the value, or of an `ErrorRecord`. ``random``: random states after the call, if it has
    drawn numbers. ``lost``: the process cannot use the device any more.
    """

    content: bytes
    sizes: Sizes
    random: RandomState | None = None
    lost: bool = False
