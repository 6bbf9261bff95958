"""Lengths of training windows -> the work of an optimizer step: how many micro-batches, and what is in one.

Packed rows are cut here from lengths alone, by the rule of data/batches.py, on a sample of the windows: what counts for
time is how full rows get and how long the documents in them are. Left out: the order that a seed gives; means over a
sample are good to about a percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLED_WINDOWS = 512


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What an optimizer step has to do, as means over the epoch.

    Attributes:
        micro_batches: of a step.
        positions: of a micro-batch, padding included.
        tokens: of a micro-batch, without padding.
        squares: sum of the squared lengths of a micro-batch's segments, padding included.
    """

    micro_batches: float
    positions: float
    tokens: float
    squares: float

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimizer step that are not padding."""
        return self.micro_batches * self.tokens


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step's windows become micro-batches, as train.Cutting has it."""

    packing: bool
    tokens: int
    sequences: int
    multiple: int


def step_work(lengths: Sequence[int], effective_batch: int, cut: Cut) -> StepWork:
    """The mean optimizer step over windows of these lengths in tokens.

    Args:
        lengths: of all windows, in any order.
        effective_batch: windows of a step.
        cut: into micro-batches.
    """
    every = max(1, len(lengths) // SAMPLED_WINDOWS)
    sample = np.sort(np.asarray(lengths))[::-1][::every]
    group = min(effective_batch, len(lengths), len(sample))
    groups = [sample[i::steps] for steps in [max(1, len(sample) // group)] for i in range(steps)]
    rows = [row for windows in groups for row in (_packed if cut.packing else _padded)(windows, cut)]
    windows_of_groups = sum(len(windows) for windows in groups)
    micro_batches = len(rows) / windows_of_groups * min(effective_batch, len(lengths))
    positions, tokens, squares = (float(np.mean([row[i] for row in rows])) for i in range(3))
    return StepWork(micro_batches=micro_batches, positions=positions, tokens=tokens, squares=squares)


def _packed(windows: np.ndarray, cut: Cut) -> list[tuple[float, float, float]]:
    """First-fit-decreasing; (positions, tokens, squares) of each row. Padding is a segment of its own."""
    capacity = max(cut.tokens // cut.multiple * cut.multiple, 1)
    room = np.zeros(len(windows), dtype=np.int64)
    tokens, squares = np.zeros(len(windows)), np.zeros(len(windows))
    rows = 0
    for length in windows:
        fits = np.flatnonzero(room[:rows] >= length)
        row = int(fits[0]) if len(fits) else rows
        if row == rows:
            room[row], rows = capacity, rows + 1
        room[row] -= length
        tokens[row] += length
        squares[row] += float(length) ** 2
    widths = -(-tokens[:rows] // cut.multiple) * cut.multiple
    return list(zip(widths, tokens[:rows], squares[:rows] + (widths - tokens[:rows]) ** 2, strict=True))


def _padded(windows: np.ndarray, cut: Cut) -> list[tuple[float, float, float]]:
    """Longest first, so many windows a micro-batch, each as wide as the widest."""
    found = []
    for start in range(0, len(windows), cut.sequences):
        part = windows[start : start + cut.sequences]
        width = float(-(-int(part.max()) // cut.multiple) * cut.multiple)
        found.append((len(part) * width, float(part.sum()), len(part) * width**2))
    return found
