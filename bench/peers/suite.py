"""The cases of the goals' table (docs/benchmark.md) as groups of jobs for one card, the most telling first.

A group's processes prove themselves side by side and then have their steps timed in turns, so what is compared stands
in one group. `main_part` takes some eight minutes; `long_part` are micro-batches of 14,336 tokens: 8B, which needs the
card for one process at a time (its rounds do not alternate), and both models within their budgets.
"""

from __future__ import annotations

from bench.peers.cases import MAIN, MISSION, REFERENCE, UNSLOTH_KEPT, Job, Setting, jobs_of, within

GATE_CASE = "7x512"
SMALL = ("7x512", "2x2048")
LONG = "7x2048"
PADDED, PACKED = "climate-padded-7-28", "climate-packed-4096-28"
BUDGETS_GIB = {"3b": 6.0, "8b": 8.0}

YARDSTICKS = (REFERENCE, MISSION)
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


def long_part(*, by_itself: bool) -> list[list[Job]]:
    """14,336 tokens: 8B on the whole card, one process at a time, then both within their budgets.

    Args:
        by_itself: nothing of `main_part` ran before, so settings and yardsticks take the gate's steps here.
    """
    proven = (GATE_CASE, LONG) if by_itself else (LONG,)
    shapes = list(BUDGETS_GIB) if by_itself else ["8b"]
    yardsticks = [Job(shape=s, setting=y, cases=proven, timed=(), curve=by_itself) for s in shapes for y in YARDSTICKS]
    alone = [
        [Job(shape="8b", setting=setting, cases=(LONG,), timed=(LONG,), curve=by_itself)]
        for setting in (UNSLOTH, BF16, FP8)
    ]
    within_budgets = [
        Job(shape=shape, setting=setting, cases=(LONG,), timed=(LONG,), curve=by_itself)
        for shape in BUDGETS_GIB
        for setting in budgeted(shape)
    ]
    return [yardsticks, *alone, within_budgets]
