"""The cases of the goals' table (docs/benchmark.md) as groups of jobs for one card, the most telling first.

A group's processes prove themselves side by side and then have their steps timed in turns, so what is compared stands
in one group. `main_part` takes some eight minutes. `long_part` are micro-batches of 14,336 tokens: both models within
their budgets, and the 8B, which needs the card for one process at a time, so that its rounds do not alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench.peers.cases import MAIN, MISSION, REFERENCE, UNSLOTH_KEPT, Job, Setting, jobs_of, within

GATE_CASE = "7x512"
SMALL = ("7x512", "2x2048")
LONG = "7x2048"
PADDED, PACKED = "climate-padded-7-28", "climate-packed-4096-28"
BUDGETS_GIB = {"3b": 6.0, "8b": 8.0}

UNSLOTH = next(s for s in MAIN if s.options == UNSLOTH_KEPT)
BF16, FP8 = (s for s in MAIN if s.system == "drawplate")


def job(shape: str, setting: Setting, cases: tuple[str, ...], timed: tuple[str, ...] | None = None) -> Job:
    """All cases are timed unless told."""
    return Job(shape=shape, setting=setting, cases=cases, timed=cases if timed is None else timed)


def budgeted(shape: str) -> list[Setting]:
    """Unsloth with as many layers kept as fit, Drawplate planned in bf16 arithmetic and in fp8."""
    return [s for s in within(BUDGETS_GIB[shape]) if s.name != "planned, nf4"]


def main_part() -> list[list[Job]]:
    """3B on the whole card, packing too; 8B on the whole card; both within their budgets."""
    everything = (*SMALL, LONG, PADDED)
    own = (GATE_CASE, PACKED, PADDED, *SMALL[1:], LONG)
    whole_3b = [
        job("3b", REFERENCE, (*everything, PACKED), ()),
        job("3b", MISSION, everything, (GATE_CASE,)),
        job("3b", UNSLOTH, (*SMALL, LONG)),
        job("3b", BF16, own),
        job("3b", FP8, own),
    ]
    whole_8b = [
        job("8b", REFERENCE, SMALL, ()),
        job("8b", MISSION, SMALL, (GATE_CASE,)),
        *(job("8b", setting, SMALL) for setting in (UNSLOTH, BF16, FP8)),
    ]
    small = [found for shape in BUDGETS_GIB for found in jobs_of(shape, budgeted(shape), SMALL, GATE_CASE)]
    return [whole_3b, whole_8b, small]


def long_part(shape: str, *, by_itself: bool) -> list[list[Job]]:
    """Micro-batches of 14,336 tokens: within the budget, and of the 8B on the whole card, one process at a time.

    Args:
        shape: of the model.
        by_itself: nothing of `main_part` ran before, so settings and yardsticks take the gate's steps here.
    """
    within_budget = [long_job(shape, setting, by_itself) for setting in budgeted(shape)]
    if shape != "8b":  # its yardsticks have proven the case in main_part
        return [[*yardsticks(shape), *within_budget] if by_itself else within_budget]
    alone = [[long_job(shape, setting, by_itself)] for setting in (UNSLOTH, BF16, FP8)]
    return [yardsticks(shape, curve=by_itself), *alone, within_budget]


def yardsticks(shape: str, *, curve: bool = True) -> list[Job]:
    """What all others are measured by, on the long case."""
    return [Job(shape=shape, setting=setting, cases=(LONG,), timed=(), curve=curve) for setting in (REFERENCE, MISSION)]


def long_job(shape: str, setting: Setting, curve: bool) -> Job:
    """One process for the long case."""
    return Job(shape=shape, setting=setting, cases=(LONG,), timed=(LONG,), curve=curve)


def groups_of(parts: Sequence[str]) -> list[list[Job]]:
    """The groups of some parts: main, long-3b, long-8b.

    Raises:
        ValueError: an unknown part.
    """
    makers = {"main": main_part} | {
        f"long-{shape}": partial(long_part, shape, by_itself="main" not in parts) for shape in BUDGETS_GIB
    }
    if unknown := set(parts) - set(makers):
        raise ValueError(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    return [group for part in makers if part in parts for group in makers[part]()]
