"""Planted near-duplicates in 10,000 documents: how many are found, and how long it takes.

    python bench/near_duplicates.py OUT.json [--documents 10000] [--pairs 2000]

Documents are sentences of invented words with natural (Zipf) frequencies, 60 to 600 words long. To `pairs` of them a
copy is added in which single words, or one passage, were replaced, until the exact Jaccard over runs of five words is
between 0.8 and 1. What is measured is `split` itself, on the machine as it is: reading and tokenizing are not in it.
Recall is over the planted pairs whose two documents are to lie on different sides, the held-out ones being given by
hand (half of each pair), so that every pair lies across.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from drawplate.data.split import hold_out_given, split  # noqa: E402
from drawplate.data.words import jaccard, shingles, word_hashes  # noqa: E402
from drawplate.recipe import DataSection  # noqa: E402
from drawplate.records import Document  # noqa: E402

VOCABULARY = 20_000
THRESHOLD = 0.8


def make_texts(count: int, seed: int) -> list[list[str]]:
    """Lists of words."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY + 1)
    lengths = rng.integers(60, 600, count)
    ranks = rng.choice(VOCABULARY, size=int(lengths.sum()), p=weights / weights.sum())
    words = np.array([f"w{i}" for i in range(VOCABULARY)])[ranks]
    return [part.tolist() for part in np.split(words, np.cumsum(lengths)[:-1])]


def near_copy(words: list[str], rng: random.Random) -> list[str]:
    """An edited copy: single words or a passage replaced, at most as many as leave a Jaccard of 0.8."""
    copy = list(words)
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, max(1, len(words) // 50))):
            copy[rng.randrange(len(copy))] = f"new{rng.randrange(10**6)}"
        return copy
    length = rng.randint(1, max(1, len(words) // 10))
    start = rng.randrange(len(copy) - length)
    copy[start : start + length] = [f"new{rng.randrange(10**6)}" for _ in range(length)]
    return copy


def document(name: str, text: str) -> Document:
    """With its hash."""
    return Document(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def measure(count: int, pairs: int, seed: int) -> dict[str, Any]:
    """Recall over planted pairs that lie across, false alarms, and seconds of each kind of split."""
    rng = random.Random(seed)
    texts = make_texts(count - pairs, seed)
    originals = [document(f"{i}", " ".join(words)) for i, words in enumerate(texts)]
    copies = [document(f"copy of {i}", " ".join(near_copy(texts[i], rng))) for i in range(pairs)]
    sets = [[shingles(words) for words in word_hashes(d.text for d in side)] for side in (originals[:pairs], copies)]
    planted = {i for i in range(pairs) if jaccard(sets[0][i], sets[1][i]) >= THRESHOLD}

    section = DataSection(files=["planted"], near_duplicate_threshold=THRESHOLD)
    began = time.perf_counter()
    given = hold_out_given(originals, copies, section)
    given_seconds = time.perf_counter() - began
    found = {int(d.name) for d in given.set_aside}

    began = time.perf_counter()
    sides = split([*originals, *copies], section)
    split_seconds = time.perf_counter() - began
    held = {d.name for d in sides.heldout}
    across = [i for i in planted if (f"{i}" in held) != (f"copy of {i}" in held)]
    kept_apart = {d.name for d in sides.set_aside}
    separated = [i for i in across if f"{i}" in kept_apart or f"copy of {i}" in kept_apart]
    return {
        "seed": seed,
        "documents": len(originals) + len(copies),
        "words": sum(len(d.text.split()) for d in (*originals, *copies)),
        "planted_pairs": len(planted),
        "found_pairs": len(found & planted),
        "recall": len(found & planted) / len(planted),
        "found_but_not_planted": len(found - planted),
        "seconds_with_given_heldout": round(given_seconds, 2),
        "pairs_across_a_split_by_content": len(across),
        "of_these_set_aside": len(separated),
        "pairs_across_a_split_by_chance": round(2 * 0.1 * 0.9 * len(planted)),
        "seconds_of_split_by_content": round(split_seconds, 2),
    }


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    runs = [measure(given.documents, given.pairs, seed) for seed in range(given.seeds)]
    facts = {**about(), "runs": runs}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
