"""The Triton half of `vocabulary_tile`: the same three functions, one program for a token. Imports Triton.

A program holds a whole row of the tile in registers (64 KiB of float32 at MAX_FUSED_COLUMNS), so the logits cross the
bus once, and every load of a row is done (the maximum needs all of them) before its first store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from drawplate.kernels.vocabulary_tile import Columns, TokenSums

COPY_BLOCK = 1024


def absorb_tile(logits_BV: Tensor, sums: TokenSums, columns: Columns, weights_BV: Tensor | None, margin: float) -> None:
    """See vocabulary_tile.absorb_tile; `weights_BV` may overlap the first half of each row of `logits_BV`."""
    tokens, count = logits_BV.shape
    block = triton.next_power_of_2(count)
    written = logits_BV if weights_BV is None else weights_BV
    _absorb_tile[(tokens,)](
        logits_BV,
        written,
        sums.targets_B,
        sums.reference_B,
        sums.sum_B,
        sums.target_logit_B,
        sums.shrink_B,
        sums.sum_B if columns.bias_V is None else columns.bias_V,
        columns.first,
        count,
        logits_BV.stride(0),
        written.stride(0),
        columns.scale,
        columns.softcap or 1.0,
        MARGIN=margin,
        HAS_BIAS=columns.bias_V is not None,
        HAS_CAP=columns.softcap is not None,
        HAS_WEIGHTS=weights_BV is not None,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )


def scale_moved_rows(gradient_BH: Tensor, shrink_B: Tensor) -> None:
    """See vocabulary_tile.scale_moved_rows."""
    tokens, hidden = gradient_BH.shape
    _scale_moved_rows[(tokens,)](gradient_BH, shrink_B, hidden, gradient_BH.stride(0), BLOCK=COPY_BLOCK)


def copy_target_rows(weight_VH: Tensor, first_row: int, targets_B: Tensor, rows_BH: Tensor) -> None:
    """See vocabulary_tile.copy_target_rows."""
    tokens, hidden = rows_BH.shape
    _copy_target_rows[(tokens,)](
        weight_VH,
        rows_BH,
        targets_B,
        first_row,
        len(weight_VH),
        hidden,
        weight_VH.stride(0),
        rows_BH.stride(0),
        BLOCK=COPY_BLOCK,
    )


@triton.jit(do_not_specialize=["first"])
def _absorb_tile(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    logits,
    weights,
    targets,
    reference,
    total,
    target_logit,
    shrink,
    bias,
    first,
    count,
    logits_stride,
    weights_stride,
    scale,
    softcap,
    MARGIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < count
    value = tl.load(logits + row * logits_stride + column, mask=present, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=present, other=0.0).to(tl.float32)
    value = value * scale
    if HAS_CAP:
        value = softcap * (1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0))  # tanh
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < count):
        tl.store(target_logit + row, tl.sum(tl.where(column == target, value, 0.0), axis=0))
    counts = present & (column != target)
    value = tl.where(counts, value, float("-inf"))

    old = tl.load(reference + row)
    highest = tl.max(value, axis=0)
    new = tl.where(highest > old + MARGIN, highest, old)
    factor = tl.exp(old - new)
    weight = tl.exp(value - new)
    tl.store(reference + row, new)
    tl.store(shrink + row, factor)
    tl.store(total + row, tl.load(total + row) * factor + tl.sum(weight, axis=0))
    if HAS_WEIGHTS:
        if HAS_CAP:
            ratio = tl.where(counts, value / softcap, 1.0)
            weight = weight * (1.0 - ratio * ratio)
        tl.store(weights + row * weights_stride + column, weight.to(weights.dtype.element_ty), mask=present)


@triton.jit
def _scale_moved_rows(gradient, shrink, hidden, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(shrink + row)
    if factor != 1.0:
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            place = gradient + row * stride + column
            tl.store(place, tl.load(place, mask=column < hidden) * factor, mask=column < hidden)


@triton.jit(do_not_specialize=["first"])
def _copy_target_rows(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    weight, rows, targets, first, count, hidden, weight_stride, rows_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < count):
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(weight + target * weight_stride + column, mask=column < hidden)
            tl.store(rows + row * rows_stride + column, value.to(rows.dtype.element_ty), mask=column < hidden)
