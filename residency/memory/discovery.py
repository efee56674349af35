"""Finds the memory of an engine: tensors, ONNX Runtime sessions and CUDA graphs, anywhere in its object graph.

Names of attributes play no role. The walk gets the references of many objects in one call of the garbage collector:
attributes, slots, containers, bound methods, partial functions, generators. Objects of which the collector shows too
little or too much are entered individually: TorchScript modules, functions, gradients.

No object is kept between walks: a known one may refer to a tensor now, and keeping it for comparison would keep alive
what the engine has dropped. Parts without memory are skipped in large batches.
"""

from __future__ import annotations

import bisect
import collections
import gc
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..modules import imported
from ..progress import current
from .object_graph import ByPath, ObjectKind, PathFinder, children, gradients, has_constants, kind_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Objects per batch; other threads run between batches.
_BATCH = 2048
#: Maximal number of steps in the check that a batch leads to no memory.
_DEPTH = 3
#: Skipped when empty. Exact classes only, since a subclass may override ``__len__``.
_MAY_BE_EMPTY = frozenset({list, dict, set, collections.OrderedDict, collections.deque, collections.defaultdict})

#: Containers that the collector may leave untracked.
_UNTRACKED = {dict, tuple}
#: Never marked as fertile: it pays to check a million lists of numbers each time.
_QUICKLY_LOOKED_INTO = {list, tuple, set}


@dataclass
class Found:
    """Tensors, sessions, graphs and self-moving objects, each once, by path from the engine (``.vad._model.weight``).

    ``values()`` is cheap; paths are computed at their first use.

    Attributes:
        references: number of references from the engine to each tensor (``id``), from Python objects only, not from C++
            (autograd, TorchScript).
        entered: all other objects that were entered, each once: instances, containers, cells.
        array_bytes: size of the numpy arrays with memory of their own. They do not move.
        borrowing: numpy arrays over the memory of another object, such as a tensor; not their views.
    """

    tensors: ByPath[torch.Tensor]
    sessions: ByPath[Any]
    graphs: ByPath[torch.cuda.CUDAGraph]
    self_moving: ByPath[Any]
    references: dict[int, int] = field(default_factory=dict)
    entered: list[Any] = field(default_factory=list)
    array_bytes: int = 0
    borrowing: list[Any] = field(default_factory=list)


class Discovery:
    """Walks the object graph of one engine, any number of times.

    Does not change the engine, and runs none of its properties, ``__getattr__`` or ``__eq__``. Objects at the paths in
    ``skip`` (``.tokenizer``) are not entered, even if there are other paths to them. Other threads may change the
    engine during a walk: objects that are reachable throughout are found. One walk at a time.
    """

    def __init__(self, engine: Any, skip: Collection[str] = ()) -> None:
        self._engine = engine
        self._skip = frozenset(skip)
        self._names = PathFinder(engine)
        self._logged: set[str] = set()
        self._scripts: weakref.WeakSet[torch.jit.ScriptModule] = weakref.WeakSet()

    def walk(self) -> Found:
        """Finds everything that is reachable from the engine now."""
        import torch

        skipped = [thing for path in self._skip for thing in self._names.at(path)]
        with torch._C.DisableTorchFunctionSubclass():
            walk = _Walk(skipped)
            walk.run(self._engine)
        closed = {id(thing) for thing in skipped}

        def names(things: Iterable[Any]) -> Mapping[int, str]:
            return self._names.of(things, closed)

        self._log_immovable(walk, names)
        arrays = _without_views(walk.arrays)
        return Found(
            ByPath(walk.tensors, names),
            ByPath(walk.sessions, names),
            ByPath(walk.graphs, names),
            ByPath(walk.self_moving, names),
            dict(walk.references),
            walk.entered(),
            sum(array.nbytes for array in arrays if array.base is None),
            [array for array in arrays if array.base is not None],
        )

    def _log_immovable(self, walk: _Walk, names: Callable[[Iterable[Any]], Mapping[int, str]]) -> None:
        """Logs, once each, what was found but is not moved."""
        constant = []
        for module in walk.scripts:
            if module not in self._scripts:
                self._scripts.update(module.modules())
                constant += [module] if has_constants(module) else []
        for things, message in (
            (walk.odd, "%s (%s) is not moved: only strided tensors can be moved"),
            (constant, "%s (%s): weights in the code of a frozen TorchScript module are not moved"),
            (walk.refused, "%s (%s) cannot be inspected: memory reachable only through it is not moved"),
        ):
            paths = names(things) if things else {}
            for thing in things:
                path = paths.get(id(thing)) or "The engine"
                if path not in self._logged:
                    self._logged.add(path)
                    logger.warning(message, path, _looks_like(thing))


def discover(engine: Any, skip: Collection[str] = ()) -> Found:
    return Discovery(engine, skip).walk()


class _Walk:
    """One walk, in batches of objects."""

    def __init__(self, skipped: Iterable[Any]) -> None:
        #: Kept alive, so that the ``id`` of a seen object is not reused. Objects without memory are not included.
        self._kept: list[Any] = list(skipped)
        self._skipped = len(self._kept)
        self._seen = set(map(id, self._kept))
        self._kinds: dict[type, ObjectKind] = {}
        #: Classes of which an instance led to something; no longer checked with `_is_barren`.
        self._fertile: set[type] = set()
        self._todo: list[Any] = []
        self.references: collections.Counter[int] = collections.Counter()
        self.tensors: list[torch.Tensor] = []
        self.sessions: list[Any] = []
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.self_moving: list[Any] = []
        self.arrays: list[Any] = []
        numpy = imported("numpy")  # imported, if the engine has an array
        self._array: type | None = numpy.ndarray if numpy else None
        self.odd: list[torch.Tensor] = []
        self.scripts: list[Any] = []
        self.refused: list[Any] = []

    def run(self, engine: Any) -> None:
        progress = current()
        progress.enter("looking")
        self._todo = [engine]
        while self._todo:
            batch = self._todo[-_BATCH:]
            del self._todo[-_BATCH:]
            self._look_at(batch)
            progress.beat()

    def entered(self) -> list[Any]:
        """Returns the entered objects, without tensors."""
        classes = {cls for cls, kind in self._kinds.items() if kind in (ObjectKind.OPEN, ObjectKind.BY_NAME)}
        kept = self._kept[self._skipped :]
        return list(itertools.compress(kept, map(classes.__contains__, map(type, kept))))

    def _look_at(self, batch: list[Any]) -> None:
        classes = self._classes(batch)
        kinds = {self._kinds[cls] for cls in classes}
        if kinds == {ObjectKind.OPEN}:
            for cls in classes - self._fertile:
                things = batch if len(classes) == 1 else [thing for thing in batch if type(thing) is cls]
                if not self._is_barren(things):
                    self._fertile |= {cls} - _QUICKLY_LOOKED_INTO
                elif len(classes) == 1:
                    return
                else:
                    batch = [thing for thing in batch if type(thing) is not cls]
            self._enter(self._fresh(batch))
            return
        for kind in kinds:
            things = batch if len(kinds) == 1 else [thing for thing in batch if self._kinds[type(thing)] is kind]
            self._take(kind, self._fresh(things))

    def _take(self, kind: ObjectKind, things: list[Any]) -> None:
        takers: dict[ObjectKind, Callable[[list[Any]], object]] = {
            ObjectKind.OPEN: self._enter,
            ObjectKind.TENSOR: self._enter_tensors,
            ObjectKind.SESSION: self.sessions.extend,
            ObjectKind.GRAPH: self.graphs.extend,
            ObjectKind.ARRAY: self.arrays.extend,
            ObjectKind.SELF_MOVING: self.self_moving.extend,
            ObjectKind.BY_NAME: self._enter_by_name,
        }  # not an attribute: a cycle would keep the engine alive
        if kind in takers:
            takers[kind](things)

    def _classes(self, things: list[Any]) -> set[type]:
        classes = set(map(type, things))
        for cls in classes - self._kinds.keys():
            self._kinds[cls] = kind_of(cls)
        return classes

    def _fresh(self, things: list[Any]) -> list[Any]:
        """Returns the objects that were not seen before, each once, and marks them as seen."""
        by_id = dict(zip(map(id, things), things, strict=True))
        new = by_id.keys() - self._seen
        fresh = things if len(new) == len(things) else [thing for key, thing in by_id.items() if key in new]
        self._seen |= new
        self._kept += fresh
        return fresh

    def _enter(self, things: list[Any]) -> None:
        self._follow(gc.get_referents(*things))

    def _follow(self, referents: list[Any]) -> None:
        """Queues these objects, and counts the references to tensors among them."""
        things = self._enterable(referents)
        tensors = {cls for cls in self._classes(things) if self._kinds[cls] is ObjectKind.TENSOR}
        if tensors:
            self.references.update([id(thing) for thing in things if type(thing) in tensors])
        self._todo += things

    def _enterable(self, referents: list[Any]) -> list[Any]:
        """Returns the objects that may lead to memory. Most objects untracked by the collector refer to nothing."""
        things = list(filter(gc.is_tracked, referents))
        things += self._exceptions_among(list(itertools.filterfalse(gc.is_tracked, referents)))
        classes = self._classes(things)
        closed = {cls for cls in classes if self._kinds[cls] is ObjectKind.CLOSED}
        hollow = classes & _MAY_BE_EMPTY
        if not hollow:
            return [thing for thing in things if type(thing) not in closed] if closed else things
        return [thing for thing in things if type(thing) not in closed and (type(thing) not in hollow or thing)]

    def _exceptions_among(self, untracked: list[Any]) -> list[Any]:
        """Returns untracked numpy arrays, named results of torch (``torch.max(t, 0)``) and self-moving objects.

        Also those in untracked containers.
        """
        found: list[Any] = []
        while untracked:
            classes = self._classes(untracked)
            wanted = {
                cls
                for cls in classes
                if cls is self._array
                or cls.__module__ == "torch.return_types"
                or self._kinds[cls] is ObjectKind.SELF_MOVING
            }
            if wanted:
                found += [thing for thing in untracked if type(thing) in wanted]
            containers = [thing for thing in untracked if type(thing) in _UNTRACKED] if classes & _UNTRACKED else []
            untracked = list(itertools.filterfalse(gc.is_tracked, gc.get_referents(*containers))) if containers else []
        return found

    def _is_barren(self, things: list[Any]) -> bool:
        """Returns whether the objects behind these end within `_DEPTH` steps, without anything of interest."""
        most = 8 * len(things)
        for _ in range(_DEPTH):
            things = self._enterable(gc.get_referents(*things))
            if not things:
                return True
            if len(things) > most or any(self._kinds[cls] is not ObjectKind.OPEN for cls in self._classes(things)):
                return False
        return False

    def _enter_tensors(self, tensors: list[torch.Tensor]) -> None:
        import torch

        self.tensors += tensors
        layout: Any = torch._C.TensorBase.layout.__get__  # type: ignore[attr-defined]
        if set(map(layout, tensors)) - {torch.strided}:
            self.odd += [tensor for tensor in tensors if layout(tensor) is not torch.strided]
        self._todo += gradients(tensors)
        self._enter(tensors)

    def _enter_by_name(self, things: list[Any]) -> None:
        import torch

        for thing in things:
            try:
                self._follow([child for _, _, child in children(thing)])
            except Exception:  # an object that cannot be inspected does not prevent the load
                logger.debug("An object of type %s cannot be inspected", type(thing), exc_info=True)
                self.refused.append(thing)
            if issubclass(type(thing), torch.jit.ScriptModule):
                self.scripts.append(thing)


def _without_views(arrays: list[Any]) -> list[Any]:
    """Returns these arrays without duplicates, each view replaced by the array that it views."""
    whole: dict[int, Any] = {}
    for array in arrays:
        while type(base := array.base) is type(array):
            array = base
        whole[id(array)] = array
    return list(whole.values())


def _looks_like(thing: Any) -> str:
    import torch

    if not issubclass(type(thing), torch.Tensor):
        return type(thing).__name__
    base: Any = torch._C.TensorBase
    return f"{type(thing).__name__}, {base.layout.__get__(thing)}, {list(base.size(thing))}"


def compiled_graphs(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the paths of those tensors whose addresses are in CUDA graphs of compiled code.

    ``torch.compile(mode="reduce-overhead")`` captures them; no engine refers to them: torch keeps them in thread-local
    variables. If this version of torch does not expose the addresses, returns one entry for all.
    """
    module = sys.modules.get("torch._inductor.cudagraph_trees")  # not imported: no graphs
    kind = getattr(module, "CUDAGraphNode", None)
    nodes = [node for node in gc.get_referrers(kind) if type(node) is kind] if kind is not None else []
    graphs = [node for node in nodes if getattr(node, "graph", None) is not None]
    if not graphs:
        return []
    try:
        addresses = sorted({address for graph in graphs for address in _addresses(graph)})
    except AttributeError:
        return ["torch.compile"]
    return [f"torch.compile: {path}" for path, tensor in tensors.items() if _holds_one_of(tensor, addresses)]


def _addresses(graph: Any) -> Iterator[int]:
    """Yields the addresses of parameters, buffers and constants at the capture."""
    yield from (address for address in graph.static_input_data_ptrs if address)
    yield from (constant.data_ptr() for constant in graph.wrapped_function.constants if constant.is_cuda)


def _holds_one_of(tensor: torch.Tensor, addresses: list[int]) -> bool:
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
    except Exception:  # no storage
        return False
    at = bisect.bisect_left(addresses, start)
    return at < len(addresses) and addresses[at] < start + storage.nbytes()
