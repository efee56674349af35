"""Measures the speech API on a local Ray Serve, and simulates a day of many users on many GPUs.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --only day --users 20000 --models 50

``ray`` needs Ray (`pip install "ray[serve]"`): two nodes, as processes here; 1, 2 and 4 replicas answer requests over
HTTP. Replicas share the cores of this machine, so the built-in engine cannot scale beyond them; an engine that sleeps
shows the routing alone. The overhead of the ingress is the time of a request over HTTP less that of the same call by
the driver to a replica, alternately, with one replica. RAY_SERVE_ENABLE_HA_PROXY=1 in front of the command has HAProxy
answer HTTP, which comes with Ray, in place of Serve's own proxy.

``day`` is a simulation: no Ray, no GPU. It prints all of its assumptions. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._cluster_day import HOUR_S, SOON_S, Load, Outcome, Request, Strategy, arrivals, simulate, waits_s

MOST_OVERHEAD_S = 0.015


@dataclass(frozen=True)
class Part:
    """A number of the simulation, and its source."""

    flag: str
    value: float
    unit: str
    source: str

    @property
    def name(self) -> str:
        return self.flag.replace("-", "_")


PARTS = (
    Part("users", 10_000, "users", "assumed"),
    Part("gpus", 100, "GPUs", "assumed; on each, one model fits at a time"),
    Part("sessions", 1.5, "a user and day", "assumed"),
    Part("requests", 4, "a session", "assumed: mean of a geometric distribution"),
    Part("sentences", 5, "most in a request", "assumed: uniform from 1"),
    Part("sentence-s", 2, "s of a GPU", "assumed; not measured on a GPU"),
    Part("think-s", 20, "s", "assumed: mean between two requests of a session, beside the seconds of the first"),
    Part("swing", 0.9, "of the average", "assumed: arrivals at 16 h are 1 + this times the average, at 4 h 1 - this"),
    Part("models-per-gpu", 8, "models", "assumed: 8 of 14 GB in 112 GB of main memory for each GPU"),
    Part("process-s", 10, "s", "assumed, before the load; from zero to an answer of the built-in engine: 15.4 s"),
    Part("load-s", 30, "s with the GPU", "assumed: 14 GB from a shared disk, and the engine; not measured on a GPU"),
    Part("restore-s", 0.56, "s", "calculated: 14 GB from main memory at 25 GB/s (PCIe 4); not measured on a GPU"),
    Part("offload-s", 0.5, "s", "14 GB at 28 GB/s: results/restore-cpu-2026-11-23.txt, on a simulated card"),
    Part("keep-warm-s", 30, "s", "deploy/ray_serve.yaml, deploy/kuberay.yaml: --gpu-keep-warm"),
    Part("zero-idle-s", 600, "s", "assumed, for scale-to-zero; also 60 s"),
    Part("ours-idle-s", 7200, "s", "the same files: --gpu-idle-timeout and downscale_delay_s; also 600 s"),
)  # fmt: skip
ALSO = (
    "Models: the k-th is used 1/k as often as the first. A user stays with one model in a session.",
    "Always-on: each GPU has one model, all day. Of all divisions of the GPUs it has the best one for the requests of",
    f"that day, known in advance: most begun within {SOON_S:g} s, then fewest refused, then the least waiting.",
    "GPUs that shorten no wait are not reserved. Requests for a model without a GPU are refused.",
    "Scale-to-zero: a replica starts when a model has more requests than replicas, and ends when it was idle for long;",
    "if all GPUs have one, it waits for the end of another. Requests are answered in order of arrival.",
    "Ours: the same, but several models have a place on each GPU and take turns there, in order of the requests; idle",
    "ones are in main memory. A load takes the GPU all the time. spread: a model gets the GPU with fewest models;",
    "packed: the fullest one with a place, so that whole GPUs stay free. Serve itself does not place single models: it",
    "starts replicas by the requests of all models together, and each may get any number of models.",
    "All: the day begins with no replica (but always-on); machines are there, and none fails; routing takes no time.",
)


def strategies(plan: argparse.Namespace) -> list[Strategy]:
    def zero(ends_s: float) -> Strategy:
        return Strategy(f"scale-to-zero, {ends_s:g} s", process_s=plan.process_s, load_s=plan.load_s, ends_s=ends_s)

    def ours(ends_s: float, packs: bool) -> Strategy:
        return Strategy(
            f"ours, {'packed' if packs else 'spread'}, {ends_s:g} s", int(plan.models_per_gpu), packs, False,
            plan.process_s, plan.load_s, plan.restore_s, plan.offload_s, plan.keep_warm_s, ends_s,
        )  # fmt: skip

    return [
        Strategy("always-on", always=True),
        *(zero(ends_s) for ends_s in sorted({plan.zero_idle_s, 60.0}, reverse=True)),
        *(ours(ends_s, packs) for ends_s in sorted({plan.ours_idle_s, 600.0}, reverse=True) for packs in (False, True)),
    ]


def print_day(plan: argparse.Namespace) -> None:
    print("\nA simulated day. Assumptions, and their sources:")
    for part in PARTS:
        print(f"  --{part.flag:16}{getattr(plan, part.name):>8g} {part.unit:18} {part.source}")
    print("\n".join(f"  {line}" for line in ALSO))
    print(f"  --seed {plan.seed}")
    for models in plan.models:
        load = Load(
            int(plan.users), models, plan.seed, plan.sessions, plan.requests, int(plan.sentences), plan.sentence_s,
            plan.think_s, plan.swing,
        )  # fmt: skip
        requests = arrivals(load)
        print(f"\n{models} models, {len(requests):,} requests on {plan.gpus:g} GPUs ({plan.gpus * 24:,g} GPU-hours)")
        print(f"{'':24}{'served':>9}{'refused':>9}{'p50 wait':>10}{'p95 wait':>10}{'p99 wait':>10}{'in 2 s':>8}"
              f"{'reserved':>10}{'weights':>9}{'computing':>11}{'loads':>8}{'restores':>10}")  # fmt: skip
        for strategy in strategies(plan):
            print(row(strategy.name, requests, simulate(requests, int(plan.gpus), strategy)))


def row(name: str, requests: Sequence[Request], outcome: Outcome) -> str:
    waits = sorted(waits_s(requests, outcome))
    soon = sum(wait_s <= SOON_S for wait_s in waits) / len(requests)
    return (
        f"{name:24}{len(waits):9,}{len(requests) - len(waits):9,}"
        + "".join(f"{waits[math.ceil(share * len(waits)) - 1]:8.1f} s" for share in (0.5, 0.95, 0.99))
        + f"{soon:8.1%}{outcome.reserved_s / HOUR_S:8,.0f} h{outcome.held_s / HOUR_S:7,.0f} h"
        f"{outcome.computing_s / HOUR_S:9,.0f} h{outcome.starts:8,}{outcome.restores:10,}"
    )


def print_ray(plan: argparse.Namespace) -> bool:
    """Returns whether the goals are reached."""
    from benchmarks import _cluster_ray as measure

    reached = True
    with measure.local_ray() as url:
        print(f"\nHTTP by {'HAProxy' if os.environ.get('RAY_SERVE_ENABLE_HA_PROXY') == '1' else 'the proxy of Serve'}")
        if "builtin" in plan.engine and plan.replicas:
            print(f"from no replica to the first answer of the built-in engine: {measure.from_zero_s(url):.1f} s")
        if plan.replicas:
            print(f"\n{'':10}{'replicas':>10}{'requests':>10}{'per second':>12}{'p50':>9}{'p95':>9}{'sent again':>12}")
        for engine in plan.engine:
            for replicas in plan.replicas:
                done = measure.throughput(url, engine, replicas, plan.count, plan.clients)
                print(f"{engine:10}{replicas:10}{plan.count:10}{plan.count / done.whole_s:12.2f}"
                      f"{done.percentile(50):7.2f} s{done.percentile(95):7.2f} s{done.retries:12}")  # fmt: skip
        print(f"\n{'overhead of the ingress':26}{'request':>10}{'direct':>10}{'difference':>12}   (medians)")
        for engine in plan.engine:
            by_http, direct = measure.overhead(url, engine, plan.pairs)
            more_s = statistics.median(a - b for a, b in zip(by_http, direct, strict=True))
            verdict = "(its own time varies by more)"
            if engine == "sleep":
                reached = more_s <= MOST_OVERHEAD_S
                verdict = f"<= {MOST_OVERHEAD_S * 1000:g} ms: {'yes' if reached else 'no'}"
            print(f"{engine + f', {plan.pairs} pairs':26}{statistics.median(by_http) * 1000:7.1f} ms"
                  f"{statistics.median(direct) * 1000:7.1f} ms{more_s * 1000:9.1f} ms"
                  f"   {verdict}")  # fmt: skip
    return reached


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=["ray", "day"], help="one part (both)")
    add("--engine", nargs="+", choices=["builtin", "sleep"], default=["builtin", "sleep"], help="ray (both)")
    add("--replicas", nargs="*", type=int, default=[1, 2, 4], help="ray; none: the overhead alone (1 2 4)")
    add("--count", type=int, default=64, help="ray: requests for each number of replicas (64)")
    add("--clients", type=int, default=8, help="ray: threads that send requests (8)")
    add("--pairs", type=int, default=100, help="ray: calls for the overhead (100)")
    add("--models", nargs="+", type=int, default=[20, 100, 400], help="day: numbers of models (20 100 400)")
    add("--seed", type=int, default=1, help="day: of the arrivals (1)")
    for part in PARTS:
        add(f"--{part.flag}", type=float, default=part.value, help=f"day: {part.unit} ({part.value:g})")
    plan = parser.parse_args(arguments)
    print(f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, load average "
          f"{os.getloadavg()[0]:.1f}; no GPU")  # fmt: skip
    reached = print_ray(plan) if plan.only != "day" else True
    if plan.only != "ray":
        print_day(plan)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
