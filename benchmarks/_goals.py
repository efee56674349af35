"""Goals of the project, and the values of this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import _disk, _files, _moves
from ._material import Plan
from ._tables import GB, MB, Line

Lines = Mapping[str, Line]
_CUDA_SIZE = 8 * GB


@dataclass(frozen=True)
class Goal:
    """Goal; ``value`` is computed from the lines, None if they are missing."""

    name: str
    wanted: str
    value: Callable[[Lines], float | None]
    shown: Callable[[float], str]
    reached: Callable[[float], bool]
    cuda: bool = False
    from_size: int = 0


def goals(plan: Plan) -> list[Goal]:
    many = _moves.many_names(plan)
    moves = [_moves.FIRST, _moves.UNCHANGED, _moves.CHANGED, _moves.RESTORE]
    moves += [_files.WRITTEN, _disk.KEPT, _disk.READ, _disk.READY]
    to_cuda = _moves.TO_CUDA[1]
    return [
        _at_least("snapshot file to host / raw read of it, same memory", 0.8, _ratio(_disk.READ, _disk.RAW_FRESH)),
        Goal("host memory while on the host / weights", "<= 1.02", _host_share, "{:.3f}".format, lambda x: x <= 1.02),
        _within(f"most over the weights in any of {len(moves)} moves, host", _over(moves, "host_peak")),
        _within(f"most over the weights in any of {len(moves)} moves, device", _over(moves, "device_peak")),
        Goal(f"slowest move of {plan.many:,} tensors of 1 KB", "< 2 s", lambda lines: _slowest(lines, many),
             "{:.3f} s".format, lambda x: x < 2),
        _at_least('released to ready, times from_pretrained(device_map="cuda")', 5,
                  _ratio(_disk.READY, _disk.PRETRAINED), cuda=True),
        _at_least("restore / pinned H2D, from 8 GB", 0.9, _ratio(_moves.RESTORE, _moves.LIMITS[True][1]), True,
                  _CUDA_SIZE),
        Goal("offload unchanged, per 8 GB", "<= 50 ms", lambda lines: _CUDA_SIZE / lines[_moves.UNCHANGED].rate,
             lambda x: f"{x * 1000:.1f} ms", lambda x: x <= 0.05, True, _CUDA_SIZE),
        _at_least('restore, times pageable .to("cuda")', 4, _ratio(_moves.RESTORE, to_cuda), True),
        Goal("after offload: allocated + reserved", "0 bytes", lambda lines: _left(lines, moves[:3]),
             "{:,.0f} bytes".format, lambda x: x == 0, True),
    ]  # fmt: skip


def print_goals(plan: Plan, lines: Lines) -> list[dict[str, str]]:
    table = []
    print(f"\nmust reach\n{'':62}{'reached':>14}{'wanted':>12}")
    for goal in goals(plan):
        reached, answer = _judge(goal, plan, lines)
        print(f"{goal.name:62}{reached:>14}{goal.wanted:>12}  {answer}")
        table.append({"name": goal.name, "reached": reached, "wanted": goal.wanted, "answer": answer})
    return table


def _judge(goal: Goal, plan: Plan, lines: Lines) -> tuple[str, str]:
    if goal.cuda and plan.device != "cuda":
        return "-", "needs CUDA"
    if plan.size < goal.from_size:
        return "-", "needs --size 8GB"
    try:
        value = goal.value(lines)
    except (IndexError, KeyError, ValueError):  # a line without rows
        value = None
    if value is None:
        return "-", "not measured"
    return goal.shown(value), "yes" if goal.reached(value) else "no"


def _at_least(
    name: str, wanted: float, value: Callable[[Lines], float | None], cuda: bool = False, from_size: int = 0
) -> Goal:
    return Goal(name, f">= {wanted:g}", value, "{:.2f}".format, lambda x: x >= wanted, cuda, from_size)


def _within(name: str, value: Callable[[Lines], float | None]) -> Goal:
    return Goal(name, "<= 256 MB", value, lambda x: f"{x / MB:,.0f} MB", lambda x: x <= 256 * MB)


def _ratio(one: str, other: str) -> Callable[[Lines], float]:
    return lambda lines: lines[one].rate / lines[other].rate


def _over(moves: list[str], side: str) -> Callable[[Lines], float | None]:
    def value(lines: Lines) -> float | None:
        known = [(lines[name].most(side), lines[name].nbytes) for name in moves if lines[name].rows]
        return max((float(peak - nbytes) for peak, nbytes in known if peak is not None), default=None)

    return value


def _host_share(lines: Lines) -> float | None:
    line = lines[_moves.UNCHANGED]
    after = line.most("host_after")
    return None if after is None else after / line.nbytes


def _slowest(lines: Lines, many: list[str]) -> float:
    return max(lines[name].seconds for name in many)


def _left(lines: Lines, offloads: list[str]) -> float:
    left = [lines[name].most(what) or 0 for name in offloads for what in ("allocated_after", "reserved_after")]
    return float(max(left))
