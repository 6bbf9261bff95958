"""The Triton half of `four_bits`. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024


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
    _dequantize[(triton.cdiv(count, 2 * BYTES),)](
        packed, absmax, scale, offset, *tables, out, count, BYTES=BYTES, enable_fp_fusion=False
    )
    return out


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    packed, absmax, scale, offset, code, scale_code, out, count, BYTES: tl.constexpr
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    present = byte * 2 < count
    pair = tl.load(packed + byte, mask=present, other=0).to(tl.int32)
    block = byte // 32
    level = tl.load(absmax + block, mask=present, other=0).to(tl.int32)
    largest = tl.load(scale_code + level) * tl.load(scale + block // 256, mask=present, other=0.0)
    largest = largest + tl.load(offset)
    first = (tl.load(code + (pair >> 4)) * largest).to(out.dtype.element_ty)
    second = (tl.load(code + (pair & 15)) * largest).to(out.dtype.element_ty)
    values = tl.reshape(tl.join(first, second), (2 * BYTES,))
    place = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + place, values, mask=place < count)
