"""Moves between device and host: this project, usual methods, and the limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from residency.memory.mirror import HostMirror, MirrorLayout
from residency.memory.weights import Weights
from residency.sentences import Sentence

from ._children import Job, Unavailable, installed
from ._material import Plan, check, filled, make_device, nbytes_of, plain_tensors, start
from ._meter import Row

if TYPE_CHECKING:
    import torch

FIRST, UNCHANGED, CHANGED = "offload, first (copies)", "offload, unchanged", "offload, one storage changed"
RESTORE = "restore"
_MANY = (FIRST, UNCHANGED, RESTORE)
_PINNED_BLOCK_BYTES = 1 << 30


def jobs(plan: Plan) -> list[Job]:
    """Returns the jobs, limits first; each is one process per repetition."""
    cuda = plan.device == "cuda"
    out, back = LIMITS[cuda]
    usual = TO_CUDA if cuda else CLONES
    return [
        Job(pinned_link if cuda else plain_copy, (out, back) if cuda else (out, FRESH), (out, back if cuda else out)),
        Job(ours, (FIRST, UNCHANGED, CHANGED, RESTORE), (out, out, out, back)),
        Job(to_both_ways if cuda else clones, usual, (out, back)),
        Job(accelerate_hook, ACCELERATE, (out, back)),
        Job(memory_saver, MEMORY_SAVER, (out, back)),
        Job(many_small, tuple(many_names(plan)), (out, out, back)),
    ]


LIMITS = {True: ("raw link: pinned D2H", "raw link: pinned H2D"), False: ("raw copy_ into touched memory",) * 2}
FRESH = "raw copy_ into fresh memory (huge pages)"
CLONES = ('clone, there (for .to("cpu"))', 'clone, back (for .to("cuda"))')
TO_CUDA = ('.to("cpu"), pageable', '.to("cuda"), pageable')
ACCELERATE = ("accelerate cpu_offload_with_hook: offload", "accelerate cpu_offload_with_hook: forward")
MEMORY_SAVER = ("torch_memory_saver: pause", "torch_memory_saver: resume")


def many_names(plan: Plan) -> list[str]:
    return [f"{plan.many:,} x 1 KB: {name}" for name in _MANY]


def ours(plan: Plan) -> list[Row]:
    """Measures this project. The first offload creates the mirror; the restore is timed after pinning has ended."""
    device, meter = start(plan, separate=True)
    tensors = plain_tensors(plan, device.torch_device)
    weights, size = Weights(tensors, device), nbytes_of(tensors)
    device.wait()
    device.settle()
    with meter.measure(FIRST, size):
        weights.offload()
    weights.mirror.pinning.join()  # type: ignore[union-attr]
    with meter.measure(RESTORE, size):
        weights.restore()
    with meter.measure(UNCHANGED, size):
        weights.offload()
    weights.restore()
    check(tensors, lambda number: filled(tuple(tensors[f"t{number}"].shape), number, device.torch_device))
    list(tensors.values())[-1][-1] += 1
    with meter.measure(CHANGED, size):
        weights.offload()
    return meter.rows


def many_small(plan: Plan) -> list[Row]:
    """Measures the same for very many tensors of 1 KB, each with its own storage."""
    import torch

    device, meter = start(plan, separate=True)
    first, unchanged, restore = many_names(plan)
    values = torch.randn(plan.many, 256).to(device.torch_device)
    weights = Weights({str(index): row.clone() for index, row in enumerate(values)}, device)
    with meter.measure(first, values.nbytes):
        weights.offload()
    weights.mirror.pinning.join()  # type: ignore[union-attr]
    with meter.measure(restore, values.nbytes):
        weights.restore()
    with meter.measure(unchanged, values.nbytes):
        weights.offload()
    return meter.rows


def plain_copy(plan: Plan) -> list[Row]:
    """Measures the limit of main memory: one `copy_` into used memory, and into a fresh mapping."""
    import torch

    _, meter = start(plan)
    source, target = torch.ones(plan.size, dtype=torch.uint8), torch.zeros(plan.size, dtype=torch.uint8)
    with meter.measure(LIMITS[False][0], plan.size):
        target.copy_(source)
    del target
    with meter.measure(FRESH, plan.size):
        HostMirror(MirrorLayout((), (0,), plan.size)).raw.copy_(source)
    return meter.rows


def pinned_link(plan: Plan) -> list[Row]:
    """Measures the limit of the bus: pinned copies of 1 GB in both directions, up to the size."""
    import torch

    _, meter = start(plan)
    on_device = torch.ones(plan.size, dtype=torch.uint8, device="cuda")
    pinned = torch.ones(min(plan.size, _PINNED_BLOCK_BYTES), dtype=torch.uint8, pin_memory=True)
    parts = [on_device[start : start + len(pinned)] for start in range(0, plan.size, len(pinned))]
    for _warm_up in range(2):
        parts[0].copy_(pinned)
        pinned.copy_(parts[0])
    out, back = LIMITS[True]
    with meter.measure(out, plan.size):
        for part in parts:
            pinned[: len(part)].copy_(part, non_blocking=True)
    with meter.measure(back, plan.size):
        for part in parts:
            part.copy_(pinned[: len(part)], non_blocking=True)
    return meter.rows


def clones(plan: Plan) -> list[Row]:
    """Measures, without a GPU, copies of each tensor into its own memory and back, in place of `.to`."""
    _, meter = start(plan)
    there, back = CLONES
    tensors = plain_tensors(plan, "cpu")
    size = nbytes_of(tensors)
    with meter.measure(there, size):
        host = [tensor.clone() for tensor in tensors.values()]
    tensors.clear()
    with meter.measure(back, size, arriving=size):
        _ = [tensor.clone() for tensor in host]
    return meter.rows


def to_both_ways(plan: Plan) -> list[Row]:
    """Measures `.to` in both directions, through unpinned memory."""
    import torch

    _, meter = start(plan)
    module, size = _module(plan)
    out, back = TO_CUDA
    with meter.measure(out, size):
        module.to("cpu")
    torch.cuda.empty_cache()
    with meter.measure(back, size):
        module.to("cuda")
    return meter.rows


def accelerate_hook(plan: Plan) -> list[Row]:
    library = _installed_and_cuda("accelerate", plan)
    import torch

    _, meter = start(plan)
    module, size = _module(plan)
    module, hook = library.cpu_offload_with_hook(module, torch.device("cuda"))
    module(torch.zeros(1))
    out, back = ACCELERATE
    with meter.measure(out, size):
        hook.offload()
    with meter.measure(back, size):
        module(torch.zeros(1))
    return meter.rows


def memory_saver(plan: Plan) -> list[Row]:
    """Measures torch_memory_saver, which unmaps memory that torch still counts as allocated."""
    saver = _installed_and_cuda("torch_memory_saver", plan).torch_memory_saver

    _, meter = start(plan)
    saver.hook_mode = "torch"
    with saver.region(enable_cpu_backup=True):
        tensors = plain_tensors(plan, "cuda")
    size = nbytes_of(tensors)
    pause, resume = MEMORY_SAVER
    with meter.measure(pause, size):
        saver.pause()
    with meter.measure(resume, size):
        saver.resume()
    return meter.rows


def describe(plan: Plan) -> dict[str, str]:
    """Describes the device of a plan; resolves ``auto``."""
    import torch

    kind = plan.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "simulated"
    plan = Plan(plan.size, plan.tensors, plan.many, kind, plan.folder)
    name = torch.cuda.get_device_name() if kind == "cuda" else make_device(plan).name
    return {"device": kind, "name": Sentence.of(name).en, "torch": torch.__version__}


def _module(plan: Plan) -> tuple[torch.nn.Module, int]:
    import torch

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    tensors = plain_tensors(plan, "cuda")
    module = Holder()
    module.weights = torch.nn.ParameterList(torch.nn.Parameter(t, requires_grad=False) for t in tensors.values())
    return module, nbytes_of(tensors)


def _installed_and_cuda(package: str, plan: Plan) -> Any:
    library = installed(package)
    if plan.device != "cuda":
        raise Unavailable("needs CUDA")
    return library
