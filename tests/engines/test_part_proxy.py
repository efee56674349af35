"""`GPUManagedTTS` hands out copies and `Part`s only, at any depth."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import io
import itertools
import subprocess
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines.part_proxy import Held, find_paths, follow
from residency.errors import NotHandedOut, PartGone
from tts_gpu_managed import GPUManagedTTS, Part

pytestmark = pytest.mark.usefixtures("unmeasured")

ROOT = Path(__file__).resolve().parents[2]


class Pair(typing.NamedTuple):
    weight: Any
    name: str


@dataclasses.dataclass
class Result:
    weight: Any
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    weight: Any


class Strict(dict):
    """A dictionary that cannot be made without an argument, and has an attribute."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner


class Output(collections.OrderedDict):
    """As transformers' ModelOutput: items that are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        vars(self).update(items)


class Window(list):
    pass


class Row(tuple):
    """A tuple with an attribute."""


class Cache:
    """An object that is no container."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight


class Tagged(torch.Tensor):
    pass


class Engine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(self.llm.weight)
        self.blocks = torch.nn.ModuleList([self.llm, torch.nn.Linear(2, 2)])
        self.caches = {"latest": torch.ones(3)}
        self.config = {"rate": [24000]}

    clone = edit = lambda self, wrap, *_: wrap(self)

    def make(self, wrap: Callable[[Engine], Any]) -> Any:
        """Answers what a test wants of it."""
        return wrap(self)


@pytest.fixture
def tts() -> Iterator[GPUManagedTTS]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        yield GPUManagedTTS(None, None, manager=manager, load=Engine)


def weight(engine: Engine) -> torch.Tensor:
    return engine.llm.weight.detach()


CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda w: (w, 1), lambda a: a[0]),
    "list": (lambda w: [[w]], lambda a: a[0][0]),
    "dict": (lambda w: {"a": {"b": w}}, lambda a: a["a"]["b"]),
    "named tuple": (lambda w: Pair(w, "x"), lambda a: a.weight),
    "struct sequence": (lambda w: torch.return_types.max((w, w)), lambda a: a.values),
    "ordered": (lambda w: collections.OrderedDict(a=w, b=1), lambda a: a["a"]),
    "default": (lambda w: collections.defaultdict(list, a=[w]), lambda a: a["a"][0]),
    "counter": (lambda w: collections.Counter({"a": 1, w: 2}), lambda a: list(a)[1]),
    "output": (lambda w: Output(weight=w), lambda a: a.weight),
    "strict": (lambda w: _strict(w), lambda a: a["a"]),
    "strict's attribute": (lambda w: _strict(w), lambda a: a.owner),
    "list's kind": (lambda w: Window([w]), lambda a: a[0]),
    "deque": (lambda w: collections.deque([w], 7), lambda a: a[0]),
    "set": (lambda w: {w}, lambda a: a.copy().pop()),
    "frozen set": (lambda w: frozenset([w]), lambda a: next(iter(a))),
    "key": (lambda w: {w: 1}, lambda a: next(iter(a))),
    "size": (lambda w: (w, w.size()), lambda a: a[0] if a[1] == (2, 2) else None),
    "tuple's kind": (lambda w: _named_row(w), lambda a: a.owner),
    "nested": (lambda w: [torch.nested.nested_tensor([w, w])], lambda a: a[0].unbind()[1]),
    "sparse": (lambda w: [w.to_sparse()], lambda a: a[0].to_dense()),
    "proxy": (lambda w: types.MappingProxyType({"a": w}), lambda a: a["a"]),
    "values": (lambda w: {"a": w}.values(), lambda a: next(iter(a))),
    "items": (lambda w: {"a": w}.items(), lambda a: next(iter(a))[1]),
    "user dict": (lambda w: collections.UserDict(a=w), lambda a: a["a"]),
    "user list": (lambda w: collections.UserList([w]), lambda a: a[0]),
    "namespace": (lambda w: types.SimpleNamespace(a=w), lambda a: a.a),
    "dataclass": (lambda w: Result(1, [Result(w)]), lambda a: a.more[0].weight),
    "frozen dataclass": (lambda w: Frozen(w), lambda a: a.weight),
    "object array": (lambda w: np.array([None, [w], Result(w)], dtype=object), lambda a: a[1][0]),
    "array": (lambda w: w.numpy()[:1], lambda a: a),
    "memory": (lambda w: memoryview(w.numpy()), lambda a: torch.from_numpy(np.array(a))),
    "storage": (lambda w: [w.untyped_storage()], lambda a: torch.tensor(a[0], dtype=torch.uint8).view(torch.float32)),
    "view": (lambda w: [w.t()[0]], lambda a: a[0]),
    "kind of tensor": (lambda w: [w.as_subclass(Tagged)], lambda a: a[0].as_subclass(torch.Tensor)),
    "error": (lambda w: [ValueError(w)], lambda a: a[0].args[0]),
    "object of the call": (lambda w: Cache(w), lambda a: a.weight),
    "objects in containers": (lambda w: {"a": [Cache((w,))]}, lambda a: a["a"][0].weight[0]),
    "partial": (lambda w: functools.partial(w.add, 0), lambda a: a()),
    "closure": (lambda w: lambda: w, lambda a: a()),
    "method": (lambda w: {"a": w}.get, lambda a: a("a")),
}


def _named_row(w: Any) -> Row:
    made = Row([1])
    made.owner = w
    return made


def _strict(w: Any) -> Strict:
    made = Strict(w)
    made["a"] = w
    return made


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("call", ["make", "clone"])
def test_what_a_container_of_any_kind_holds_is_there_after_the_engine_has_left(
    tts: GPUManagedTTS, kind: str, call: str
) -> None:
    wrap, look = CONTAINERS[kind]
    answer = getattr(tts, call)(lambda engine: wrap(weight(engine)), *[None, None][: 2 * (call == "clone")])
    tts.force_offload()
    found = look(answer)
    assert (np.asarray(found) == 1).all()
    assert np.asarray(found).size
    with tts.lease() as engine:
        found[...] = 5
        assert weight(engine).sum() == 4, "the answer is the caller's, the weights are the engine's"
    plain = not isinstance(answer, Part)
    assert type(answer) is type(wrap(torch.ones(2, 2))) or not plain


def test_identity_cycles_ties_and_what_a_container_knows_beside_its_items_stay(tts: GPUManagedTTS) -> None:
    def wrap(engine: Engine) -> Any:
        w = weight(engine)
        around: list[Any] = [w, w, w.view(2, 2), collections.deque([w], 7), collections.defaultdict(list)]
        around += [around, (around,), Result(around)]
        return around

    answer = tts.make(wrap)
    assert answer[0] is answer[1]
    assert answer[2].data_ptr() == answer[0].data_ptr(), "equal views of one storage are equal views of one copy"
    assert answer[3].maxlen == 7
    assert answer[4]["new"] == []
    assert answer[5] is answer
    assert answer[6][0] is answer
    assert answer[7].weight is answer


def test_a_state_dict_can_be_used_saved_and_loaded(tts: GPUManagedTTS) -> None:
    state = tts.llm.state_dict()
    tts.force_release()
    assert type(state) is collections.OrderedDict
    assert state._metadata[""] == {"version": 1}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file)["weight"].sum() == 4
    torch.nn.Linear(2, 2, bias=False).load_state_dict(state)


def test_parts_of_the_engine_in_an_answer_are_parts_by_their_path(tts: GPUManagedTTS) -> None:
    modules, method = tts.make(lambda engine: ([engine.llm, engine.blocks[1]], engine.llm.forward))
    assert [type(module) for module in modules] == [Part, Part]
    assert "<llm of the engine" in repr(modules[0])
    tts.force_release()
    assert modules[0].weight.sum() == 4
    assert modules[0](torch.ones(1, 2)).tolist() == [[2, 2]]
    assert method(torch.ones(1, 2)).tolist() == [[2, 2]]
    assert tts.make(lambda engine: engine)._path == ()
    assert repr(tts.make(lambda engine: engine)).startswith("<the engine")
    assert tts.make(lambda engine: engine).llm.in_features == 2
    assert [name for name, part in tts.blocks.named_modules() if isinstance(part, Part)] == ["", "0", "1"]


def test_what_the_engine_has_made_and_does_not_keep_is_held_until_it_is_released(tts: GPUManagedTTS) -> None:
    made = tts.make(lambda engine: torch.nn.Sequential(engine.llm, torch.nn.ReLU()))
    assert "Sequential" in repr(made)
    tts.force_offload()
    assert made(torch.ones(1, 2)).tolist() == [[2, 2]]
    assert made[0].weight.sum() == 4
    tts.force_release()
    with pytest.raises(PartGone, match="Sequential belongs to an engine that was released"):
        made(torch.ones(1, 2))


def test_paths_lead_through_attributes_slots_and_containers_and_ask_nothing_of_what_they_pass() -> None:
    class Slotted:
        __slots__ = ("module", "other")

        def __bool__(self) -> bool:
            raise AssertionError("not asked")

    class Shadowed:
        @property
        def module(self) -> None:
            raise AssertionError("not asked")

    module, behind, hidden, in_set = (torch.nn.ReLU() for _ in range(4))
    slotted, shadowed = Slotted(), Shadowed()
    slotted.module = [(module, {"a": behind})]
    vars(shadowed)["module"] = hidden
    engine = types.SimpleNamespace(slotted=slotted, shadowed=shadowed, several={in_set}, weight=torch.ones(3))
    wanted = {id(each): each for each in (engine, module, behind, hidden, in_set)}
    found = find_paths(engine, wanted)
    assert found.keys() == {id(engine), id(module), id(behind)}
    assert all(follow(path, engine) is wanted[key] for key, path in found.items())


def test_what_is_held_does_not_keep_a_released_engine() -> None:
    engine, other, tuple_engine = Engine(), Engine(), (1, 2)
    held, kept = Held("made", engine), Held("made", tuple_engine)
    assert held.of(engine) == kept.of(tuple_engine) == "made"
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    for part in (held, kept):
        with pytest.raises(PartGone):
            part.of(other)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: [iter([w])],
        lambda w: {"a": (x for x in [w])},
        lambda w: (map(abs, [w]),),
        lambda w: [itertools.cycle([w])],
        lambda w: [torch.utils.dlpack.to_dlpack(w)],
        lambda w: [_waiting(w)],
        lambda w: _waiting(w),
        lambda w: [w.numpy().flat],
    ],
)
def test_what_cannot_be_copied_and_goes_on_reading_is_refused(tts: GPUManagedTTS, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(NotHandedOut, match=r"with tts\.lease\(\) as engine"):
        tts.make(lambda engine: wrap(weight(engine)))
    with pytest.raises(NotHandedOut):
        tts.make(lambda engine: [weakref.ref(engine.llm)])
    assert tts.get_gpu_status()["models"]["tts"]["leases"] == 0


async def _waiting(w: torch.Tensor) -> torch.Tensor:
    return w


def test_a_stream_of_any_kind_gives_copies(tts: GPUManagedTTS) -> None:
    streams = [lambda w: iter([Pair(w, "")]), lambda w: map(Pair, [w], [""]), lambda w: (Pair(x, "") for x in [w])]
    for stream in streams:
        answers = list(tts.make(lambda engine, stream=stream: stream(weight(engine))))
        tts.force_offload()
        assert answers[0].weight.sum() == 4
    with pytest.raises(NotHandedOut):
        tts.clone(lambda engine: iter([weight(engine)]), None, None)


def test_what_an_error_carries_is_there_after_the_engine_has_left(tts: GPUManagedTTS) -> None:
    def fail(engine: Engine) -> None:
        raised = KeyError("other", 1)
        raised.live = {"w": weight(engine)}
        try:
            raise ValueError("no", weight(engine))
        except ValueError as error:
            raise raised from error

    def fail_late(engine: Engine) -> Iterator[int]:
        yield 1
        fail(engine)

    for call in (lambda: tts.make(fail), lambda: tts.clone(fail, None, None), lambda: list(tts.make(fail_late))):
        with pytest.raises(KeyError) as caught:
            call()
        tts.force_offload()
        raised = caught.value
        assert raised.args == ("other", 1)
        assert raised.live["w"].sum() == 4
        assert raised.__cause__.args[1].sum() == 4


@pytest.mark.in_process("errors are the engine's own objects")
def test_an_error_is_the_one_that_was_raised(tts: GPUManagedTTS) -> None:
    raised = KeyError("other", 1)

    def fail(engine: Engine) -> None:
        raised.live = weight(engine)
        raise raised

    for call in (lambda: tts.make(fail), lambda: tts.clone(fail, None, None)):
        with pytest.raises(KeyError) as caught:
            call()
        assert caught.value is raised


def test_an_error_of_reading_holds_no_part_of_the_engine(tts: GPUManagedTTS) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'") as caught:
        tts.llm.nothing  # noqa: B018
    assert not isinstance(caught.value.obj, torch.nn.Module)


def test_methods_written_in_c_are_parts_too(tts: GPUManagedTTS) -> None:
    assert tts.caches.get("latest").sum() == 3
    values, items = tts.caches.values(), tts.caches.items()
    tts.force_offload()
    assert [value.sum() for value in values] == [3]
    assert [(name, value.sum()) for name, value in items] == [("latest", 3)]


def test_containers_of_the_engine_are_not_changed_through_what_is_read(tts: GPUManagedTTS) -> None:
    tts.config["rate"].append(8000)
    tts.make(lambda engine: engine.config)["rate"].append(8000)
    assert tts.config == {"rate": [24000]}


def test_answers_lead_to_no_weights_through_their_graph(tts: GPUManagedTTS) -> None:
    answer = tts.llm(torch.ones(1, 2))
    assert answer.grad_fn is None
    assert tts.llm.weight.grad_fn is None


@pytest.mark.in_process("results are the engine's own objects")
def test_what_holds_no_memory_of_the_device_is_handed_out_itself(tts: GPUManagedTTS) -> None:
    tokenizer = Cache({"a": 1})
    assert tts.make(lambda engine: [tokenizer])[0] is tokenizer
    assert tts.make(lambda engine: len) is len


@pytest.mark.in_process("counts copies within this process")
def test_a_tensor_is_copied_once(tts: GPUManagedTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, copies = torch.Tensor.clone, []
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **how: copies.append(1) or clone(self, **how))
    reads = (
        lambda: tts.make(lambda engine: (weight(engine), 24000)),
        lambda: tts.clone(weight, None, None),
        lambda: tts.llm.weight,
        lambda: list(tts.make(lambda engine: (weight(engine) for _ in range(1)))),
    )
    for number, read in enumerate(reads, 1):
        read()
        assert len(copies) == number


def test_kinds_that_are_registered_as_trees_are_copied(tts: GPUManagedTTS) -> None:
    from torch.utils._pytree import SUPPORTED_NODES, register_pytree_node

    class Tree:
        def __init__(self, weight: Any) -> None:
            self.weight = weight

    register_pytree_node(Tree, lambda tree: ([tree.weight], None), lambda children, _: Tree(*children))
    try:
        answer = tts.make(lambda engine: Tree(weight(engine)))
        tts.force_offload()
        assert answer.weight.sum() == 4
    finally:
        del SUPPORTED_NODES[Tree]


def test_nothing_of_it_ends_the_process(tmp_path: Path) -> None:
    script = f"""
import collections, sys, torch
sys.path[:0] = {[str(ROOT / "tests" / folder) for folder in ("support", "engines")]!r}
from gpu_manager import GPUResourceManager, SimulatedDevice
from test_part_proxy import CONTAINERS, Engine, weight
from tts_gpu_managed import GPUManagedTTS
import numpy as np
tts = GPUManagedTTS(None, None, manager=GPUResourceManager(SimulatedDevice(1 << 30)), load=Engine)
assert tts.llm.state_dict()["weight"].sum() == 4
assert tts.make(lambda engine: [engine.llm])[0].weight.sum() == 4
torch.save(tts.llm.state_dict(), {str(tmp_path / "state")!r})
assert torch.load({str(tmp_path / "state")!r})["weight"].sum() == 4
for wrap, look in CONTAINERS.values():
    assert (np.asarray(look(tts.make(lambda engine: wrap(weight(engine))))) == 1).all()
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_part_is_not_copied_or_pickled_in_silence(tts: GPUManagedTTS) -> None:
    with pytest.raises(Exception, match=r"set|pickle"):
        copy.deepcopy(tts.llm)
