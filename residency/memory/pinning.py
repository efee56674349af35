"""Pins a mirror once, in the background: locking pages is slow, and copies from locked pages are fast."""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref

from ..contracts import Device
from .mirror import HostMirror

#: A thread that is still inside torch when the interpreter ends would end the process with an error.
_running: weakref.WeakSet[BackgroundPinning] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for pinning in list(_running):
        pinning.stop()
        pinning.join()


class BackgroundPinning:
    """Pins group after group until done, stopped, or refused (then the rest stays pageable, only slower).

    ``moving`` is held while a group is pinned, and by whoever moves the mirror's bytes: a move waits for one group
    at most, and no page is locked under a copy. A mirror that nobody else has any more is not kept for it.
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
        """Pin no further group. Who holds ``moving`` knows that none is being pinned now."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until the thread has ended; not for those who hold ``moving``."""
        if self._thread.ident is not None:  # else it ends as soon as it begins
            self._thread.join()

    def _run(self) -> None:
        for number in itertools.count():
            with self._moving:
                if self._stopped.is_set() or not self._pin(number):
                    return

    def _pin(self, number: int) -> bool:
        """Pin a group, if there is a mirror, such a group, and leave to."""
        mirror = self._mirror()
        groups = mirror.groups() if mirror is not None else []
        return mirror is not None and number < len(groups) and mirror.pin(groups[number], self._device)
