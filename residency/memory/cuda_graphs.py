"""Finds CUDA graphs captured by ``torch.compile(mode="reduce-overhead")``, which no engine refers to.

torch keeps them in thread-local variables. They contain the addresses of the weights at the capture.
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
    """Returns the paths of those tensors whose addresses are in graphs of compiled code; empty without such graphs.

    If this version of torch does not expose the addresses, returns one entry for all.
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
    """Returns all graphs of compiled code in this process, of any thread; torch keeps no list."""
    module = sys.modules.get("torch._inductor.cudagraph_trees")  # not imported: no graphs
    kind = getattr(module, "CUDAGraphNode", None)
    if kind is None:
        return []
    return [one for one in gc.get_referrers(kind) if type(one) is kind and getattr(one, "graph", None) is not None]


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
