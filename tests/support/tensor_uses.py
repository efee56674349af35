"""Applies every use of a tensor to every kind of tensor of an engine, in every state.

``python tests/support/tensor_uses.py [seed count]`` runs the whole grid, or that many random cases, each batch in a
separate process, and prints the results. Correct outcomes are the value on the device, the same error, `TensorAway`, or
a RuntimeError of torch that rejects the storage (from TorchScript and other C++, where the tensor's name is unknown).
Values are compared by bytes; after a use that changes the tensor, its bytes are compared too. While the tensor is away,
a value is correct only if it is independent of the bytes, or if the tensor is readable in every state. A rejected use
changes nothing. Anything else, above all a crash, is a failure.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import random
import re
import subprocess
import sys
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_ARITHMETIC = """
t + 1|1 + t|t - 1|t * 2|t / 2|t // 2|t % 3|t ** 2|-t|abs(t)|t @ t|t == t|t != 0|t < 1|t >= 1|~t|t & 1|t | 1|t ^ 1
t.add(1)|t.sub(1)|t.mul(2)|t.div(2)|t.neg()|t.abs()|t.sqrt()|t.exp()|t.sin()|t.sigmoid()|t.relu()|t.tanh()|t.round()
t.clamp(0, 1)|t.floor()|t.sign()|t.square()|t.logical_not()|t.isnan()|t.isfinite()|t.softmax(-1)|t.lerp(t, 0.5)
torch.add(t, t)|torch.mul(t, 2)|torch.where(t > 0, t, t)|torch.maximum(t, t)
torch.ops.aten.add(t, 1)|torch.special.expit(t)
"""
_REDUCTIONS = """
t.sum()|t.mean()|t.max()|t.min()|t.std()|t.prod()|t.any()|t.all()|t.norm()|t.argmax()|t.cumsum(0)|t.sort()|t.unique()
t.median()|t.count_nonzero()|t.topk(1)|t.sum(0)|t.var()|t.logsumexp(0)|torch.equal(t, t)|torch.allclose(t, t)|t.histc(3)
torch.linalg.norm(t)|torch.dot(t.flatten(), t.flatten())|torch.isclose(t, t)
"""
_VIEWS = """
t[0]|t[:1]|t[..., 0]|t[None]|t[t > 0]|t.view(-1)|t.reshape(-1)|t.flatten()|t.T|t.mT|t.H|t.t()|t.unsqueeze(0)|t.squeeze()
t.narrow(0, 0, 1)|t.select(0, 0)|t.expand_as(t)|t.detach()|t.data|t.real|t.chunk(1)|t.split(1)|t.unbind()|t.permute(0)
t.as_strided((1,), (1,))|t.diagonal()|t.view_as(t)|t.view(torch.uint8)|t.unfold(0, 1, 1)|t.movedim(0, 0)|t.alias()
t.index_select(0, torch.tensor([0]))|t.gather(0, torch.zeros_like(t, dtype=torch.long))
torch.stack([t, t])|torch.cat([t, t])
"""
_IN_PLACE = """
t.add_(0)|t.mul_(1)|t.copy_(t)|t.fill_(t)|t.zero_()
t.clamp_(-9, 9)|t.requires_grad_(t.requires_grad)|t.__setitem__(0, t[0])
torch.add(t, 0, out=t)|t.index_fill_(0, torch.tensor([], dtype=torch.long), 0)|t.set_(t)|t.resize_(t.shape)|t.detach_()
t.resize_as_(t)|t.swapaxes_(0, 0)|t.masked_fill_(t != t, 0)|t.bernoulli_()|t.relu_()
t.backward(torch.ones_like(t))
"""
_COPIES = """
t.clone()|t.contiguous()|t.to("cpu")|t.to(torch.float64)|t.cpu()|t.float()
t.half()|t.int()|t.bool()|t.type(torch.float32)
copy.copy(t)|copy.deepcopy(t)|torch.tensor(t)|torch.as_tensor(t)|torch.asarray(t)|torch.Tensor(t)|torch.nn.Parameter(t)
t.as_subclass(torch.Tensor)|t.share_memory_()
torch.Tensor._make_subclass(torch.Tensor, t)|t.numpy()|t.numpy(force=True)|np.asarray(t)|np.array(t)|np.add(t, 1)
np.from_dlpack(t)|torch.from_dlpack(t)|torch.utils.dlpack.to_dlpack(t)|t.__dlpack__()
memoryview(t)
t.tolist()|t.item()|list(t)|bool(t)|float(t)|int(t)|complex(t)|t.__array__()|t.__contains__(1)|bytes(t)
"""
_SAVING = """
pickle.dumps(t)|pickle.loads(pickle.dumps(t))|saved(t)
saved({"t": t})|t.__reduce_ex__(2)
module.state_dict()|module.load_state_dict(module.state_dict())|copy.deepcopy(module)|module.to("cpu")
module.double()|module.share_memory()|module.parameters()|saved(module)|pickle.dumps(module)|module.half()
[p.sum() for p in module.parameters()]|[b + 1 for b in module.buffers()]
torch.nn.utils.parameters_to_vector(module.parameters())
"""
_USE = """
module(x)|script(x)|torch.nn.functional.linear(x, t)|script.state_dict()|script.weight + 1|torch.jit.trace(module, x)
torch.func.functional_call(module, {}, x)|torch.vmap(lambda one: one + 1)(t)|torch.autograd.grad(t.sum(), t)|x @ t|x + t
torch.einsum("i...->...", t)|torch.nn.functional.relu(t)|torch.matmul(t, t)|copy.deepcopy(script)
"""
_STORAGE = """
t.untyped_storage()[0]|t.untyped_storage().tolist()|t.untyped_storage().clone()|t.storage()
t.untyped_storage().data_ptr() > 0|t.untyped_storage().cpu()|copy.copy(t.untyped_storage())
pickle.dumps(t.untyped_storage())|list(t.untyped_storage())|t.data_ptr() > 0
copy.deepcopy(t.untyped_storage())|torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
"""
_QUIET = """
torch.zeros_like(t)|torch.empty_like(t).shape|t.new_zeros(2)|t.new_tensor(1)|t.__dlpack_device__()|t in [t]|script.code
t.untyped_storage().nbytes() >= 0|t.untyped_storage().is_shared()|t.untyped_storage().resizable() in (True, False)
repr(t.untyped_storage()) != ""|t.__getstate__()
t.untyped_storage().device|t.untyped_storage().__sizeof__() >= 0|t.is_shared()|t.is_pinned()
"""
_TELLS = """
t.shape|t.size()|t.stride()|t.dtype|t.device|t.layout|t.dim()|t.ndim
t.numel()|t.element_size()|t.nbytes|t.itemsize|t.is_leaf
t.requires_grad|t.grad|t.is_cuda|t.is_sparse|t.is_quantized|t.is_contiguous()
t.storage_offset()|t.is_floating_point()|len(t)
hash(t) == id(t)|t is t|isinstance(t, torch.Tensor)|repr(t) != ""|str(t) != ""
f"{t}" != ""|t.get_device()|t.is_inference()
t.is_complex()|t._base is None|dir(t) != []|t.type()|torch.is_tensor(t)|torch.numel(t)|t.names|t.nelement()|t.unknown
"""


def _uses(*groups: str) -> tuple[str, ...]:
    """Splits groups of uses, separated by bars without spaces around them."""
    lines = (line for group in groups for line in group.strip().splitlines())
    return tuple(use for line in lines for use in re.split(r"(?<! )\|(?! )", line))


IN_PLACE = frozenset(_uses(_IN_PLACE))
#: Metadata of the tensor, which must be available wherever its bytes are.
ALWAYS = frozenset(_uses(_TELLS))
#: Values independent of the bytes. They may be refused while the bytes are away.
QUIET = frozenset(_uses(_QUIET))
USES = _uses(_ARITHMETIC, _REDUCTIONS, _VIEWS, _IN_PLACE, _COPIES, _SAVING, _USE, _STORAGE, _QUIET, _TELLS)
KINDS = (
    "parameter", "buffer", "tied", "view", "attribute", "cached", "script", "inference", "transposed", "sparse",
    "quantized", "scalar", "kept view", "exported",
)  # fmt: skip
#: Readable in every state: the first is held by a cache outside the engine, so its bytes return at the first use; the
#: second is not strided, and never moves.
READABLE = frozenset({"cached", "sparse"})
STATES = ("device", "lease", "offloaded", "released", "saved", "failed restore")
#: Types with a complete `repr`.
PLAIN = (int, float, complex, bool, str, bytes, type(None))
#: Errors of torch for a C++ use of a storage that is away, where the tensor's name is unknown.
REFUSALS = ("data pointer of Storage that is invalid", "out of bounds for storage of size 0", "manager.lease(name)")


@functools.lru_cache
def cached() -> Any:
    import torch

    return torch.arange(1.0, 10.0).reshape(3, 3)


def build() -> dict[str, Any]:
    """Creates an engine with a tensor of each kind."""
    import torch

    module = torch.nn.Linear(3, 3)
    module.register_buffer("scale", torch.ones(3, 3))
    module.register_buffer("filters", cached())
    with torch.no_grad():
        module.weight.copy_(torch.arange(9.0).reshape(3, 3) / 10)
        module.bias.fill_(0.5)
    with torch.inference_mode():
        inference = torch.arange(9.0).reshape(3, 3)
    base = torch.arange(16.0).reshape(4, 4)
    script = torch.jit.script(torch.nn.Linear(3, 3))
    script.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    return {
        "module": module, "tie": [module.weight], "base": base, "view": base[1:, 1:],
        "attribute": torch.arange(9.0).view(3, 3),
        "script": script, "inference": inference, "transposed": torch.arange(9.0).view(3, 3).t(),
        "sparse": torch.eye(3).to_sparse(), "scalar": torch.tensor(2.0), "exported": torch.arange(9.0).view(3, 3),
        "quantized": torch.quantize_per_tensor(torch.arange(9.0).view(3, 3), 0.1, 0, torch.qint8),
    }  # fmt: skip


def pick(engine: dict[str, Any], kind: str) -> Any:
    module = engine["module"]
    return {
        "parameter": lambda: module.weight, "buffer": lambda: module.scale, "tied": lambda: engine["tie"][0],
        "cached": cached, "script": lambda: engine["script"].weight, "kept view": lambda: module.weight.detach()[1:],
    }.get(kind, lambda: engine.get(kind))()  # fmt: skip


def outcome(use: str, tensor: Any, engine: dict[str, Any]) -> tuple[str, str]:
    """Returns the outcome of a use: ("value" | "error" | "away" | "refused", description)."""
    import numpy as np
    import torch

    from residency.errors import TensorAway

    names = {"t": tensor, "module": engine["module"], "script": engine["script"], "x": torch.ones(1, 3), "torch": torch,
             "np": np, "copy": copy, "pickle": pickle, "saved": saved}  # fmt: skip
    torch.manual_seed(0)
    try:
        value = in_words(eval(use, names), tensor)
        return "value", f"{value}, and then {in_words(tensor)}, {in_words(tensor.grad)}" if use in IN_PLACE else value
    except TensorAway:
        return "away", ""
    except Exception as error:
        if any(refusal in str(error) for refusal in REFUSALS):
            return "refused", str(error)
        return "error", type(error).__name__


def saved(value: Any) -> io.BytesIO:
    """Returns the bytes written by torch.save."""
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file


def in_words(value: Any, tensor: Any = None) -> str:
    """Describes a value down to its bytes; pickles and saved files are read back. Raises if the bytes are away."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        kind = f"itself, {value.dtype}" if value is tensor else f"{value.dtype}"
        if value.is_quantized and value.dtype is not torch.qint8:
            return kind  # torch itself crashes on access to such a view
        with torch.no_grad():
            dense = value.dequantize() if value.is_quantized else value.to_dense() if value.is_sparse else value
            return f"{kind} {dense.tolist()}"
    if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
        return f"{type(value).__name__} {list(value)}"
    if isinstance(value, torch.nn.Module):
        parts = (value.state_dict(), list(value.parameters()), list(value.buffers()))
        return f"{type(value).__name__} {in_words(parts, tensor)}"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{type(value).__name__} {value.dtype} {value.shape} {value.tobytes()!r}"
    if isinstance(value, io.BytesIO):
        return f"saved {in_words(torch.load(io.BytesIO(value.getvalue()), weights_only=False), tensor)}"
    if isinstance(value, bytes) and value.startswith(pickle.PROTO):
        return f"pickled {in_words(pickle.loads(value), tensor)}"
    if isinstance(value, dict):
        return f"{type(value).__name__} {[(in_words(key), in_words(one, tensor)) for key, one in value.items()]}"
    if isinstance(value, (list, tuple, types.GeneratorType)):
        return f"{type(value).__name__} {[in_words(one, tensor) for one in value]}"
    if type(value).__name__ == "PyCapsule":
        return f"capsule {in_words(torch.from_dlpack(value), tensor)}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return value.__qualname__
    if isinstance(value, (*PLAIN, torch.dtype, torch.device, torch.layout)):
        return f"{value!r}"
    raise AssertionError(f"A use has a {type(value)}, which this cannot compare")


def case(use: str, kind: str, state: str, folder: str) -> tuple[str, str]:
    """Runs one case; returns (outcome, description of the failure or nothing)."""
    import numpy as np

    from gpu_manager import DeviceOutOfMemory, SimulatedDevice
    from residency.memory import EngineResident, SnapshotFolder

    cached.cache_clear()
    engine = build()
    tensor = pick(engine, kind)
    before = in_words(tensor)
    right = outcome(use, tensor, engine)
    cached.cache_clear()
    engine = build()
    device = SimulatedDevice(1 << 20)
    resident = EngineResident(engine, device)
    tensor = pick(engine, kind)
    looking = np.from_dlpack(tensor) if kind == "exported" else None
    if state in ("offloaded", "lease", "failed restore"):
        resident.offload()
    if state == "released":
        resident.offload()
        resident.release()
    if state == "saved":
        resident.save(SnapshotFolder(Path(folder)), "engine")
    if state == "lease":
        resident.restore()
    if state == "failed restore":
        device.charge((1 << 20) - 20)
        try:
            resident.restore()
        except DeviceOutOfMemory:
            device.refund((1 << 20) - 20)
    got = outcome(use, tensor, engine)
    if looking is not None and looking.tolist() != np.arange(9.0).reshape(3, 3).tolist() and use not in IN_PLACE:
        return got[0], "what numpy looks at has changed"
    refused = got[0] in ("away", "refused")
    allowed = got == right or got[0] == right[0] == "error"
    if state not in ("device", "lease") and use not in ALWAYS:
        tells_nothing = got[0] == "error" or use in QUIET or kind in READABLE
        allowed = refused or (allowed and tells_nothing)
    if not allowed:
        return got[0], f"{got} instead of {right}"
    if refused and state in ("offloaded", "failed restore"):
        resident.restore()
        if in_words(tensor) != before:
            return got[0], f"was refused, and yet left {in_words(tensor)}"
    return got[0], ""


def run(cases: list[tuple[str, str, str]], batch: int = 400, jobs: int = 2) -> tuple[Counter[str], list[str]]:
    """Runs cases in separate processes; returns the number of each outcome, and the failures."""
    ends: Counter[str] = Counter()
    failures: list[str] = []
    while cases:
        chunks = [cases[start : start + batch] for start in range(0, min(len(cases), batch * jobs), batch)]
        cases = cases[batch * jobs :]
        started = []
        for chunk in chunks:
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(repr(chunk))
            process.stdin.close()
            process.stdin = None
            started.append((process, chunk))
        for process, chunk in started:
            output, errors = process.communicate()
            lines = [line for line in output.splitlines() if line.startswith("= ")]
            for line in lines:
                end, _, why = line[2:].partition("\t")
                ends[end] += 1
                if why:
                    failures.append(why)
            if len(lines) < len(chunk):
                ends["crashed"] += 1
                failures.append(f"{chunk[len(lines)]}: the process ended with {process.returncode}: {errors[-300:]}")
                cases.extend(chunk[len(lines) + 1 :])
    return ends, failures


def grid() -> list[tuple[str, str, str]]:
    return [(use, kind, state) for kind in KINDS for state in STATES for use in USES]


def sample(seed: int, count: int) -> list[tuple[str, str, str]]:
    return random.Random(seed).sample(grid(), count)


def work() -> None:
    import tempfile

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = eval(sys.stdin.read())
    with tempfile.TemporaryDirectory() as folder:
        for use, kind, state in cases:
            end, why = case(use, kind, state, folder)
            print(
                f"= {end}\t{f'{(use, kind, state)}: {why}'.encode('unicode_escape').decode() if why else ''}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        ends, failures = run(sample(*map(int, sys.argv[1:])) if sys.argv[1:] else grid())
        print(f"{len(USES)} uses x {len(KINDS)} kinds x {len(STATES)} states: {dict(ends)}")
        print("\n".join(failures))
        sys.exit(bool(failures))
