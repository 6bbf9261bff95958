"""The Triton half of `host_rows`: a piece of a row a program. Imports Triton.

Triton takes page-locked tensors of the host as they are: it asks CUDA for the address by which the device reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 2048


def host_rows(table_VH: Tensor, ids_N: Tensor) -> Tensor:
    """See host_rows.host_rows."""
    width = table_VH.shape[1]
    rows_NH = torch.empty(len(ids_N), width, dtype=table_VH.dtype, device=ids_N.device)
    _gather[(len(ids_N), triton.cdiv(width, PIECE))](table_VH, ids_N, rows_NH, width, PIECE=PIECE)
    return rows_NH


@triton.jit
def _gather(table, ids, rows, width, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    piece = tl.load(table + tl.load(ids + n) * width + h, mask=h < width)
    tl.store(rows + n * width + h, piece, mask=h < width)
