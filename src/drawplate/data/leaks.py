"""The longest run of words that a held-out document shares with a training document: the worst overlap that is left.

A shared run of n words contains shared runs of every smaller length, so the length is found by binary search, here by
lifting: the hash of 2n words is made of the hashes of n words n apart, and at each length only the places that still
match are kept. O(words x log(longest run)) time and 8 bytes a word at each kept length; a suffix automaton would be
linear in one pass but takes a hundred times the memory in Python. Equal 64-bit hashes are taken for equal words: for
ten million training words and a million held-out ones the chance of one wrong match is about one in a million.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from drawplate.data.words import combined


@dataclass(frozen=True, kw_only=True)
class SharedRun:
    """`words` words in a row that are the same in two documents, given by their positions in the two lists."""

    words: int
    first: int
    second: int


def longest_shared_run(first: Seq[np.ndarray], second: Seq[np.ndarray]) -> SharedRun | None:
    """The longest run of words that a document of `first` and one of `second` share; None where they share no word.

    Of several equally long runs it is the one that comes first in `first`, then in `second`.

    Args:
        first, second: each document's word hashes, from `words.word_hashes`.
    """
    sides = (_Side.of(first), _Side.of(second))
    places = tuple(np.arange(len(side.words)) for side in sides)
    places = _matching(places, tuple(side.words for side in sides))
    if not len(places[0]):
        return None
    length, hashes = 1, tuple(side.words for side in sides)  # hashes[s][i]: of the `length` words from place i on
    powers = [(1, hashes)]
    while True:
        longer, candidates = _extended(sides, places, powers[-1], powers[-1])
        if not len(candidates[0]):
            break
        length, hashes, places = 2 * powers[-1][0], longer, candidates
        powers.append((length, hashes))
    for power in reversed(powers[:-1]):
        longer, candidates = _extended(sides, places, (length, hashes), power)
        if len(candidates[0]):
            length, hashes, places = length + power[0], longer, candidates
    start = int(places[0][0])
    other = int(next(p for p in places[1] if hashes[1][p] == hashes[0][start]))
    return SharedRun(words=length, first=int(sides[0].document[start]), second=int(sides[1].document[other]))


Hashes = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Side:
    """All documents end to end: the words, the document of each, and where that document ends."""

    words: np.ndarray
    document: np.ndarray
    end: np.ndarray

    @staticmethod
    def of(documents: Seq[np.ndarray]) -> _Side:
        lengths = [len(words) for words in documents]
        words = np.concatenate([np.zeros(0, dtype=np.uint64), *documents])
        ends = np.cumsum(lengths, dtype=np.int64)
        return _Side(words, np.repeat(np.arange(len(lengths)), lengths), np.repeat(ends, lengths))


def _extended(
    sides: tuple[_Side, ...], places: Hashes, left: tuple[int, Hashes], right: tuple[int, Hashes]
) -> tuple[Hashes, Hashes]:
    """Hashes of `left`'s words followed by `right`'s, and the places where both sides have the same."""
    total = left[0] + right[0]
    inside, hashes = [], []
    for side, here, before, after in zip(sides, places, left[1], right[1], strict=True):
        here = here[here + total <= side.end[here]]
        here = here[after[here + left[0]] != 0]  # 0: dropped at a smaller length, on this side or on both
        longer = np.zeros_like(before)
        longer[here] = combined(before[here], after[here + left[0]])
        inside.append(here)
        hashes.append(longer)
    return tuple(hashes), _matching(tuple(inside), tuple(hashes))


def _matching(places: Hashes, hashes: Hashes) -> Hashes:
    """Of the places of each side, those whose hash the other side has too."""
    values = [own[here] for here, own in zip(places, hashes, strict=True)]
    return places[0][np.isin(values[0], values[1])], places[1][np.isin(values[1], values[0])]
