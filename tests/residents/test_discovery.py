"""Whatever holds memory is found, wherever it hangs, and nothing of the engine is disturbed."""

from __future__ import annotations

import collections
import functools
import logging

import torch

from residency.residents.discovery import Discovery, discover


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
