"""Several residents that move as one, all or nothing."""

from __future__ import annotations

from collections.abc import Callable

from ..contracts import Resident, SnapshotStore


class CompositeResident:
    """Residents that are restored in order and offloaded in reverse; if one fails, the moved ones are moved back."""

    def __init__(self, *parts: Resident) -> None:
        self.parts = parts

    @classmethod
    def build(cls, *factories: Callable[[], Resident]) -> CompositeResident:
        """Builds the parts in order; on an error, releases those already built."""
        parts: list[Resident] = []
        try:
            for factory in factories:
                parts.append(factory())
        except BaseException:
            for part in parts:
                part.release()
            raise
        return cls(*parts)

    @property
    def device_bytes(self) -> int:
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        return sum(part.host_bytes for part in self.parts)

    @property
    def array_bytes(self) -> int:
        """The sum over the parts that report it; see `EngineResident.array_bytes`."""
        return sum(getattr(part, "array_bytes", 0) for part in self.parts)

    @property
    def usable(self) -> bool:
        """False if a part has failed so that only a new engine can serve requests; see `SelfMovingPart.usable`."""
        return all(getattr(part, "usable", True) for part in self.parts)

    def restore(self) -> int:
        return self._all_or_nothing(self.parts, _restore, _offload, undo_failed=True)

    def offload(self) -> int:
        return self._all_or_nothing(self.parts[::-1], _offload, _restore, undo_failed=True)

    def release(self) -> int:
        return sum(part.release() for part in self.parts)

    def save(self, store: SnapshotStore, name: str) -> int:
        def save(part: Resident) -> int:
            return part.save(store, name)

        def load(part: Resident) -> int:
            return part.load(store, name)

        return self._all_or_nothing(self.parts, save, load)

    def load(self, store: SnapshotStore, name: str) -> int:
        try:
            return sum(part.load(store, name) for part in self.parts)
        except BaseException:
            self.release()
            raise

    @staticmethod
    def _all_or_nothing(
        parts: tuple[Resident, ...],
        move: Callable[[Resident], int],
        undo: Callable[[Resident], int],
        undo_failed: bool = False,
    ) -> int:
        """Undoes all moves if one fails.

        ``undo_failed``: also that of the failed part, which may have moved; only for an ``undo`` without effect
        otherwise.
        """
        moved_bytes = 0
        for index, part in enumerate(parts):
            try:
                moved_bytes += move(part)
            except BaseException:
                for moved in reversed(parts[: index + undo_failed]):
                    undo(moved)
                raise
        return moved_bytes


def _restore(part: Resident) -> int:
    return part.restore()


def _offload(part: Resident) -> int:
    return part.offload()
