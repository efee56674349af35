"""The simulated day counts what it says: each request is served once, and a GPU does one thing at a time."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import cluster
from benchmarks._cluster_day import DAY_S, SOON_S, Load, Outcome, Request, Strategy, arrivals, simulate, waits_s
from residency.launch.settings import parse

ROOT = Path(__file__).resolve().parents[2]

FEW = Load(users=300, models=12, seed=3)
ALWAYS = Strategy("always", always=True)
ZERO = Strategy("zero", process_s=5, load_s=20, ends_s=300)
OURS = Strategy("ours", places=3, process_s=5, load_s=20, restore_s=2, offload_s=1, warm_s=30, ends_s=3600)
SCALING = (ZERO, OURS, replace(OURS, packs=True))


def test_arrivals_are_in_order_and_the_same_for_the_same_seed() -> None:
    requests = arrivals(FEW)
    assert requests == arrivals(FEW) != arrivals(replace(FEW, seed=4))
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < DAY_S
    assert {request.model for request in requests} == set(range(12))


def test_the_day_has_as_many_requests_as_it_says_and_most_of_them_at_its_peak() -> None:
    requests = arrivals(Load(users=5000, models=3, seed=1))
    assert len(requests) == pytest.approx(5000 * 1.5 * 4, rel=0.05)
    assert statistics.fmean(request.compute_s for request in requests) == pytest.approx(6, rel=0.03)
    hours = [sum(hour <= request.arrival_s / 3600 < hour + 2 for request in requests) for hour in (3, 15)]
    assert hours[1] > 10 * hours[0]


@pytest.mark.parametrize("strategy", [ALWAYS, *SCALING], ids=lambda one: one.name)
@pytest.mark.parametrize("gpus", [2, 8])
def test_each_request_is_served_once_and_a_gpu_computes_one_at_a_time(strategy: Strategy, gpus: int) -> None:
    requests = arrivals(FEW)
    outcome = simulate(requests, gpus, strategy)
    assert len(outcome.begun_s) == len(outcome.gpu) == len(requests)
    lacking = {request.model for request, begun_s in zip(requests, outcome.begun_s, strict=True) if begun_s is None}
    served = {request.model for request, begun_s in zip(requests, outcome.begun_s, strict=True) if begun_s is not None}
    assert not lacking & served
    assert not lacking or strategy.always
    assert all(wait_s >= 0 for wait_s in waits_s(requests, outcome))
    for gpu in range(gpus):
        times = sorted(
            (begun_s, begun_s + request.compute_s)
            for request, begun_s, on in zip(requests, outcome.begun_s, outcome.gpu, strict=True)
            if begun_s is not None and on == gpu
        )
        assert all(end_s <= begin_s + 1e-6 for (_, end_s), (begin_s, _) in pairwise(times))
    assert 0 < outcome.computing_s <= outcome.held_s + 1e-6
    assert outcome.held_s <= outcome.reserved_s + 1e-6 <= gpus * DAY_S + 1e-3


def test_always_on_no_request_waits_longer_with_more_gpus() -> None:
    requests = arrivals(replace(FEW, users=3000))
    fewer = [float("inf")] * len(requests)
    for gpus in (1, 3, 6, 12, 24):
        begun_s = [float("inf") if each is None else each for each in simulate(requests, gpus, ALWAYS).begun_s]
        assert all(now_s <= before_s + 1e-6 for now_s, before_s in zip(begun_s, fewer, strict=True))
        fewer = begun_s


@pytest.mark.parametrize("strategy", SCALING, ids=lambda one: f"{one.name} {one.packs}")
def test_requests_together_wait_no_longer_with_twice_the_gpus(strategy: Strategy) -> None:
    requests = arrivals(replace(FEW, users=1500))
    means = [statistics.fmean(waits_s(requests, simulate(requests, gpus, strategy))) for gpus in (1, 2, 4, 8, 16)]
    assert all(more <= fewer for fewer, more in pairwise(means))


def test_a_day_that_can_be_computed_by_hand() -> None:
    """Two models on one GPU: each replica starts (5 s), loads (20 s) and speaks; then they take turns."""
    requests = [Request(100, 0, 10), Request(110, 1, 10), Request(200, 0, 4), Request(1000, 1, 6)]
    outcome = simulate(requests, 1, replace(OURS, places=2))
    # 0: 105 load, 125 speaks to 135. 1 has waited since 115: offload to 136, load to 156, speaks to 166.
    # 0: model 1 left at 196 to 197, restore 200 to 202, speaks to 206. 1: restore 1000 to 1002, speaks to 1008.
    assert outcome.begun_s == [125, 156, 202, 1002]
    assert waits_s(requests, outcome) == [25, 46, 2, 2]
    assert outcome.computing_s == 30
    assert (outcome.starts, outcome.restores) == (2, 2)
    assert outcome.held_s == (135 - 105) + (166 - 135) + 31 + 6 + 31 + 8 + 31
    assert outcome.reserved_s == 1008 + 3600 - 100


def test_scale_to_zero_by_hand() -> None:
    """The second model waits until the first one's replica ends; a late request starts another replica."""
    requests = [Request(100, 0, 10), Request(110, 1, 10), Request(5000, 0, 4)]
    outcome = simulate(requests, 1, ZERO)
    assert outcome.begun_s == [125, 135 + 300 + 25, 5025]
    assert outcome.starts == 3
    assert outcome.reserved_s == (435 - 100) + (470 + 300 - 435) + (5029 + 300 - 5000)
    assert outcome.held_s == outcome.reserved_s - 3 * 5


def test_always_on_by_hand() -> None:
    """The GPU goes to the model with most requests; the other one has no replica."""
    outcome = simulate([Request(10, 1, 5), Request(11, 1, 5), Request(12, 0, 5)], 1, ALWAYS)
    assert outcome.begun_s == [10, 15, None]
    assert (outcome.held_s, outcome.reserved_s, outcome.computing_s) == (DAY_S, DAY_S, 10)


def value(requests: list[Request], outcome: Outcome) -> tuple[int, int]:
    waits = waits_s(requests, outcome)
    return sum(wait_s <= SOON_S for wait_s in waits), len(waits)


@pytest.mark.parametrize("seed", range(4))
def test_always_on_no_division_of_the_gpus_begins_more_requests_in_time(seed: int) -> None:
    requests = arrivals(Load(users=400, models=4, seed=seed, requests=12, think_s=5))
    of_models = [[request for request in requests if request.model == model] for model in range(4)]
    alone = [
        [value(its, simulate(its, gpus, ALWAYS)) if gpus else (0, 0) for gpus in range(7)] for its in of_models
    ]  # fmt: skip
    divisions = [counts for counts in product(range(7), repeat=4) if sum(counts) == 6]
    sums = [tuple(map(sum, zip(*(alone[model][n] for model, n in enumerate(counts)), strict=True)))
            for counts in divisions]  # fmt: skip
    assert value(requests, simulate(requests, 6, ALWAYS)) == max(sums)


def test_always_on_keeps_no_gpu_that_shortens_no_wait() -> None:
    outcome = simulate([Request(10, 0, 5), Request(11, 0, 5), Request(12, 1, 5)], 9, ALWAYS)
    assert outcome.begun_s == [10, 11, 12]
    assert outcome.held_s == outcome.reserved_s == 3 * DAY_S


@pytest.mark.parametrize("file", ["ray_serve", "kuberay"])
def test_the_times_of_ours_are_those_of_the_shipped_files(file: str) -> None:
    config: Any = next(yaml.safe_load_all((ROOT / f"deploy/{file}.yaml").read_text(encoding="utf-8")))
    if file == "kuberay":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    (engine,) = (each for each in application["deployments"] if each["name"] == "Engine")
    settings = parse([*shlex.split(application["args"]["engine"]), "--enable-gpu-management"])
    assumed = {part.flag: part.value for part in cluster.PARTS}
    assert assumed["keep-warm-s"] == settings.gpu_keep_warm
    assert assumed["ours-idle-s"] == settings.gpu_idle_timeout == engine["autoscaling_config"]["downscale_delay_s"]


def test_the_day_is_printed_with_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["--only", "day", "--users", "50", "--gpus", "2", "--models", "3"]) == 0
    printed = capsys.readouterr().out
    assert all(part.source in printed for part in cluster.PARTS)
    lines = printed.splitlines()
    (served,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["served", "refused"])
    assert [line[:24].strip() for line in lines[served + 1 :]] == [
        "always-on",
        "scale-to-zero, 600 s",
        "scale-to-zero, 60 s",
        *(f"ours, {fills}, {idle_s} s" for idle_s in (7200, 600) for fills in ("spread", "packed")),
    ]
