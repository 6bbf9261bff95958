"""What an optimizer keeps of each trained tensor, by its name in the recipe (train.optim). Free of torch.

AdamW keeps two moments, each of 4 bytes a number. bitsandbytes keeps them in 8 bits where a tensor has 4,096 numbers or
more, with a float32 scale for every 256 of them (`min_8bit_size` and `blocksize` of bitsandbytes.optim.optimizer).
"""

from __future__ import annotations

MOMENTS = 2
EIGHT_BIT = "adamw_8bit"
SMALLEST_IN_EIGHT_BITS, SCALED_TOGETHER = 4096, 256
FLOAT_BYTES = 4


def moment_blocks(optim: str, count: int) -> tuple[int, ...]:
    """Bytes of the blocks of one moment of a tensor with `count` numbers."""
    if optim != EIGHT_BIT or count < SMALLEST_IN_EIGHT_BITS:
        return (count * FLOAT_BYTES,)
    return count, -(-count // SCALED_TOGETHER) * FLOAT_BYTES


def moments_bytes(optim: str, count: int) -> int:
    """Bytes of all moments of `count` numbers, which lie in large tensors."""
    return MOMENTS * sum(moment_blocks(optim, count))
