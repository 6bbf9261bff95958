"""The cases of the goals' table (docs/benchmark.md) as groups of jobs for one card, the most telling first.

A group's processes prove themselves side by side and then have their steps timed in turns, so what is compared stands
in one group. `whole` takes some seven minutes, `packing` three, `small-3b` and `small-8b` five and seven, each with
yardsticks of its own. An 8B at 14,336 tokens needs the card for one process at a time, so its rounds do not alternate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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


def whole_part() -> list[list[Job]]:
    """3B, then 8B, on the whole card, but for what needs it alone."""
    whole_3b = [
        job("3b", REFERENCE, (*SMALL, LONG), ()),
        job("3b", MISSION, (*SMALL, LONG), (GATE_CASE,)),
        *(job("3b", setting, (*SMALL, LONG)) for setting in (UNSLOTH, BF16, FP8)),
        *yardsticks("8b", SMALL),  # there is room for them while others compile
    ]
    return [whole_3b, [job("8b", setting, SMALL) for setting in (UNSLOTH, BF16, FP8)]]


def packing_part() -> list[list[Job]]:
    """Documents of real lengths, packed and padded."""
    packing = [
        *yardsticks("3b", (GATE_CASE, PADDED, PACKED)),
        *(job("3b", setting, (GATE_CASE, PACKED, PADDED), (PACKED, PADDED)) for setting in (BF16, FP8)),
    ]
    return [packing]


def small_part(shape: str) -> list[list[Job]]:
    """A model within its budget; and what of it needs the whole card alone."""
    small = jobs_of(shape, budgeted(shape), SMALL, GATE_CASE)
    long = [Job(shape=shape, setting=s, cases=(LONG,), timed=(LONG,), curve=False) for s in budgeted(shape)]
    alone = [[job(shape, setting, (LONG,))] for setting in (UNSLOTH, FP8, BF16)] if shape == "8b" else []
    return [yardsticks(shape, (*SMALL, LONG)), small, long, *alone]  # those need the card's room to themselves


def yardsticks(shape: str, cases: tuple[str, ...]) -> list[Job]:
    """What all others are measured by."""
    return [job(shape, setting, cases, ()) for setting in (REFERENCE, MISSION)]


PARTS: dict[str, Callable[[], list[list[Job]]]] = {
    "whole": whole_part,
    "packing": packing_part,
    "small-3b": functools.partial(small_part, "3b"),
    "small-8b": functools.partial(small_part, "8b"),
}


def groups_of(part: str) -> list[list[Job]]:
    """The groups of a part.

    Raises:
        ValueError: there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part; there are {', '.join(PARTS)}")
    return PARTS[part]()
