"""The cases of the goals' table (docs/benchmark.md) as groups of jobs for one card, the most telling first.

A group's processes prove themselves side by side and then have their steps timed in turns, so what is compared stands
in one group. `main` takes some nine minutes, `long` eight: micro-batches of 14,336 tokens within the budgets, and of
the 8B on the whole card, which it needs for one process at a time, so that its rounds do not alternate.
"""

from __future__ import annotations

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
    """3B on the whole card, packing too; both within their budgets; 8B on the whole card.

    The 8B's yardsticks are in the first group because there is room for them while others compile.
    """
    everything = (*SMALL, LONG, PADDED)
    own = (GATE_CASE, PACKED, PADDED, *SMALL[1:], LONG)
    whole_3b = [
        job("3b", REFERENCE, (*everything, PACKED), ()),
        job("3b", MISSION, everything, (GATE_CASE,)),
        job("3b", UNSLOTH, (*SMALL, LONG)),
        job("3b", BF16, own),
        job("3b", FP8, own),
        *yardsticks("8b", SMALL),
    ]
    small = [found for shape in BUDGETS_GIB for found in jobs_of(shape, budgeted(shape), SMALL, GATE_CASE)]
    return [whole_3b, small, [job("8b", setting, SMALL) for setting in (UNSLOTH, BF16, FP8)]]


def long_part() -> list[list[Job]]:
    """Micro-batches of 14,336 tokens; all that they are measured by is proven here, too."""
    within_budgets = [job(shape, setting, (LONG,)) for shape in BUDGETS_GIB for setting in budgeted(shape)]
    alone = [[job("8b", setting, (LONG,))] for setting in (UNSLOTH, BF16, FP8)]
    return [[*yardsticks("3b", (LONG,)), *yardsticks("8b", (LONG,))], within_budgets, *alone]


def yardsticks(shape: str, cases: tuple[str, ...]) -> list[Job]:
    """What all others are measured by."""
    return [job(shape, setting, cases, ()) for setting in (REFERENCE, MISSION)]


PARTS = {"main": main_part, "long": long_part}


def groups_of(part: str) -> list[list[Job]]:
    """The groups of a part.

    Raises:
        ValueError: there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part; there are {', '.join(PARTS)}")
    return PARTS[part]()
