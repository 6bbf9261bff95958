"""Where a document longer than a window is cut: (start, fresh, end) of each window.

A window reads [start, end). What lies before `fresh` was read by an earlier window and is not counted again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

Window = tuple[int, int, int]


def text_windows(count: int, max_length: int, context_tokens: int) -> Iterator[Window]:
    """Windows of a text that is counted everywhere.

    Without context, where the last would hold one token, the one before leaves it a second.
    """
    if context_tokens:
        fresh = 0
        while fresh < count:
            start = max(fresh - context_tokens, 0)
            end = min(start + max_length, count)
            yield start, fresh, end
            fresh = end
        return
    borders = [*range(0, count, max_length), count]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1 and max_length > 2:
        borders[-2] -= 1
    for start, end in itertools.pairwise(borders):
        yield start, start, end


def answer_windows(counted: np.ndarray, max_length: int, context_tokens: int) -> Iterator[Window]:
    """Windows of a text with answers in it: every counted token in one, and as much before it as fits.

    A window ends where an answer ends, as late as leaves the first answer in it `context_tokens` of what precedes it
    (or all that does). So the last answer of a window keeps a whole window's worth, and none is cut that fits beside
    its context. What lies behind the last answer, and prompts that do not fit, are in no window.

    Args:
        counted: bool, shape (tokens,): tokens of answers.
        max_length: tokens of a window at most.
        context_tokens: below `max_length`.
    """
    places = np.flatnonzero(counted)
    ends = np.flatnonzero(np.diff(counted.astype(np.int8), append=0) == -1) + 1
    read = 0
    while (left := places[places >= read]).size:
        first = int(left[0])
        limit = max(first - context_tokens, 0) + max_length
        fitting = ends[(ends > first) & (ends <= limit)]
        end = int(fitting[-1]) if fitting.size else min(limit, len(counted))
        start = max(end - max_length, 0)
        yield start, max(read, start), end
        read = end
