"""The Triton half of `four_bits`: a tile of blocks a program, a row each, so that a block's scale is read once. Imports
Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 64
BLOCK_BYTES = 32
SCALES = 256
"""Blocks of a program; bytes of a block of 64 weights; blocks that share a scale of the scales."""


def dequantize(  # noqa: PLR0913 - four stored tensors, two tables, and what is wanted
    packed: Tensor,
    absmax: Tensor,
    scale: Tensor,
    offset: Tensor,
    tables: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """See four_bits.dequantize."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    count = out.numel()
    # Multiply and add may not be fused: bitsandbytes rounds in between.
    _dequantize[(triton.cdiv(count, 2 * BLOCK_BYTES * BLOCKS),)](
        packed, absmax, scale, offset, *tables, out, count,
        BLOCKS=BLOCKS, BLOCK_BYTES=BLOCK_BYTES, SCALES=SCALES, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    packed, absmax, scale, offset, code, scale_code, out, count,
    BLOCKS: tl.constexpr, BLOCK_BYTES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = block * (2 * BLOCK_BYTES) < count
    level = tl.load(absmax + block, mask=present, other=0).to(tl.int32)
    largest = tl.load(scale_code + level) * tl.load(scale + block // SCALES, mask=present, other=0.0)
    largest = (largest + tl.load(offset))[:, None]
    byte = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    pair = tl.load(packed + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    first = (tl.load(code + (pair >> 4)) * largest).to(out.dtype.element_ty)
    second = (tl.load(code + (pair & 15)) * largest).to(out.dtype.element_ty)
    values = tl.reshape(tl.join(first, second), (BLOCKS, 2 * BLOCK_BYTES))
    place = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    tl.store(out + place, values, mask=place < count)
