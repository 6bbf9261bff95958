"""The Triton half of `transposed`: a square tile a program, turned in shared memory. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SIDE = 128


def transposed(x_RC: Tensor) -> Tensor:
    """See transposed.transposed; uint8."""
    rows, columns = x_RC.shape
    out_CR = x_RC.new_empty(columns, rows)
    _transposed[(triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE))](x_RC, out_CR, rows, columns, SIDE=SIDE)
    return out_CR


@triton.jit
def _transposed(x, out, rows, columns, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside_RC = (r[:, None] < rows) & (c[None, :] < columns)
    tile_RC = tl.load(x + r[:, None] * columns + c[None, :], mask=inside_RC, other=0)
    tl.store(out + c[:, None] * rows + r[None, :], tl.trans(tile_RC), mask=tl.trans(inside_RC))
