"""Which sequences an optimizer step reads, as a pure function of (seed, position).

A step holds `effective_batch` sequences. Adam moves the adapter by about the learning rate whatever the gradient's
length, so a step of one two-character document would move it as far as a step of whole articles. Sequences with fewer
target tokens than `min_target_tokens` therefore fill no step: each joins the step that it falls into.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from drawplate.records import Sequence


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(count), int64, shape (count,), read-only.

    Sorting the raw words of a counter-based generator keyed by (seed, epoch), because numpy promises the raw stream
    for ever but not what `Generator.permutation` makes of it (NEP 19).
    """
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def fills(target_tokens: Seq[int], min_target_tokens: int) -> np.ndarray:
    """Which of these sequences fill a step, bool; all of them where none has so many target tokens."""
    enough = np.asarray(target_tokens) >= min_target_tokens
    return enough if enough.any() else ~enough


def filling(target_tokens: Seq[int], min_target_tokens: int) -> int:
    """How many of these sequences fill a step."""
    return int(fills(target_tokens, min_target_tokens).sum())


def target_tokens_of(sequences: Seq[Sequence]) -> tuple[int, ...]:
    """Tokens of each sequence that the loss counts."""
    return tuple(int(sequence.counted.sum()) for sequence in sequences)


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """The optimizer steps of a run, over all of its epochs.

    Attributes:
        target_tokens: of each sequence, in the corpus's order.
        effective_batch: sequences that fill a step.
        seed: of the order.
        min_target_tokens: sequences with fewer do not count towards `effective_batch`.
    """

    target_tokens: tuple[int, ...]
    effective_batch: int
    seed: int
    min_target_tokens: int = 0

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may be smaller."""
        return -(-filling(self.target_tokens, self.min_target_tokens) // self.effective_batch)

    def indices(self, position: int) -> np.ndarray:
        """Which sequences make up optimizer step `position`, counted from 0 over all epochs; int64, shape (sequences,).

        A step never spans two epochs: the last, shorter group of an epoch is a step of its own.
        """
        epoch, step = divmod(position, self.steps_per_epoch)
        order = epoch_order(len(self.target_tokens), self.seed, epoch)
        borders = self._borders(order)
        return order[borders[step] : borders[step + 1]]

    def target_tokens_in(self, steps: int) -> int:
        """Tokens that the loss counts in the first `steps` steps together, a token as often as it is read."""
        counted = np.array(self.target_tokens, dtype=np.int64)
        whole = steps // self.steps_per_epoch
        rest = range(whole * self.steps_per_epoch, steps)
        return int(whole * counted.sum() + sum(counted[self.indices(step)].sum() for step in rest))

    def _borders(self, order: np.ndarray) -> np.ndarray:
        """Positions in an epoch's order at which its steps begin, and its end; what fills no step joins one."""
        places = np.flatnonzero(fills(self.target_tokens, self.min_target_tokens)[order])
        return np.concatenate([[0], places[self.effective_batch :: self.effective_batch], [len(order)]])
