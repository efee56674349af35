"""Each measurement in a process of its own, so that none inherits memory, caches or a CUDA context of another."""

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
    """What cannot be measured on this machine; the message says why."""


@dataclass(frozen=True)
class Job:
    """A function of this folder that measures the rows called ``names``; ``limits`` names the limit of each."""

    work: Callable[[Plan], Any]
    names: tuple[str, ...]
    limits: tuple[str, ...] = ()


def in_child(work: Callable[[Plan], Any], plan: Plan) -> Any:
    """What ``work`` returns, in a fresh process; `Unavailable`, with the reason, if it does not return."""
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
    except BaseException:  # the run is being ended
        child.kill()
        child.join()
        raise
    child.join()
    if error is not None:
        raise Unavailable(error)
    return result


def installed(package: str) -> Any:
    """A package that need not be there, imported."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed")
    return importlib.import_module(package)


def _context() -> Any:
    """Forks of a process that has imported torch already, and has touched no GPU, where there is such a thing."""
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
