"""Runs each measurement in a fresh process, without memory, caches or a CUDA context of another one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from residency.devices import CudaDevice

if TYPE_CHECKING:
    from ._material import Plan


class Unavailable(Exception):
    """Measurement that is not possible on this machine, with the reason."""


@dataclass(frozen=True)
class Job:
    """Function that measures the rows ``names``; ``limits`` are the names of their limits."""

    work: Callable[[Plan], Any]
    names: tuple[str, ...]
    limits: tuple[str, ...] = ()


def in_child(work: Callable[[Plan], Any], plan: Plan) -> Any:
    """Calls ``work`` in a fresh process; returns the result, or raises `Unavailable` with the reason of a failure."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, plan, sender))
    child.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "ended by the system (too little memory?)"
    except BaseException:  # end of the run
        child.kill()
        child.join()
        raise
    child.join()
    if error is not None:
        raise Unavailable(error)
    return result


def installed(package: str) -> Any:
    """Imports an optional package; raises `Unavailable` if it is missing."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed")
    return importlib.import_module(package)


def _context() -> Any:
    """Returns a forkserver context with torch imported and no GPU used, or a spawn context if unsupported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    preload = ["torch", "residency.memory.weights"]
    if CudaDevice.find() is None:  # transformers may look at the GPU when it is imported
        preload.append("transformers.models.llama.modeling_llama")
    context.set_forkserver_preload(preload)
    return context


def _work(work: Callable[[Plan], Any], plan: Plan, sender: Connection) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        sender.send((work(plan), None))
    except Unavailable as error:
        sender.send((None, str(error)))
    except Exception as error:
        sender.send((None, f"failed: {type(error).__name__}: {str(error)[:100]}".replace("\n", " ")))
