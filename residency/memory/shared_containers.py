"""Finds containers of an engine with references from outside: a module's dictionary, the tuple kept by an `lru_cache`.

Such a holder refers to no tensor directly, but uses them after the engine's release.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import itertools
import types
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from .holders import reference_counts
from .object_kinds import ObjectKind, kind_of
from .object_paths import children

_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque, types.MappingProxyType)
_CACHE = type(functools.lru_cache(id))
#: Objects per batch; other threads run between batches.
_BATCH = 2048


def in_held_containers(entered: list[Any], tensors: list[Any], engine: int) -> frozenset[int]:
    """Returns the tensors (``id``) reachable through a container with references from outside the engine.

    Only paths through nothing but containers count. An instance held outside does not count: a loader may keep
    references to modules, but that is no cache.

    Args:
        entered: all objects entered by a walk, each once, without tensors. The caller has no other reference to any of
            them.
        tensors: all tensors that were found.
        engine: the engine (``id``), to which the loader's caller refers.
    """
    classes = {cls for cls in set(map(type, entered)) if issubclass(cls, _CONTAINERS)}
    containers = _of_classes(entered, classes)
    [ours] = reference_counts([object()])
    ours += 1  # the list ``entered``
    counts = {
        id(container): count - ours
        for container, count in zip(containers, reference_counts(containers), strict=True)
        # One is the reference by which the walk reached it.
        if count > ours + 1 and id(container) != engine
    }
    by_id = dict(zip(map(id, containers), containers, strict=True))
    wanted = frozenset(map(id, tensors))
    if not _reached_from(counts, by_id, wanted):
        return frozenset()
    inside = _references_inside(itertools.chain(_batches(entered), _batches(tensors)), counts.keys())
    return _reached_from([key for key, count in counts.items() if count > inside[key]], by_id, wanted)


def _of_classes(things: list[Any], classes: Collection[type]) -> list[Any]:
    return list(itertools.compress(things, map(classes.__contains__, map(type, things))))


def _reached_from(keys: Iterable[int], containers: dict[int, Any], wanted: frozenset[int]) -> frozenset[int]:
    """Returns those of ``wanted`` (``id``) to which these containers lead, directly or through further ones."""
    new = set(keys)
    seen: set[int] = set()
    while new - seen:
        todo = [containers[key] for key in new - seen if key in containers]
        seen |= new
        new = set(map(id, gc.get_referents(*todo)))
    return wanted & seen


def _batches(things: list[Any]) -> Iterable[list[Any]]:
    return (things[start : start + _BATCH] for start in range(0, len(things), _BATCH))


def _references_inside(batches: Iterable[list[Any]], wanted: AbstractSet[int]) -> collections.Counter[int]:
    """Counts the references of these objects to each of ``wanted`` (``id``)."""
    kinds: dict[type, ObjectKind] = {}
    inside: collections.Counter[int] = collections.Counter()
    for batch in batches:
        for cls in set(map(type, batch)) - kinds.keys():
            kinds[cls] = kind_of(cls)
        by_name = [thing for thing in batch if kinds[type(thing)] is ObjectKind.BY_NAME]
        others = [thing for thing in batch if kinds[type(thing)] is not ObjectKind.BY_NAME] if by_name else batch
        inside.update(_among(gc.get_referents(*others), wanted))
        for thing in by_name:
            named: collections.Counter[int] = collections.Counter()
            with contextlib.suppress(Exception):  # logged by the walk
                named.update(_among((child for _, _, child in children(thing)), wanted))
            # The collector sees through iterators. Not for a cache, whose results do not belong to the engine.
            seen = () if type(thing) is _CACHE else gc.get_referents(thing)
            inside += named | collections.Counter(_among(seen, wanted))
    return inside


def _among(things: Iterable[Any], wanted: AbstractSet[int]) -> Iterable[int]:
    return filter(wanted.__contains__, map(id, things))
