"""Text -> words -> hashes, the same on every machine: what similarity between documents is measured with.

A word is a run of letters and digits whatever its case; each character of scripts that put no spaces between words
(Chinese, Japanese, Korean) is a word of its own. Punctuation and layout are left out, so a text that was only set
anew counts as the same. Scripts without spaces outside those ranges (Thai, Khmer) give long words and find fewer
similarities.

Hashes are 64 bits: among 10**8 different values about 0.03 % chance of one collision.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import xxhash

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")
SHINGLE_WORDS = 5
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, as in splitmix64
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def word_hashes(texts: Iterable[str]) -> list[np.ndarray]:
    """A 64-bit hash of every word of each text, in order: uint64, shape (words,)."""
    known: dict[str, int] = {}

    def hash_of(word: str) -> int:
        value = known.get(word)
        if value is None:
            value = known[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return value

    return [np.fromiter((hash_of(word) for word in WORD.findall(text.lower())), dtype=np.uint64) for text in texts]


def combined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The hash of a sequence, from the hashes of its two halves; element by element, uint64."""
    value = first * _ODD + second
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor
    return value ^ (value >> np.uint64(31))


def shingles(words: np.ndarray) -> np.ndarray:
    """The set of hashes of all runs of five words, sorted: uint64. A shorter text has one, of all its words."""
    length = min(SHINGLE_WORDS, len(words))
    if length == 0:
        return np.zeros(0, dtype=np.uint64)
    count = len(words) - length + 1
    value = words[:count]
    for offset in range(1, length):
        value = combined(value, words[offset : offset + count])
    return np.unique(value)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared elements over all elements of two sorted sets; 0 where both are empty."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    either = len(first) + len(second) - shared
    return shared / either if either else 0.0
