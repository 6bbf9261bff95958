"""Where no kernel runs on the GPU within a micro-step, between which kernels, and what the bus carries meanwhile.

Works on a list of what the GPU did (`Activity`), whoever watched it. All that computes counts as one, on whatever
streams: a replayed CUDA graph spreads its kernels over several, so a gap is time in which nothing computes at all.
Copies within the device and memsets count as computing, since later kernels wait for them as for a kernel; only copies
between host and device are copies here, and they may run during a gap.

A gap is grouped by its neighbours, not by its cause. A copy in flight makes the bus likely, a copy that ended within
the gap more so; a kernel that waits for another stream's, or for the host, looks the same as any other. A kernel that
computes very little, beside a wait, hides it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST_GROUPS = 12
LARGEST_GAPS = 15
NAME_LENGTH = 120
TO_DEVICE, TO_HOST = "HtoD", "DtoH"


@dataclass(frozen=True)
class Activity:
    """One kernel or copy: `start` in seconds on the GPU's clock; `is_copy` where it crosses the bus."""

    name: str
    stream: int
    start: float
    seconds: float
    is_copy: bool = False

    @property
    def end(self) -> float:
        """Seconds on the same clock."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Gap:
    """Time in which nothing computes, with the kernels around it and the copies in flight in it."""

    micro_step: int
    after_seconds: float  # since the micro-step's first kernel began
    start: float
    end: float
    before: Activity
    after: Activity
    copies: tuple[Activity, ...]

    @property
    def seconds(self) -> float:
        """How long nothing computes."""
        return self.end - self.start

    @property
    def copy_ended(self) -> bool:
        """A copy came to its end within the gap: what the next kernel may have waited for."""
        return any(copy.end <= self.end for copy in self.copies)

    def copying_seconds(self, *directions: str) -> float:
        """Seconds of the gap in which a copy in one of the directions runs."""
        copies = [c for c in self.copies if any(d in c.name for d in directions)]
        return sum(min(end, self.end) - max(start, self.start) for start, end in _merged(copies))


def idle_report(activities: Iterable[Activity], marker: str, kind: Callable[[str], str]) -> dict[str, Any]:
    """How long the GPU computes in a micro-step and between which kernels it does not.

    Args:
        activities: What it did in one or more micro-steps, in any order.
        marker: Part of the name of the kernel before each micro-step; what computes before the first is left out.
        kind: What kind of kernel a name is, by which gaps are grouped.

    Returns:
        Seconds and counts of a micro-step: means over all of them. Busy and idle are what lies between its first kernel
        and its last; `idle_between` is from its last kernel to the next one's first, the marker's microseconds with it.
    """
    activities = list(activities)
    steps = micro_steps(activities, marker)
    copies = sorted((a for a in activities if a.is_copy), key=lambda a: a.start)
    within = [gap for number, step in enumerate(steps) for gap in gaps_of(step, copies, number)]
    ends = [max(step, key=lambda a: a.end) for step in steps]
    spans = [end.end - step[0].start for step, end in zip(steps, ends, strict=True)]
    between = [gap for end, step in zip(ends, steps[1:], strict=False) for gap in gaps_of([end, step[0]], copies)]
    idle_of_each = [sum(gap.seconds for gap in within if gap.micro_step == number) for number in range(len(steps))]
    idle = sum(idle_of_each)
    return {
        "micro_steps_profiled": len(steps),
        "compute_busy_seconds": round((sum(spans) - idle) / len(steps), 6),
        "compute_idle_seconds": round(idle / len(steps), 6),
        "compute_idle_seconds_of_each": [round(seconds, 6) for seconds in idle_of_each],
        "idle": groups_of(within, kind, len(steps)),
        "idle_between": groups_of(between, kind, max(1, len(steps) - 1)),
        "largest_gaps": [_gap_in_words(g) for g in sorted(within, key=lambda g: -g.seconds)[:LARGEST_GAPS]],
    }


def micro_steps(activities: Iterable[Activity], marker: str) -> list[list[Activity]]:
    """What computes, by start, cut before each marker; the markers themselves are left out, and empty micro-steps."""
    steps: list[list[Activity]] = []
    for activity in sorted((a for a in activities if not a.is_copy), key=lambda a: a.start):
        if marker in activity.name:
            steps.append([])
        elif steps:
            steps[-1].append(activity)
    return [step for step in steps if step]


def gaps_of(step: Sequence[Activity], copies: Sequence[Activity], number: int = 0) -> list[Gap]:
    """The gaps of one micro-step; `step` and `copies` are sorted by start."""
    starts = [copy.start for copy in copies]
    longest_copy = max((copy.seconds for copy in copies), default=0.0)
    gaps, last = [], step[0]
    for activity in step[1:]:
        if activity.start > last.end:
            first = bisect_left(starts, last.end - longest_copy)
            candidates = copies[first : bisect_left(starts, activity.start)]
            inside = tuple(copy for copy in candidates if copy.end > last.end)
            after_seconds = last.end - step[0].start
            gaps.append(Gap(number, after_seconds, last.end, activity.start, last, activity, inside))
        if activity.end > last.end:
            last = activity
    return gaps


def groups_of(gaps: Iterable[Gap], kind: Callable[[str], str], steps: int) -> list[dict[str, Any]]:
    """The largest groups of gaps, by the kinds of kernel around them; counts and seconds of a micro-step."""
    groups: defaultdict[tuple[str, str], list[Gap]] = defaultdict(list)
    for gap in gaps:
        groups[kind(gap.before.name), kind(gap.after.name)].append(gap)
    rows = [_group_in_words(pair, group, steps) for pair, group in groups.items()]
    return sorted(rows, key=lambda row: -row["seconds"])[:LARGEST_GROUPS]


def table(report: dict[str, Any]) -> str:
    """The groups of `idle_report`, a line each."""
    between = sum(group["seconds"] for group in report["idle_between"])
    lines = [
        f"of a micro-step the GPU computes {1e3 * report['compute_busy_seconds']:.2f} ms and is idle "
        f"{1e3 * report['compute_idle_seconds']:.2f} ms; between two it is idle {1e3 * between:.2f} ms",
        f"{'idle ms':>8} {'count':>7} {'longest':>8}  HtoD  DtoH  none  a copy ended in   between",
    ]
    for label, groups in (("", report["idle"]), ("micro-steps: ", report["idle_between"])):
        lines += [
            f"{1e3 * g['seconds']:8.3f} {g['count']:7.1f} {1e3 * g['longest_seconds']:8.3f}  {g['share_htod']:4.0%}  "
            f"{g['share_dtoh']:4.0%}  {g['share_no_copy']:4.0%} {g['count_a_copy_ended']:16.1f}   "
            f"{label}{g['before']} -> {g['after']}"
            for g in groups
        ]
    return "\n".join(lines)


def _group_in_words(pair: tuple[str, str], group: list[Gap], steps: int) -> dict[str, Any]:
    seconds_by_names: defaultdict[tuple[str, str], float] = defaultdict(float)
    for gap in group:
        seconds_by_names[gap.before.name, gap.after.name] += gap.seconds
    seconds = sum(gap.seconds for gap in group)
    return {
        "before": pair[0],
        "after": pair[1],
        "count": round(len(group) / steps, 2),
        "seconds": round(seconds / steps, 7),
        "longest_seconds": round(max(gap.seconds for gap in group), 7),
        **_shares(group, seconds),
        "count_a_copy_ended": round(sum(gap.copy_ended for gap in group) / steps, 2),
        "mostly": [name[:NAME_LENGTH] for name in max(seconds_by_names, key=seconds_by_names.__getitem__)],
    }


def _gap_in_words(gap: Gap) -> dict[str, Any]:
    """`copies` begin and end in seconds since the gap's beginning."""
    return {
        "micro_step": gap.micro_step,
        "at_seconds": round(gap.after_seconds, 6),
        "seconds": round(gap.seconds, 7),
        "before": gap.before.name[:NAME_LENGTH],
        "after": gap.after.name[:NAME_LENGTH],
        **_shares([gap], gap.seconds),
        "copies": [
            [c.name[:NAME_LENGTH], c.stream, round(c.start - gap.start, 7), round(c.end - gap.start, 7)]
            for c in gap.copies
        ],
    }


def _shares(gaps: list[Gap], seconds: float) -> dict[str, float]:
    """Of the gaps' time, what part has a copy in flight; both directions at once count in both."""
    any_copy = sum(gap.copying_seconds(TO_DEVICE, TO_HOST) for gap in gaps)
    return {
        "share_htod": round(sum(gap.copying_seconds(TO_DEVICE) for gap in gaps) / seconds, 3),
        "share_dtoh": round(sum(gap.copying_seconds(TO_HOST) for gap in gaps) / seconds, 3),
        "share_no_copy": round(1 - any_copy / seconds, 3),
    }


def _merged(activities: Iterable[Activity]) -> list[tuple[float, float]]:
    """Their intervals, those that overlap or touch joined."""
    joined: list[tuple[float, float]] = []
    for activity in sorted(activities, key=lambda a: a.start):
        if joined and activity.start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], activity.end))
        else:
            joined.append((activity.start, activity.end))
    return joined
