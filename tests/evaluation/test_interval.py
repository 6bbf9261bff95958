"""What a change of held-out nats means: its size, its interval and its name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.interval_coverage import WORLDS, coverage
from drawplate.evaluation.interval import Change, bits_per_byte_change, perplexity_change
from drawplate.evaluation.score import total
from drawplate.records import DocumentScore


def scores_of(nats: list[float], tokens: int = 10, bytes_a_token: int = 4) -> list[DocumentScore]:
    return [
        DocumentScore(document=f"d{i}", nats=n, tokens=tokens, bytes=bytes_a_token * tokens) for i, n in enumerate(nats)
    ]


BEFORE, AFTER = scores_of([30, 25, 28, 31, 29, 27]), scores_of([25, 24, 22, 30, 20, 26])


def test_the_change_is_that_of_the_two_perplexities() -> None:
    change = perplexity_change(BEFORE, AFTER)
    assert change.percent == pytest.approx(100 * (total(AFTER).perplexity / total(BEFORE).perplexity - 1))
    low, high = change.ci95_percent
    assert low < change.percent < high
    assert perplexity_change(BEFORE, AFTER) == change, "the same seed draws the same interval"


def test_bits_per_byte_compare_tokenizers_that_cut_differently() -> None:
    other = scores_of([s.nats for s in AFTER], tokens=7, bytes_a_token=6)
    change = bits_per_byte_change(BEFORE, other)
    assert change.percent == pytest.approx(100 * (total(other).bits_per_byte / total(BEFORE).bits_per_byte - 1))
    assert change.ci95_percent[0] < change.percent < change.ci95_percent[1]


def test_bits_per_byte_of_the_same_tokens_have_the_delta_methods_interval() -> None:
    """1,000 documents: the bootstrap's interval is close to 1.96 standard errors of the log ratio."""
    rng = np.random.default_rng(0)
    before = scores_of(list(30 + rng.normal(0, 3, 1000)))
    after = scores_of([s.nats - 2 + g for s, g in zip(before, rng.normal(0, 1, 1000), strict=True)])
    influence = [b.nats / total(after).nats - a.nats / total(before).nats for a, b in zip(before, after, strict=True)]
    reach = 1.96 * math.sqrt(np.square(influence).sum())
    low, high = bits_per_byte_change(before, after).ci95_percent
    assert math.log((100 + high) / (100 + low)) == pytest.approx(2 * reach, rel=0.1)


def test_no_change_has_an_interval_of_nothing_and_few_documents_have_none() -> None:
    assert perplexity_change(scores_of([3.0] * 6), scores_of([3.0] * 6)) == Change(percent=0.0, ci95_percent=(0.0, 0.0))
    assert perplexity_change(scores_of([3.0] * 4), scores_of([2.0] * 4)).ci95_percent is None
    same_gain = perplexity_change(scores_of([3.3] * 6), scores_of([3.1] * 6))
    assert same_gain.ci95_percent == pytest.approx((same_gain.percent, same_gain.percent))


def test_an_infinite_change_is_worse_without_an_interval() -> None:
    change = perplexity_change(scores_of([3.0] * 6), scores_of([1e9] * 6))
    assert change == Change(percent=math.inf)
    assert change.word == "worse"


@pytest.mark.parametrize(
    ("percent", "interval", "words"),
    [
        (-43.81, (-46.09, -41.16), "better: -43.8 % [-46.1, -41.2]"),
        (3.0, (0.96, 5.2), "worse: +3.0 % [+1.0, +5.2]"),
        (-0.4, (-1.9, 1.24), "no measurable change: -0.4 % [-1.9, +1.2]"),
        (-12.0, None, "unclear: -12.0 %, and too few documents for an interval"),
        (math.inf, None, "worse: beyond measure"),
    ],
)
def test_the_verdict_in_words(percent: float, interval: tuple[float, float] | None, words: str) -> None:
    assert Change(percent=percent, ci95_percent=interval).in_words() == words


@pytest.mark.parametrize("change", [perplexity_change, bits_per_byte_change])
def test_only_the_same_documents_are_compared(change) -> None:
    with pytest.raises(ValueError, match=r"same .*documents"):
        change(BEFORE, AFTER[:-1])


def test_perplexities_of_other_tokens_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        perplexity_change(scores_of([3.0] * 6), scores_of([3.0] * 6, tokens=11))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """With the demo's own documents; the whole table is bench/results/interval-coverage.json."""
    result = coverage(WORLDS["measured"], 100, 400)
    assert 93 <= result["covered_percent"] <= 97
    assert result["below_percent"] > 0
    assert result["above_percent"] > 0


def test_the_percentile_bootstrap_covers_it_less_often_with_few_documents() -> None:
    """The negative control, and the reason for the method."""
    result = coverage(WORLDS["lengths over two orders of magnitude"], 8, 200, percentile=True)
    assert result["percentile_covered_percent"] < 90 < 93 <= result["covered_percent"]
