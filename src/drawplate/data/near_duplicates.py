"""Which documents are nearly the same as another: MinHash signatures, LSH buckets, and exact Jaccard to decide.

Similarity is Jaccard over runs of five words (`data/words.py`). Signatures only propose: two documents are compared
when they agree in one of the bands (Broder 1997; Indyk & Motwani 1998), and a pair counts when the exact Jaccard of
its shingle sets reaches the threshold. With bands of r values, b of them, a pair of similarity t is proposed with
probability 1 - (1 - t**r)**b; r is chosen so that at the threshold at most one pair in a thousand is missed.

Left out: similarity of meaning (a translation, a paraphrase), and a short text inside a long one, whose Jaccard is
small; the longest shared run of words (`data/leaks.py`) shows the latter. Memory: 8 bytes a word.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
from rensa import RMinHash

from drawplate.data.words import jaccard

SIGNATURE = 144
BAND_ROWS = (18, 16, 12, 9, 8, 6, 4, 3, 2, 1)
MISSED_SHARE = 1e-3
SIGNATURE_SEED = 1


def band_rows(threshold: float) -> int:
    """Values in a band: the most with which a pair at the threshold is missed at most once in a thousand."""
    for rows in BAND_ROWS:
        if (1 - threshold**rows) ** (SIGNATURE // rows) <= MISSED_SHARE:
            return rows
    return BAND_ROWS[-1]


def buckets(shingle_sets: Seq[np.ndarray], threshold: float) -> Iterator[np.ndarray]:
    """For each band, the number of each document's bucket: int64, shape (documents,).

    Documents in one bucket agree in all of the band's values. A document without a word shares its bucket with none.
    """
    sets = [one if len(one) else np.array([i], dtype=np.uint64) for i, one in enumerate(shingle_sets)]
    offsets = np.cumsum([0, *(len(one) for one in sets)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, SIGNATURE, SIGNATURE_SEED)
    signatures = np.ascontiguousarray(np.asarray(matrix.to_rows(), dtype=np.uint32))
    rows = band_rows(threshold)
    empty = np.array([i for i, one in enumerate(shingle_sets) if not len(one)], dtype=np.int64)
    for start in range(0, SIGNATURE, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows])
        numbers = np.unique(band.view(np.dtype((np.void, 4 * rows))).ravel(), return_inverse=True)[1].ravel()
        numbers[empty] = len(sets) + np.arange(len(empty))
        yield numbers


def similar_across(train: Seq[np.ndarray], heldout: Seq[np.ndarray], threshold: float) -> dict[int, tuple[int, float]]:
    """For each training document that nearly repeats a held-out one: which, and their Jaccard.

    Held-out documents are tried from the most agreeing bands down, and the first that reaches the threshold is taken:
    a cluster of a thousand copies costs a thousand comparisons, not a million.

    Args:
        train, heldout: shingle sets, from `words.shingles`.
        threshold: least Jaccard of a near-duplicate.
    """
    if not train or not heldout:
        return {}
    agreeing: dict[int, Counter[int]] = {}
    for numbers in buckets([*train, *heldout], threshold):
        members: dict[int, list[int]] = {}
        for j, bucket in enumerate(numbers[len(train) :].tolist()):
            members.setdefault(bucket, []).append(j)
        for i, bucket in enumerate(numbers[: len(train)].tolist()):
            if bucket in members:
                agreeing.setdefault(i, Counter()).update(members[bucket])
    found: dict[int, tuple[int, float]] = {}
    for i, bands in sorted(agreeing.items()):
        for j, _ in sorted(bands.items(), key=lambda item: (-item[1], item[0])):
            similarity = jaccard(train[i], heldout[j])
            if similarity >= threshold:
                found[i] = (j, similarity)
                break
    return found


def clusters(shingle_sets: Seq[np.ndarray], threshold: float) -> list[list[int]]:
    """Groups of two or more documents that near-duplicates connect, each sorted, by union-find.

    In a bucket each document is compared with the one before it and with the first: a group whose members resemble
    neither of these there may be found in parts.
    """
    parent = list(range(len(shingle_sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    if shingle_sets:
        for numbers in buckets(shingle_sets, threshold):
            order = np.argsort(numbers, kind="stable").tolist()
            first = order[0]
            for before, here in itertools.pairwise(order):
                if numbers[before] != numbers[here]:
                    first = here
                    continue
                for other in {before, first}:
                    if root(other) != root(here) and jaccard(shingle_sets[other], shingle_sets[here]) >= threshold:
                        parent[root(here)] = root(other)
    groups: dict[int, list[int]] = {}
    for i in range(len(shingle_sets)):
        groups.setdefault(root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
