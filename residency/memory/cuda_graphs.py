"""CUDA graphs that hang on no engine: those that ``torch.compile(mode="reduce-overhead")`` captures.

torch keeps them in variables of the threads that ran the compiled code. They remember where the weights lay then.
"""

from __future__ import annotations

import bisect
import gc
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def compiled_graphs(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Which of these tensors (by path) are remembered by graphs of compiled code; empty if there are no such graphs.

    If some version of torch does not tell what its graphs remember, one entry stands for all.
    """
    graphs = _graphs()
    if not graphs:
        return []
    try:
        addresses = {address for graph in graphs for address in _addresses(graph)}
    except AttributeError:
        return ["torch.compile"]
    known = sorted(addresses)
    return [f"torch.compile: {path}" for path, tensor in tensors.items() if _holds_one_of(tensor, known)]


def _graphs() -> list[Any]:
    """All graphs of compiled code in this process, whatever thread has captured them; torch keeps no list."""
    module = sys.modules.get("torch._inductor.cudagraph_trees")  # if nobody has imported it there are none
    kind = getattr(module, "CUDAGraphNode", None)
    if kind is None:
        return []
    return [one for one in gc.get_referrers(kind) if type(one) is kind and getattr(one, "graph", None) is not None]


def _addresses(graph: Any) -> Iterator[int]:
    """Where the parameters, buffers and constants lay when a graph was captured."""
    yield from (address for address in graph.static_input_data_ptrs if address)
    yield from (constant.data_ptr() for constant in graph.wrapped_function.constants if constant.is_cuda)


def _holds_one_of(tensor: torch.Tensor, addresses: list[int]) -> bool:
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
    except Exception:  # it has no memory of its own
        return False
    at = bisect.bisect_left(addresses, start)
    return at < len(addresses) and addresses[at] < start + storage.nbytes()
