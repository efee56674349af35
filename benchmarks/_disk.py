"""Reads of files into ready weights from a warm page cache: this project's snapshots, and other libraries."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from residency.memory.checksum import memoryview_of
from residency.memory.engine import EngineResident
from residency.memory.mirror import HostMirror, MirrorLayout
from residency.memory.snapshot import SnapshotFolder
from residency.memory.weights import Weights

from ._children import Job, installed
from ._files import model_file, there
from ._material import Plan, check, filled, model_tensors, nbytes_of, start
from ._meter import Meter, Row

if TYPE_CHECKING:
    import torch

RAW_FRESH, RAW_TOUCHED = "raw read, fresh mapping", "raw read, memory in use"
KEPT, READ, READY = "snapshot: release, already there", "snapshot: file to host", "snapshot: released to ready"
LOAD_FILE = ("safetensors load_file, touched", "safetensors load_file, cloned")
FASTSAFETENSORS, STREAMER, PRETRAINED, TORCH_LOAD = (
    "fastsafetensors", "runai-model-streamer", "from_pretrained, touched", "torch.load",
)  # fmt: skip
BUILT, BUILTIN_KEPT, BUILTIN_READY = (
    "built-in engine: BuiltinEngine()", "built-in engine: release", "built-in engine: released to ready",
)  # fmt: skip
READ_TOUCHED = "snapshot: file to host, memory in use"
_READ_BYTES = 1 << 20
_PAGE_BYTES = 4096
_CYCLES = 4


def jobs(plan: Plan) -> list[Job]:
    """Returns the jobs, the limit first; each is one process per repetition. Needs the files of `_files`."""
    raw, ours, limits = (RAW_FRESH, RAW_TOUCHED), (READ, READ_TOUCHED, READY, KEPT), (RAW_FRESH, RAW_FRESH)
    return [
        *([Job(raw_read, raw, limits)] if plan.device == "cpu" else []),
        Job(snapshot, (() if plan.device == "cpu" else raw) + ours, (*limits, RAW_FRESH, RAW_TOUCHED, RAW_FRESH)),
        Job(load_file, LOAD_FILE, limits),
        Job(fastsafetensors, (FASTSAFETENSORS,), limits),
        Job(model_streamer, (STREAMER,), limits),
        Job(from_pretrained, (PRETRAINED,), limits),
        Job(torch_load, (TORCH_LOAD,), limits),
        Job(builtin_engine, (BUILT, BUILTIN_KEPT, BUILTIN_READY)),
    ]


def raw_read(plan: Plan) -> list[Row]:
    """Measures the limit only, on devices without snapshots."""
    path = model_file(plan)
    _, meter = start(plan)
    _read_both_ways(path, meter)
    return meter.rows


def _read_both_ways(path: Path, meter: Meter) -> None:
    """Measures `preadv` with a few threads, into a mapping like the mirror's."""
    size = path.stat().st_size
    with meter.measure(RAW_FRESH, size):
        mapping = HostMirror(MirrorLayout((), (0,), size))
        _read(path, memoryview_of(mapping.raw))
    with meter.measure(RAW_TOUCHED, size):
        _read(path, memoryview_of(mapping.raw))


def read_threads() -> int:
    """Returns the number of threads of `SnapshotFolder`."""
    return min(4, max(2, os.cpu_count() or 2))


def _read(path: Path, target: memoryview) -> None:
    handle = os.open(path, os.O_RDONLY)
    numbers = itertools.count()

    def read() -> None:
        while (start := next(numbers) * _READ_BYTES) < len(target):
            done = 0
            while done < len(target[start : start + _READ_BYTES]):
                done += os.preadv(handle, [target[start + done : start + _READ_BYTES]], start + done)

    threads = [threading.Thread(target=read) for _ in range(read_threads())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(handle)


def snapshot(plan: Plan) -> list[Row]:
    """Measures cycles of release, read into a fresh mirror, read into the same mirror, restore.

    The raw read of the same file alternates between before and after them, for equal conditions.
    """
    path = there(next(iter(plan.snapshots.glob("*.safetensors")), plan.snapshots / "none"))
    device, meter = start(plan, separate=True)
    tensors = model_tensors(plan, device.torch_device)
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    weights, size = Weights(tensors, device), nbytes_of(tensors)
    weights.offload()
    store = SnapshotFolder(plan.snapshots)
    for cycle in range(_CYCLES):
        with meter.measure(KEPT, size):
            weights.save(store, "model")
        hashes = weights.mirror.saved
        assert hashes is not None
        if cycle % 2 == 0:
            _read_both_ways(path, meter)
        with meter.measure(READ, size):
            weights.load(store, "model")
        load_seconds = meter.rows[-1].seconds
        with meter.measure(READ_TOUCHED, size):
            store.read("model", weights.mirror.ranges(), hashes, weights.mirror.memory.raw)
        with meter.measure(READY, size):
            weights.restore()
        meter.rows[-1].seconds += load_seconds
        check(tensors, lambda number: filled(shapes[number], number, device.torch_device))
        weights.offload()
        if cycle % 2 == 1:
            _read_both_ways(path, meter)
    return meter.rows


def load_file(plan: Plan) -> list[Row]:
    """Measures safetensors, which maps the file: pages are read at first access, and stay file-backed."""
    from safetensors.torch import load_file

    path = model_file(plan)
    _, meter = start(plan)
    touched, cloned = LOAD_FILE
    with meter.measure(touched, path.stat().st_size):
        tensors = load_file(path, device=_where(plan))
        _touch(tensors.values())
    del tensors
    with meter.measure(cloned, path.stat().st_size):
        _ = [tensor.clone() for tensor in load_file(path, device=_where(plan)).values()]
    return meter.rows


def fastsafetensors(plan: Plan) -> list[Row]:
    library = installed("fastsafetensors")
    path = model_file(plan)
    _, meter = start(plan)
    with meter.measure(FASTSAFETENSORS, path.stat().st_size):
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), device=_where(plan), nogds=True)
        loader.add_filenames({0: [str(path)]})
        buffer = loader.copy_files_to_device()
        _touch([buffer.get_tensor(name) for name in loader.get_keys()])
    return meter.rows


def model_streamer(plan: Plan) -> list[Row]:
    library = installed("runai_model_streamer")
    path = model_file(plan)
    _, meter = start(plan)
    with meter.measure(STREAMER, path.stat().st_size), library.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        _touch([tensor.to(_where(plan)) for _, tensor in streamer.get_tensors()])
    return meter.rows


def from_pretrained(plan: Plan) -> list[Row]:
    """Measures transformers, as used by engines. With a GPU, ``device_map="cuda"``."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - imported before the clock starts

    path = model_file(plan)
    _, meter = start(plan)
    with meter.measure(PRETRAINED, path.stat().st_size):
        where = {"device_map": "cuda"} if plan.device == "cuda" else {}
        _touch(AutoModelForCausalLM.from_pretrained(plan.model, dtype="auto", **where).parameters())
    return meter.rows


def torch_load(plan: Plan) -> list[Row]:
    import torch

    path = there(plan.pickle)
    _, meter = start(plan)
    with meter.measure(TORCH_LOAD, path.stat().st_size):
        _touch(torch.load(path, map_location=_where(plan), weights_only=True).values())
    return meter.rows


def builtin_engine(plan: Plan) -> list[Row]:
    """Measures the built-in engine: construction, release, and load with restore."""
    from residency.engines.builtin import BuiltinEngine

    device, meter = start(plan)
    BuiltinEngine(device.torch_device)  # untimed: imports, and fills the page cache
    meter = Meter(device)
    with meter.measure(BUILT, 0):
        engine = BuiltinEngine(device.torch_device)
    if not device.separate:
        return meter.rows
    resident, store = EngineResident(engine, device), SnapshotFolder(Path(plan.folder, f"builtin-{os.getpid()}"))
    size = meter.rows[0].nbytes = resident.device_bytes
    with meter.measure(BUILTIN_KEPT, size):
        resident.save(store, "builtin")
    with meter.measure(BUILTIN_READY, size):
        resident.load(store, "builtin")
        resident.restore()
    shutil.rmtree(store.folder)
    return meter.rows


def _touch(tensors: Iterable[torch.Tensor]) -> None:
    """Reads a byte of each page, so that mapped pages are loaded."""
    import torch

    for tensor in tensors:
        if tensor.device.type == "cpu":
            tensor.detach().reshape(-1).view(torch.uint8)[::_PAGE_BYTES].sum()


def _where(plan: Plan) -> str:
    return "cuda:0" if plan.device == "cuda" else "cpu"
