"""Memory is found wherever an engine refers to it, without side effects on the engine."""

from __future__ import annotations

import collections
import contextvars
import functools
import gc
import logging
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from gpu_manager import SimulatedDevice
from residency.memory import EngineResident
from residency.memory.discovery import Discovery, discover
from residency.progress import Progress, reporting


class Slotted:
    __slots__ = ("tensor", "unset")

    def __init__(self) -> None:
        self.tensor = torch.ones(1)


class Engine:
    def __init__(self) -> None:
        self.module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.module[0].register_buffer("cache", torch.zeros(3), persistent=False)
        self.module.loose = torch.ones(4)
        self.nested = {"list": [torch.ones(5), (torch.ones(6), {7: torch.ones(7)})], "queue": collections.deque([1])}
        self.slotted = Slotted()
        self.itself = self
        self.logger = logging.getLogger("engine")
        captured = torch.ones(8)
        self.closure = lambda: captured
        self.bound = Slotted().__init__
        self.partial = functools.partial(print, torch.ones(9))
        self.module[0].weight.quant_state = Slotted()

    @property
    def trap(self) -> None:
        raise AssertionError("properties are not evaluated")


def test_tensors_are_found_by_path_each_once_through_cycles() -> None:
    engine = Engine()
    found = discover(engine).tensors
    expected = [
        *engine.module.parameters(), *engine.module.buffers(), engine.module.loose, engine.nested["list"][0],
        engine.nested["list"][1][0], engine.nested["list"][1][1][7], engine.slotted.tensor,
        engine.closure.__closure__[0].cell_contents, engine.bound.__self__.tensor, engine.partial.args[0],
        engine.module[0].weight.quant_state.tensor,
    ]  # fmt: skip
    assert sorted(map(id, found.values())) == sorted(map(id, expected))
    assert found[".module._modules['0']._parameters['weight']"] is engine.module[0].weight
    assert found[".nested['list'][1][1][7]"].numel() == 7


class Touchy:
    """Raises in every overridable method."""

    def __init__(self) -> None:
        object.__setattr__(self, "tensor", torch.ones(1))

    def _no(self, *_: object) -> Any:
        raise AssertionError("code of the engine ran")

    __getattr__ = __eq__ = __hash__ = __repr__ = __len__ = __bool__ = __iter__ = __getitem__ = __contains__ = _no
    __getattribute__ = __dir__ = __sizeof__ = __reduce__ = _no


class TouchyList(list, Touchy):
    __iter__ = __len__ = __bool__ = __eq__ = Touchy._no
    __hash__ = Touchy._no


def test_no_code_of_the_engine_runs() -> None:
    touchy, contained = Touchy(), torch.ones(2)
    items = TouchyList.__new__(TouchyList)
    list.extend(items, [contained, touchy])
    found = discover({"one": [touchy], "two": items})
    assert sorted(tensor.numel() for tensor in found.tensors.values()) == [1, 2]
    assert all("tensor" in path or "[0]" in path for path in found.tensors)


def test_each_reference_of_the_engine_to_a_tensor_is_counted() -> None:
    tensor, other = torch.ones(1), torch.ones(2)
    slotted = Slotted()
    slotted.tensor = tensor
    module = torch.nn.Module()
    module.register_buffer("buffer", tensor)
    module.parameter = torch.nn.Parameter(torch.ones(3))
    plain = Engine.__new__(Engine)
    plain.attribute = tensor
    engine = {
        "slot": slotted, "module": module, "again": module, "plain": plain, "list": [tensor, tensor],
        "tuple": (tensor, [slotted, plain]), "closure": lambda: tensor, "partial": functools.partial(print, tensor),
        "other": other, "set": {tensor},
    }  # fmt: skip
    found = discover(engine)
    assert found.references == {id(tensor): 9, id(other): 1, id(module.parameter): 1}
    vars(plain)  # creates the instance's dict
    assert discover(engine).references == found.references
    before = sys.getrefcount(tensor)
    del found
    assert before - sys.getrefcount(tensor) <= 2, "nothing of a walk keeps what it found"


def test_among_many_small_objects_the_one_with_a_tensor_is_found_at_every_walk() -> None:
    class Small:
        def __init__(self, number: int) -> None:
            self.number, self.name, self.row = number, str(number), [number, (number, {})]

    many = [Small(number) for number in range(20_000)]
    engine = {"many": many, "module": torch.nn.Linear(1, 1)}
    discovery = Discovery(engine)
    assert len(discovery.walk().tensors) == 2
    many[77].late = torch.ones(1)
    many[19_000].row[1][1]["deep"] = [[[[torch.ones(2)]]]]
    many[5].number = (torch.ones(3),)
    found = discovery.walk().tensors
    assert {path for path in found if path.startswith("['many']")} == {
        "['many'][77].late", "['many'][19000].row[1][1]['deep'][0][0][0][0]", "['many'][5].number[0]"
    }  # fmt: skip
    del many[77].late, many[19_000].row, many[5].number
    assert len(discovery.walk().tensors) == 2


def test_nothing_is_kept_alive_between_two_walks() -> None:
    small = Slotted()
    small.tensor = torch.ones(1)
    engine = [small, Engine()]
    discovery = Discovery(engine)
    gone = weakref.ref(small.tensor), weakref.ref(engine[1])
    gc.disable()  # freed by reference counts alone
    try:
        engine[1].__dict__.clear()
        discovery.walk()
        del small, engine[:]
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="generators refer to frames")
def test_what_a_suspended_generator_or_coroutine_holds_is_found_and_nothing_of_its_module() -> None:
    def generator():
        local = torch.ones(1)
        yield
        del local

    async def coroutine():
        local = torch.ones(2)
        await Pause()
        del local

    class Pause:
        def __await__(self):
            yield

    steps, work = generator(), coroutine()
    next(steps)
    work.send(None)
    global _of_the_module
    _of_the_module = torch.ones(3)
    try:
        assert sorted(map(len, discover({"steps": steps, "work": work}).tensors.values())) == [1, 2]
    finally:
        del _of_the_module
        work.close()


def test_frames_contexts_and_what_native_code_keeps_lead_out() -> None:
    secret = torch.ones(1)
    variable = contextvars.ContextVar("variable")
    variable.set(secret)
    try:
        raise ValueError("kept")
    except ValueError as error:
        error.note = torch.ones(2)
        kept = error
    holder = {"error": kept, "context": contextvars.copy_context(), "code": discover.__code__, "task": _futures()}
    assert [len(tensor) for tensor in discover(holder).tensors.values()] == [2]


def _futures() -> object:
    import asyncio

    async def work() -> object:
        return asyncio.current_task()

    return asyncio.run(work())


def test_other_threads_may_change_the_engine_during_a_walk() -> None:
    engine = {"stays": [torch.ones(1)], "table": {}, "list": []}
    discovery, over = Discovery(engine), threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            number += 1
            engine["table"][number % 977] = [number, {"x": number}]
            engine["list"].append((number,))
            if number % 1000 == 0:
                engine["table"].clear()
                engine["list"].clear()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert len(discovery.walk().tensors) == 1
    finally:
        over.set()
        thread.join()


def test_what_hangs_on_a_skipped_path_is_left_alone_wherever_else_it_hangs() -> None:
    tokenizer = Slotted()
    tokenizer.tensor = torch.ones(1)
    engine = {"llm": [tokenizer, torch.ones(2)], "tokenizer": tokenizer}
    for skip in (["['tokenizer']"], ["['llm'][0]"]):
        assert [len(tensor) for tensor in discover(engine, skip).tensors.values()] == [2]


def test_a_walk_says_that_it_goes_on() -> None:
    progress = Progress("loading")
    with reporting(progress):
        discover([[number] for number in range(10_000)])
    assert progress.facts[0] == "looking"
    assert progress.beats >= 4


def test_a_traced_module_is_no_frozen_one_and_a_frozen_one_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    traced = torch.jit.trace(layers, torch.ones(1, 2))
    assert len(discover({"traced": traced, "script": torch.jit.script(layers)}).tensors) == 10
    assert caplog.text == ""
    discovery = Discovery({"frozen": torch.jit.freeze(torch.jit.script(layers.eval()))})
    discovery.walk()
    discovery.walk()
    assert caplog.text.count("['frozen']") == 1
    assert "frozen TorchScript module" in caplog.text


def test_tensors_of_other_layouts_are_named_once_with_their_path(caplog: pytest.LogCaptureFixture) -> None:
    discovery = Discovery({"graph": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr()})
    discovery.walk()
    discovery.walk()
    assert caplog.text.count("['graph'] (Tensor, torch.sparse_coo, [3, 3])") == 1
    assert caplog.text.count("['rows'] (Tensor, torch.sparse_csr, [3, 3])") == 1


def test_a_script_module_shows_the_tensors_it_keeps_in_cpp() -> None:
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert {tuple(tensor.shape) for tensor in discover([module]).tensors.values()} == {(2, 2), (2,)}


def test_what_leads_out_of_the_engine_is_not_followed() -> None:
    logger = logging.getLogger("engine")
    logger.secret = torch.ones(1)
    try:
        assert discover({"logger": logger, "type": Engine, "module": torch}).tensors == {}
    finally:
        del logger.secret


def test_what_appears_later_is_found_by_the_next_walk_of_the_same_discovery() -> None:
    engine = {"vocabulary": {str(number): number for number in range(1000)}, "cache": []}
    discovery = Discovery(engine)
    assert discovery.walk().tensors == {}
    engine["cache"].append(torch.ones(1))
    engine["vocabulary"]["new"] = torch.ones(2)
    assert set(discovery.walk().tensors) == {"['cache'][0]", "['vocabulary']['new']"}


def test_what_is_told_to_be_skipped_is_not_entered() -> None:
    engine = Engine()
    found = discover(engine, skip=[".nested", ".module._modules['0']"]).tensors
    assert not [path for path in found if path.startswith((".nested", ".module._modules['0']"))]
    assert ".slotted.tensor" in found


def test_containers_that_do_not_like_to_be_looked_at_do_no_harm() -> None:
    class Grumpy(dict):
        def items(self) -> object:
            raise RuntimeError("go away")

    grumpy = Grumpy()
    grumpy.attribute = torch.ones(3)
    assert [len(tensor) for tensor in discover([grumpy]).tensors.values()] == [3]


def test_a_deep_chain_is_no_recursion() -> None:
    head: list[object] = [torch.ones(1)]
    for _ in range(50_000):
        head = [head]
    assert len(discover(head).tensors) == 1


def test_named_results_of_torch_are_looked_into() -> None:
    best = torch.max(torch.arange(16.0).view(4, 4), 0)
    engine = {"best": best, "list": [torch.sort(torch.rand(8))]}
    resident = EngineResident(engine, device := SimulatedDevice(1 << 20))
    assert device.ledger_bytes == 4 * 4 + 4 * 8 + 8 * 4 + 8 * 8
    resident.offload()
    assert device.ledger_bytes == 0
    resident.restore()
    assert best.values.tolist() == [12, 13, 14, 15]
