"""The registered models by name; refuses requests once closed, in a forked child and at the interpreter's end."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable

from ..clock import SystemClock
from ..errors import ManagerClosed, ModelExists, UnknownModel
from .dispatcher import Dispatcher
from .managed_model import ManagedModel

EXIT_WITHIN_S = 5.0
"""Maximum wait for moves at the interpreter's end, when no thread of this package may be inside native code."""


class Registry:
    """The registered models. ``closed``: refuses requests and models. Methods that end in ``_locked`` need the lock."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._parents_models: dict[str, ManagedModel] = {}
        self.closed = False
        _registries.add(self)

    def check_open_locked(self, managed: ManagedModel) -> None:
        """Raises `UnknownModel` if the model is being unregistered, `ManagerClosed` if closed."""
        if self.closed:
            raise ManagerClosed
        if managed.wishes.retiring:
            raise UnknownModel(managed.name, tuple(self._dispatcher.managed_models))

    def check_free(self, name: str) -> None:
        """Raises `ModelExists` if the name is taken, `ManagerClosed` if closed."""
        if self.closed:
            raise ManagerClosed
        if name in self._dispatcher.managed_models:
            raise ModelExists(name)

    def add(self, managed: ManagedModel) -> None:
        """Registers a model; offloads its borrowed part."""
        part = managed.borrowed_part
        try:
            if part is not None:
                part.offload()
                managed.memory.host_bytes = part.host_bytes
            with self._dispatcher.lock:
                self.check_free(managed.name)
                self._dispatcher.managed_models[managed.name] = managed
        except BaseException:
            if part is not None:
                part.hand_back()
            raise

    def remove(self, managed: ManagedModel) -> None:
        with self._dispatcher.lock:
            if self._dispatcher.managed_models.get(managed.name) is managed:
                del self._dispatcher.managed_models[managed.name]

    def named(self, name: str | None) -> list[ManagedModel]:
        """Returns the model of that name (None: all, in order of registration); raises `UnknownModel`."""
        with self._dispatcher.lock:
            managed_models = self._dispatcher.managed_models
            if name is None:
                return list(managed_models.values())
            if name not in managed_models:
                raise ManagerClosed if self._parents_models else UnknownModel(name, tuple(managed_models))
            return [managed_models[name]]

    def for_each(self, name: str | None, act: Callable[[ManagedModel], bool]) -> bool:
        """Calls ``act`` for every model, then raises the first error. Returns whether all results are true."""
        answers, errors = [], []
        for managed in self.named(name):
            try:
                answers.append(act(managed))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return all(answers)

    def reset_in_child(self) -> None:
        """In a forked child: the models belong to the parent, and are kept from collection here."""
        self.closed = True
        self._parents_models = self._dispatcher.reset_in_child()

    def wind_up(self, within_s: float = EXIT_WITHIN_S) -> None:
        """At the interpreter's end: refuses requests and waits for moves, which may be inside native code."""
        self.closed = True
        clock = SystemClock()
        until_s = clock.now() + within_s
        for managed in self.named(None):
            self._dispatcher.watch(managed, managed.is_settled, until_s - clock.now(), clock)
        self._dispatcher.monitor.stop()


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()


def _forked() -> None:
    for registry in list(_registries):
        registry.reset_in_child()
    _registries.clear()


@atexit.register
def _exiting() -> None:
    for registry in list(_registries):
        registry.wind_up()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
