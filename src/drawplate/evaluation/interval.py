"""What a change of held-out nats means: its size, its 95 % interval, and the verdict in words.

Two measurements of the same documents are compared document by document, because a document is the unit that was drawn
from the world; the tokens within one are alike. The change is that of a ratio of sums (nats over tokens, nats over
bytes), and its interval a bootstrap-t over documents. Documents differ in length by orders of magnitude, and a few long
ones that are unlike the rest decide the ratio: a sample that lacks them looks surer than it is, and too good. So the
standard error is the jackknife's, which takes a document's weight in the ratio into account, and the end on the side
of the heavier tail lies further out, by the second-order term of the skewness. What the percentile bootstrap and each
of these give in simulated worlds is in bench/results/interval-coverage.json.

Left out: any doubt about the documents themselves. The interval says what other documents of the same kind would have
shown; it knows nothing of other kinds, other seeds or other training runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from drawplate.records import DocumentScore
from drawplate.units import format_percent

BOOTSTRAP_RESAMPLES = 2000
FEWEST_DOCUMENTS = 5
CONFIDENCE = 0.95
_BLOCK_ELEMENTS = 2**20
_ROUNDING = 1e-12
_SKEWNESS_FACTOR = 1.5
"""(2 z^2 + 1) / 6 at z = 2, for a skewness that is already divided by the root of the number of documents."""

Word = Literal["better", "worse", "same", "unclear"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change in percent, negative where it fell, and its 95 % interval; None for too few documents."""

    percent: float
    ci95_percent: tuple[float, float] | None = None

    @property
    def word(self) -> Word:
        """Better or worse only where the whole interval lies on one side of zero; nothing is claimed without one."""
        if not math.isfinite(self.percent):
            return "worse"
        if self.ci95_percent is None:
            return "unclear"
        low, high = self.ci95_percent
        if low < 0 and high < 0:
            return "better"
        return "worse" if low > 0 and high > 0 else "same"

    def in_figures(self) -> str:
        """`-43.8 % [-46.1, -41.2]`."""
        if self.ci95_percent is None:
            return format_percent(self.percent)
        low, high = (format_percent(end).removesuffix(" %") for end in self.ci95_percent)
        return f"{format_percent(self.percent)} [{low}, {high}]"

    def in_words(self) -> str:
        """The verdict: `better: -43.8 % [-46.1, -41.2]`, `no measurable change: ...`, and so on."""
        if self.word == "unclear":
            return f"unclear: {self.in_figures()}, and too few documents for an interval"
        return f"{'no measurable change' if self.word == 'same' else self.word}: {self.in_figures()}"


def perplexity_change(before: Seq[DocumentScore], after: Seq[DocumentScore], *, seed: int = 0) -> Change:
    """Change of perplexity: 100 (exp(sum of differences of nats / sum of tokens) - 1).

    Raises:
        ValueError: the two do not score the same tokens of the same documents.
    """
    if [(s.document, s.tokens) for s in before] != [(s.document, s.tokens) for s in after]:
        raise ValueError("both must score the same tokens of the same documents")
    differences = [b.nats - a.nats for a, b in zip(before, after, strict=True)]
    return _change(np.array([differences, [s.tokens for s in before]], dtype=np.float64), _difference_a_token, seed)


def bits_per_byte_change(before: Seq[DocumentScore], after: Seq[DocumentScore], *, seed: int = 0) -> Change:
    """Change of bits per byte: comparable across tokenizers, whose tokens and first tokens differ.

    Raises:
        ValueError: the two do not score the same documents.
    """
    if [s.document for s in before] != [s.document for s in after]:
        raise ValueError("both must score the same documents")
    columns = [[s.nats for s in before], [s.bytes for s in before], [s.nats for s in after], [s.bytes for s in after]]
    return _change(np.array(columns, dtype=np.float64), _log_ratio_of_ratios, seed)


Estimator = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _difference_a_token(columns: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    estimate = sums[0] / sums[1]
    return estimate, (columns[0] - estimate * columns[1]) / sums[1]


def _log_ratio_of_ratios(columns: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nats, bytes_, other_nats, other_bytes = columns / sums
    estimate = np.log(sums[2] * sums[1] / (sums[3] * sums[0]))
    return estimate, other_nats - other_bytes - nats + bytes_


def _change(columns: np.ndarray, estimator: Estimator, seed: int) -> Change:
    """The estimate and its interval, as percents.

    A symmetric bootstrap-t (Hall 1988; Davison & Hinkley 1997, ch. 5.2) in jackknife standard errors (Efron 1982),
    one end extended by the skewness' second-order term (Hall 1992, ch. 3.3), never by more than half of the reach.

    Args:
        columns: shape (quantities, documents).
        estimator: columns and their sums (last dimension kept) -> the estimate, a log ratio, and each document's
            influence on it, whose squares give the standard error (the delta method).
        seed: of the resamples.
    """
    documents = columns.shape[1]
    estimate, error = _estimate_and_error(columns, estimator)
    change = Change(percent=percent_of(float(estimate)))
    if documents < FEWEST_DOCUMENTS or not math.isfinite(change.percent):
        return change
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // documents)
    distances: list[np.ndarray] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for done in range(0, BOOTSTRAP_RESAMPLES, block):
            draws = rng.integers(0, documents, (min(block, BOOTSTRAP_RESAMPLES - done), documents))
            other, other_error = _estimate_and_error(columns[:, draws], estimator)
            distances.append(np.abs(other - estimate) / other_error)
    every = np.nan_to_num(np.concatenate(distances), nan=0.0, posinf=np.inf)  # 0 / 0: a resample like the sample
    jackknife_error, skewness = _jackknife(columns, estimator)
    reach = float(np.quantile(every, CONFIDENCE, method="higher")) * jackknife_error if error > _ROUNDING else 0.0
    if not math.isfinite(reach):
        return change
    further = min(max(_SKEWNESS_FACTOR * skewness * jackknife_error, -reach / 2), reach / 2)
    low, high = float(estimate) - reach + min(further, 0.0), float(estimate) + reach + max(further, 0.0)
    return Change(percent=change.percent, ci95_percent=(percent_of(low), percent_of(high)))


def _jackknife(columns: np.ndarray, estimator: Estimator) -> tuple[float, float]:
    """Standard error of the estimate, and its skewness, both from leaving out one document after the other."""
    documents = columns.shape[-1]
    sums = columns.sum(axis=-1, keepdims=True)
    moved = estimator(columns, sums)[0] - estimator(columns, sums - columns)[0]
    squares = float(np.square(moved).sum())
    if squares == 0.0:
        return 0.0, 0.0
    return math.sqrt((documents - 1) / documents * squares), float((moved**3).sum()) / squares**1.5


def _estimate_and_error(columns: np.ndarray, estimator: Estimator) -> tuple[np.ndarray, np.ndarray]:
    documents = columns.shape[-1]
    sums = columns.sum(axis=-1, keepdims=True)
    estimate, influence = estimator(columns, sums)
    error = np.sqrt(documents / max(documents - 1, 1) * np.square(influence).sum(axis=-1))
    return estimate[..., 0], error


def percent_of(log_ratio: float) -> float:
    """100 (exp(x) - 1); infinite where that overflows."""
    return 100 * math.expm1(log_ratio) if log_ratio < 700 else math.inf
