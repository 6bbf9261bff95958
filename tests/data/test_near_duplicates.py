from __future__ import annotations

import random

import numpy as np
import pytest

from drawplate.data.near_duplicates import MISSED_SHARE, SIGNATURE, band_rows, clusters, similar_across
from drawplate.data.words import jaccard


def planted(similarity: float, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` elements with that Jaccard, or a little more."""
    rng = np.random.default_rng(seed)
    shared = int(np.ceil(2 * size * similarity / (1 + similarity)))
    numbers = rng.integers(1, 2**63, 2 * size, dtype=np.uint64)
    return np.sort(numbers[:size]), np.sort(np.concatenate([numbers[:shared], numbers[size : 2 * size - shared]]))


def test_pairs_at_the_threshold_are_found_and_their_jaccard_is_exact():
    pairs = [planted(0.8, 200, seed) for seed in range(300)]
    found = similar_across([a for a, _ in pairs], [b for _, b in pairs], 0.8)
    assert len(found) >= 297
    assert all(found[i] == (i, jaccard(*pairs[i])) for i in found)


def test_pairs_below_the_threshold_are_not():
    pairs = [planted(0.75, 200, seed) for seed in range(300)]
    assert similar_across([a for a, _ in pairs], [b for _, b in pairs], 0.8) == {}
    assert len(similar_across([a for a, _ in pairs], [b for _, b in pairs], 0.7)) >= 297


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99])
def test_bands_miss_at_most_one_pair_in_a_thousand_at_the_threshold(threshold):
    rows = band_rows(threshold)
    assert SIGNATURE % rows == 0
    assert (1 - threshold**rows) ** (SIGNATURE // rows) <= MISSED_SHARE


def test_clusters_follow_chains_and_leave_single_documents_out():
    first, second = planted(0.85, 400, 1)
    third = np.sort(np.concatenate([second[:370], np.arange(30, dtype=np.uint64)]))
    alone = planted(0.8, 400, 2)[0]
    order = [third, alone, first, second]
    random.Random(3).shuffle(order)
    [group] = clusters(order, 0.8)
    assert sorted(id(order[i]) for i in group) == sorted(id(one) for one in (first, second, third))


def test_documents_without_a_word_resemble_nothing():
    none = np.zeros(0, dtype=np.uint64)
    assert similar_across([none, none], [none], 0.8) == {}
    assert clusters([none, none, none], 0.8) == []
    assert similar_across([], [none], 0.8) == {}


def test_a_thousand_copies_cost_no_million_comparisons(monkeypatch):
    compared = 0

    def counting(first, second):
        nonlocal compared
        compared += 1
        return jaccard(first, second)

    monkeypatch.setattr("drawplate.data.near_duplicates.jaccard", counting)
    one = planted(0.8, 100, 1)[0]
    assert len(similar_across([one] * 500, [one] * 500, 0.8)) == 500
    assert len(clusters([one] * 1000, 0.8)[0]) == 1000
    assert compared == 500 + 999
