"""Files for the second table: the same weights in three formats, written once per run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from residency.memory.snapshot import SnapshotFolder
from residency.memory.weights import Weights

from ._children import Unavailable
from ._material import Plan, meta_model, model_tensors, nbytes_of, start
from ._meter import Row

WRITTEN = "snapshot: release, written anew"


def prepare_snapshot(plan: Plan) -> list[Row]:
    """Writes the snapshot, as a release does."""
    device, meter = start(plan, separate=True)
    _need_space(plan)
    tensors = model_tensors(plan, device.torch_device)
    weights, size = Weights(tensors, device), nbytes_of(tensors)
    weights.offload()
    with meter.measure(WRITTEN, size):
        weights.save(SnapshotFolder(plan.snapshots), "model")
    return meter.rows


def prepare_model(plan: Plan) -> None:
    """Writes the same weights as safetensors, as saved by transformers."""
    _need_space(plan)
    _filled_model(plan).save_pretrained(plan.model, max_shard_size="1TB")
    _on_disk(model_file(plan))


def prepare_pickle(plan: Plan) -> None:
    import torch

    _need_space(plan)
    torch.save(_filled_model(plan).state_dict(), plan.pickle)
    _on_disk(plan.pickle)


def _filled_model(plan: Plan) -> Any:
    model = meta_model(plan)
    model.load_state_dict(model_tensors(plan, "cpu"), assign=True)
    return model


def _need_space(plan: Plan) -> None:
    free_bytes = min(shutil.disk_usage(plan.folder).free, psutil.virtual_memory().available - 2 * plan.size)
    if free_bytes < 1.1 * plan.size:
        raise Unavailable("too little room for another file of this size, on disk or in the page cache")


def _on_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def model_file(plan: Plan) -> Path:
    return there(plan.model / "model.safetensors")


def there(path: Path) -> Path:
    if not path.is_file():
        raise Unavailable("its file could not be written: too little room?")
    return path


PREPARATIONS: tuple[Callable[[Plan], Any], ...] = (prepare_snapshot, prepare_model, prepare_pickle)
