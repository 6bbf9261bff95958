"""Rounding by which many micro-batches come to have few shapes: a compiled layer and a captured step serve one each."""

from __future__ import annotations

WIDTHS = 4
"""Widths that rows of a run have on a GPU, at most."""
FEWEST_BORDERS, SHORTEST_BOUND = 64, 128
"""The least numbers of segments' borders, and of positions in the longest segment, that a packed row is made for."""
TARGET_PARTS = 8


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def roomier(target_tokens: int, tokens: int) -> int:
    """Target tokens rounded up to an eighth of all tokens, as a captured step counts them."""
    part = -(-tokens // TARGET_PARTS)
    return min(tokens, -(-target_tokens // part) * part)
