"""Measures models in worker processes beside models in this process, and looks for leaks under random kills.

    python benchmarks/isolation.py                  # everything; some minutes on two cores
    python benchmarks/isolation.py --cycles 1000    # as many cycles of load, use, offload, release as the goal wants

The times are medians of pairs that alternate between the two modes. In the cycles, workers, fork servers and helper
processes for checkpoints are killed at random moments (SIGKILL), and in further rounds the manager's own process. The
helper is the driver's, over a stand-in for cuda-core that changes the books of the simulated card. Counts what is left:
processes, descriptors, shared memory, sockets, threads, main memory. Exits with 1 if a goal is missed. For measurements
on a GPU: benchmarks/isolation_gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import os
import pickle
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from safetensors.torch import load_file, save_file

from gpu_manager import GPUResourceManager, SimulatedDevice, State, kept_weights
from residency.errors import ResidencyError
from residency.workers.checkpoints import DriverCheckpoints
from tts_gpu_managed import GPUManagedTTS

MODEL = "tts"
SAMPLE_RATE = 24_000
STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "support" / "fake_cuda_core"


class Engine:
    """Engine of ``nbytes`` with an answer of ``audio_s`` seconds."""

    def __init__(self, nbytes: int, audio_s: float) -> None:
        self.weights = [torch.randn(1 << 20) for _ in range(nbytes >> 22)]
        self.audio = torch.zeros(1, int(audio_s * SAMPLE_RATE))

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        return self.audio, SAMPLE_RATE


@contextlib.contextmanager
def managed(isolation: str, nbytes: int, audio_s: float, keep_warm: float) -> Iterator[GPUManagedTTS]:
    with GPUResourceManager(SimulatedDevice(8 << 30), isolation=isolation, keep_warm=keep_warm) as manager:
        yield GPUManagedTTS(None, manager=manager, load=lambda: Engine(nbytes, audio_s), name=MODEL)


class Checkpoints(DriverCheckpoints):
    """The driver's, in its helper process, over a stand-in for cuda-core that changes the books of a simulated card."""

    _obstacle = None

    def __init__(self, card: SimulatedDevice, folder: Path) -> None:
        super().__init__()
        (folder / "card").write_bytes(pickle.dumps(card))
        os.environ["FAKE_CHECKPOINTS"] = str(folder)
        sys.path.insert(0, str(STAND_IN))


@contextlib.contextmanager
def with_helper(folder: Path) -> Iterator[GPUManagedTTS]:
    card = SimulatedDevice(8 << 30, context_bytes=400 << 20)
    with GPUResourceManager(card, isolation="process") as manager:
        manager._isolation._checkpoints = Checkpoints(card, folder)
        yield GPUManagedTTS(None, manager=manager, load=lambda: Engine(4 << 20, 1.0), name=MODEL)


def timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def calls(audio_s: float, rounds: int) -> dict[str, float]:
    """Returns the median seconds of one call of a resident model, by mode."""
    times: dict[str, list[float]] = {"none": [], "process": []}
    with managed("none", 1 << 22, audio_s, -1) as here, managed("process", 1 << 22, audio_s, -1) as there:
        for _ in range(rounds + 1):
            for mode, tts in (("none", here), ("process", there)):
                times[mode].append(timed(lambda tts=tts: tts.clone("", "", "")))
    return {mode: statistics.median(values[1:]) for mode, values in times.items()}


def returns(nbytes: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds from a request for an offloaded model until it has it, by mode."""
    times: dict[str, list[float]] = {"none": [], "process": []}
    with managed("none", nbytes, 1.0, 0) as here, managed("process", nbytes, 1.0, 0) as there:
        for number in range(rounds + 1):
            for mode, tts in (("none", here), ("process", there)):
                tts.clone("", "", "")
                tts.manager.offload(MODEL)

                def enter(tts: GPUManagedTTS = tts) -> None:
                    with tts.lease():
                        nonlocal entered_s
                        entered_s = time.perf_counter()

                entered_s, began_s = 0.0, time.perf_counter()
                enter()
                tts.manager.wait_for(MODEL, State.HOST)
                if number:
                    times[mode].append(entered_s - began_s)
    return {mode: statistics.median(values) for mode, values in times.items()}


def first_answers(rounds: int) -> dict[str, float]:
    """Returns the median seconds from a request for the released built-in engine to its answer, by mode."""
    from hibari import Hibari

    times: dict[str, list[float]] = {"none": [], "process": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        prompt = str(Path(folder) / "prompt.wav")
        Hibari().save("Good morning, this is my voice.", prompt, seed=1)
        engines = {}
        for mode in times:
            manager = stack.enter_context(GPUResourceManager(SimulatedDevice(8 << 30), isolation=mode))
            engines[mode] = GPUManagedTTS(None, manager=manager)
        for number in range(rounds + 1):
            for mode, tts in engines.items():
                tts.force_release()
                seconds = timed(lambda tts=tts: tts.clone(prompt, "Good morning, this is my voice.", "Good morning."))
                if number:
                    times[mode].append(seconds)
    return {mode: statistics.median(values) for mode, values in times.items()}


class LoadedEngine(torch.nn.Module):
    """Engine of ``nbytes`` with weights from a file, or from main memory if they have outlived a worker."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(1 << 20) for _ in range(nbytes >> 22))

    def clone(self, prompt_wav_path: str, prompt_text: str, target_text: str) -> tuple[torch.Tensor, int]:
        return self.weights[0][:SAMPLE_RATE].detach()[None], SAMPLE_RATE


def load_engine(nbytes: int, file: str, asks: bool) -> LoadedEngine:
    with torch.device("meta"):
        engine = LoadedEngine(nbytes)
    weights = kept_weights("") if asks else None
    engine.load_state_dict(load_file(file) if weights is None else weights, assign=True)
    return engine


def deaths(nbytes: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds from the first request after a worker has died while its model was offloaded."""
    times: dict[str, list[float]] = {"kept weights": [], "file in the page cache": [], "file on the disk": []}
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        file = str(Path(folder) / "weights.safetensors")
        save_file({f"weights.{number}": torch.randn(1 << 20) for number in range(nbytes >> 22)}, file)
        with GPUResourceManager(SimulatedDevice(8 << 30), isolation="process") as manager:
            engines = {}
            for source in times:
                load = functools.partial(load_engine, nbytes, file, source == "kept weights")
                engines[source] = GPUManagedTTS(None, manager=manager, load=load, name=source)
            for _ in range(rounds):
                for source, tts in engines.items():
                    tts.clone("", "", "")
                    manager.offload(source)
                    kill_worker(manager, source)
                    if source == "file on the disk":
                        drop_from_page_cache(file)
                    times[source].append(timed(lambda tts=tts: tts.clone("", "", "")))
                    manager.release(source)
    return {source: statistics.median(seconds) for source, seconds in times.items()}


def kill_worker(manager: GPUResourceManager, name: str) -> None:
    """Kills the worker of an offloaded model, and waits until the manager has noticed it."""
    worker = psutil.Process(manager.status()["models"][name]["worker"]["pid"])
    worker.kill()
    psutil.wait_procs([worker])
    while manager.status()["models"][name]["worker"] is not None:
        time.sleep(0.01)
    manager.wait_for(name, State.RELEASED, 1.0)  # not with kept weights


def drop_from_page_cache(file: str) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def holdings() -> dict[str, int]:
    """Returns what this process and its children hold."""
    gc.collect()
    process = psutil.Process()
    fds = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _exists(name)]
    return {
        "child processes": len(process.children(recursive=True)),
        "file descriptors": len(fds),
        "of these, sockets": sum(name.startswith("socket:") for name in fds),
        "of these, shared memory": sum("memfd:" in name for name in fds),
        "files in /dev/shm": len(os.listdir("/dev/shm")),
        "threads": threading.active_count(),
        "main memory, MB": process.memory_info().rss >> 20,
    }


def _exists(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def kind_of(process: psutil.Process) -> str:
    try:
        if any("checkpoint_helper" in argument for argument in process.cmdline()):
            return "helper"
        name = process.name()
    except psutil.Error:  # it has ended
        return "other"
    return name.removeprefix("gpu-").partition(":")[0] if name.startswith("gpu-") else "other"


def one_cycle(tts: GPUManagedTTS, draw: random.Random, kill_share: float, killed: Counter[str]) -> str:
    """Loads, uses, offloads and releases; perhaps kills a process meanwhile, counted by kind. Returns the outcome."""
    killer = None
    if draw.random() < kill_share:
        victims = psutil.Process().children(recursive=True)
        delay_s, pick = draw.random() * 0.05, draw.random()

        def kill() -> None:
            time.sleep(delay_s)
            there = psutil.Process().children(recursive=True) or victims
            with contextlib.suppress(psutil.Error, IndexError):
                victim = there[int(pick * len(there))]
                kind = kind_of(victim)
                victim.kill()
                killed[kind] += 1

        killer = threading.Thread(target=kill)
        killer.start()
    outcome = "ok"
    try:
        audio, _ = tts.clone("", "", "")
        assert audio.shape == (1, SAMPLE_RATE)
        tts.force_offload()
        if draw.random() < 0.5:
            tts.clone("", "", "")
        tts.force_release()
    except (ResidencyError, ChildProcessError, OSError) as error:
        outcome = type(error).__name__
    if killer is not None:
        killer.join()
    return outcome


def cycles(options: argparse.Namespace) -> tuple[Counter[str], Counter[str], dict[str, tuple[int, int]]]:
    """Runs cycles; returns the outcomes, the killed, and what was held after the first tenth and at the end."""
    draw, outcomes, killed, early = random.Random(options.seed), Counter[str](), Counter[str](), dict[str, int]()
    with with_helper(options.folder) as tts:
        for number in range(options.cycles):
            outcomes[one_cycle(tts, draw, options.kill, killed)] += 1
            if number == options.cycles // 10:
                early = settled(tts)
        late = settled(tts)
    return outcomes, killed, {name: (early[name], late[name]) for name in late}


def settled(tts: GPUManagedTTS) -> dict[str, int]:
    """Returns what is held after a successful cycle, with the fork server and the helper alone left."""
    for _ in range(10):
        with contextlib.suppress(ResidencyError, ChildProcessError, OSError):
            tts.clone("", "", "")
            tts.force_offload()
            tts.force_release()
            break
    return holdings()


def killed_managers(options: argparse.Namespace) -> list[float]:
    """Kills the manager's process at random moments; returns the seconds until all of its processes have ended."""
    seconds, draw = [], random.Random(1)
    command = [sys.executable, __file__, "--only-cycles", "1000", "--folder", str(options.folder)]
    for _ in range(options.managers):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()  # its first model is loaded
        time.sleep(draw.random())
        family = psutil.Process(child.pid).children(recursive=True)
        began_s = time.perf_counter()
        child.send_signal(signal.SIGKILL)
        child.wait()
        _, alive = psutil.wait_procs(family, 30)
        seconds.append(time.perf_counter() - began_s if not alive else float("inf"))
        child.stdout.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cycles", type=int, default=200, help="cycles of load, use, offload, release (200)")
    add("--kill", type=float, default=0.2, help="share of cycles in which a process is killed (0.2)")
    add("--managers", type=int, default=10, help="how many manager processes are killed (10)")
    add("--mb", type=int, default=1024, help="size of the engine that returns, in MB (1024)")
    add("--rounds", type=int, default=7, help="rounds of the slow measurements (7)")
    add("--seed", type=int, default=0, help="of the random kills (0)")
    add("--only-cycles", type=int, default=0, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_cycles:
        only_cycles(options)
        return
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f}, simulated card",
        flush=True,
    )
    missed = measured(options)
    compare_deaths(options)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        missed = survived(options) or missed
    if missed:
        sys.exit(1)


def measured(options: argparse.Namespace) -> bool:
    """Prints the times in both modes; returns whether a goal is missed."""
    call, long, back = calls(10, 200), calls(600, 9), returns(options.mb << 20, options.rounds)
    first = first_answers(options.rounds)
    rows = [
        ("call with 10 s of audio", call, "+", 1.5e-3), ("call with 10 minutes of audio", long, "+", 50e-3),
        (f"offloaded to ready, {options.mb} MB", back, "x", 1.3),
        ("released to first answer, built-in engine", first, "x", 2.0),
    ]  # fmt: skip
    print(f"\n{'median, ms':44}{'in process':>12}{'in worker':>12}{'reached':>12}{'wanted':>12}")
    missed = False
    for name, times, kind, most in rows:
        here, there = times["none"], times["process"]
        value = there - here if kind == "+" else there / here
        shown = f"+{value * 1000:.2f} ms" if kind == "+" else f"x {value:.2f}"
        wanted = f"<= {most * 1000:g} ms" if kind == "+" else f"<= x {most:g}"
        missed = missed or value > most
        verdict = "yes" if value <= most else "no"
        print(f"{name:44}{here * 1000:12.2f}{there * 1000:12.2f}{shown:>12}{wanted:>12}  {verdict}", flush=True)
    return missed


def compare_deaths(options: argparse.Namespace) -> None:
    """Prints the time to the first answer after a worker has died while its model was offloaded."""
    found = deaths(options.mb << 20, options.rounds)
    kept_s = found["kept weights"]
    print(f"\ndied while offloaded, to the first answer, {options.mb} MB; median, ms")
    for source, seconds in found.items():
        print(f"{source:44}{seconds * 1000:12.2f}{'':12}{f'x {seconds / kept_s:.2f}':>12}", flush=True)


def survived(options: argparse.Namespace) -> bool:
    """Prints what the cycles have left; returns whether anything leaks."""
    outcomes, killed, held = cycles(options)
    print(f"\n{options.cycles} cycles, kills in {options.kill:.0%}: {listed(outcomes)}\nkilled: {listed(killed)}")
    print(f"{'held':44}{'early':>12}{'late':>12}")
    missed = False
    for name, (early, late) in held.items():
        leaks = late > early + (64 if "memory, MB" in name else 0)
        missed = missed or leaks
        print(f"{name:44}{early:12}{late:12}  {'LEAK' if leaks else 'no leak'}")
    seconds = killed_managers(options)
    missed = missed or max(seconds) == float("inf")
    print(f"\n{len(seconds)} managers killed: all of their processes ended after {max(seconds):.2f} s at most")
    return missed


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


def only_cycles(options: argparse.Namespace) -> None:
    """Runs cycles without kills, in the process that `killed_managers` ends."""
    draw = random.Random(0)
    with with_helper(options.folder) as tts:
        for number in range(options.only_cycles):
            one_cycle(tts, draw, 0, Counter())
            if number == 0:
                print("loaded", flush=True)


if __name__ == "__main__":
    main()
