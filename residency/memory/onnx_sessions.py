"""ONNX Runtime sessions, destroyed on offload and rebuilt on restore.

Only destruction frees the memory of a session. The engine's Python object stays the same; its native session is
replaced, as ``InferenceSession.set_providers`` does, from the model's path or bytes, its options and its providers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contracts import Device
from ..errors import SnapshotUnusable
from ..progress import current
from ..sentences import Sentence
from .snapshot import SnapshotFolder

#: Attributes that refer to the native session, which is destroyed with the last of these references.
_NATIVE = {
    "_sess", "_sess_options", "_inputs_meta", "_outputs_meta", "_overridable_initializers", "_input_meminfos",
    "_output_meminfos", "_input_epdevices", "_model_meta",
}  # fmt: skip


class OnnxSessions:
    """The sessions of one engine. ONNX Runtime does not report a session's size; the model's size is the estimate.

    Sessions without device memory stay alive until `release` or `save`, as do those that were made from neither a path
    nor bytes: these cannot be rebuilt.
    """

    def __init__(self, sessions: Mapping[str, Any], device: Device) -> None:
        """Charges the device for ``sessions`` (by path); raises `DeviceOutOfMemory` if it is full."""
        self._device = device
        recipes = [_Recipe.of(session) for session in sessions.values()]
        self._movable = [one for one in recipes if one.is_rebuildable and device.holds_session(one.providers)]
        self._others = [recipe for recipe in recipes if recipe not in self._movable]
        self._alive = True
        device.charge(self._movable_bytes)

    @property
    def sessions(self) -> frozenset[int]:
        """The sessions accounted for here (``id``)."""
        return frozenset(id(recipe.session) for recipe in (*self._movable, *self._others))

    @property
    def _movable_bytes(self) -> int:
        return sum(recipe.nbytes for recipe in self._movable)

    @property
    def device_bytes(self) -> int:
        return self._movable_bytes if self._alive else 0

    @property
    def host_bytes(self) -> int:
        # A destroyed session needs no memory, except for model bytes kept in Python.
        others = sum(recipe.nbytes for recipe in self._others if recipe.session._sess is not None)
        return others + sum(len(recipe.session._model_bytes or b"") for recipe in self._movable)

    def offload(self) -> int:
        if not self._alive:
            return 0
        for recipe in self._movable:
            recipe.check()
        for recipe in self._movable:
            recipe.destroy()
        self._device.refund(self._movable_bytes)
        self._alive = False
        return self._movable_bytes

    def restore(self) -> int:
        if self._alive:
            return 0
        self._device.charge(self._movable_bytes)
        progress = current()
        if self._movable:
            progress.enter("sessions", self._movable_bytes)
        rebuilt: list[_Recipe] = []
        try:
            for recipe in self._movable:
                recipe.rebuild()
                rebuilt.append(recipe)
                progress.advance(recipe.nbytes)
        except BaseException:
            for recipe in rebuilt:
                recipe.destroy()
            self._device.refund(self._movable_bytes)
            raise
        self._alive = True
        return self._movable_bytes

    def release(self) -> int:
        freed_bytes = self.device_bytes + self.host_bytes
        for recipe in (*self._movable, *self._others):
            recipe.destroy()
        self.end_management()
        return freed_bytes

    def end_management(self) -> None:
        """Refunds the device; the sessions stay as they are."""
        self._device.refund(self.device_bytes)
        self._movable, self._others, self._alive = [], [], False

    def save(self, store: SnapshotFolder, name: str) -> int:
        """Destroys the sessions and writes nothing: `load` and `restore` rebuild them from their models."""
        freed_bytes = self.device_bytes + self.host_bytes
        if not all(recipe.is_rebuildable for recipe in self._others):
            raise SnapshotUnusable(
                name, Sentence("one of its ONNX sessions cannot be built again", "其中一个 ONNX 会话无法重新创建")
            )
        self.offload()
        for recipe in self._others:
            recipe.destroy()
        return freed_bytes

    def load(self, store: SnapshotFolder, name: str) -> int:
        for recipe in self._others:
            recipe.rebuild()
        return sum(recipe.nbytes for recipe in self._others)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """The data to rebuild a session."""

    session: Any
    providers: list[str]
    provider_options: list[dict[str, str]]
    nbytes: int
    is_rebuildable: bool

    @classmethod
    def of(cls, session: Any) -> _Recipe:
        path, content = session._model_path, session._model_bytes
        if path:
            session._model_path = path = os.path.abspath(path)  # the working directory may change
        options = {name: dict(values) for name, values in session.get_provider_options().items()}
        if "CUDAExecutionProvider" in options:  # CUDA's arena grows by requested sizes instead of powers of two
            options["CUDAExecutionProvider"]["arena_extend_strategy"] = "kSameAsRequested"
        providers = session.get_providers()
        nbytes = os.path.getsize(path) if path else len(content or b"")
        return cls(session, providers, [options[name] for name in providers], nbytes, bool(path or content))

    def check(self) -> None:
        """Raises FileNotFoundError if the session could not be rebuilt."""
        path = self.session._model_path
        if path and not os.path.isfile(path):
            raise FileNotFoundError(
                Sentence(
                    f"{path} is missing: its ONNX session cannot be rebuilt, and stays on the device",
                    f"{path} 已不存在：无法重建其 ONNX 会话，该会话将留在设备上",
                )
            )

    def destroy(self) -> None:
        for name in _NATIVE & vars(self.session).keys():
            setattr(self.session, name, None)

    def rebuild(self) -> None:
        self.session.set_providers(self.providers, self.provider_options)
