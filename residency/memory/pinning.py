"""Pins a mirror once, in the background: locking pages is slow, and makes copies fast."""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref

from ..contracts import Device
from .mirror import HostMirror

#: Joined at exit: a thread inside torch at the interpreter's end would end the process with an error.
_running: weakref.WeakSet[BackgroundPinning] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for pinning in list(_running):
        pinning.stop()
        pinning.join()


class BackgroundPinning:
    """A thread that pins group after group until done, stopped, or refused (the rest stays pageable, only slower).

    ``moving`` is locked while a group is pinned, and during moves of the mirror's bytes: a move waits for one group at
    most, and no page is locked during a copy. Does not keep the mirror alive.
    """

    def __init__(self, mirror: HostMirror, device: Device, moving: threading.Lock) -> None:
        self._mirror = weakref.ref(mirror)
        self._device = device
        self._moving = moving
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-pinning", daemon=True)
        _running.add(self)
        self._thread.start()

    def stop(self) -> None:
        """Stops before the next group. If the caller holds ``moving``, none is being pinned."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the thread's end. Never call with ``moving`` held."""
        if self._thread.ident is not None:  # otherwise it is not running yet
            self._thread.join()

    def _run(self) -> None:
        for number in itertools.count():
            with self._moving:
                if self._stopped.is_set() or not self._pin(number):
                    return

    def _pin(self, number: int) -> bool:
        """Pins a group; returns False if there is no mirror or no such group, or if that is refused."""
        mirror = self._mirror()
        groups = mirror.groups() if mirror is not None else []
        return mirror is not None and number < len(groups) and mirror.pin(groups[number], self._device)
