"""What the head's cross-entropy does with one tile of logits between its two products.

`absorb_tile` reads a tile of logits once, adds it to the running sums of its tokens, and writes the weights with which
the head's rows enter the gradient. The weights are `exp(logit - reference)`, where the reference is a running maximum
that may be stale by `MARGIN`: it only moves when a tile's largest logit exceeds it by more. So the gradient's
accumulator, which has to shrink when the reference moves, is left alone nearly always (`scale_moved_rows` skips rows
whose factor is 1). Floating point loses nothing by it: weights reach at most exp(MARGIN), about 3000.

The kernels take one row of a tile into registers, so a tile may be `MAX_FUSED_COLUMNS` (layout/loss_tile.py) wide; and
since they have read all of a row before they write, the weights may lie in the first half of the very memory the logits
are in. The twins in plain torch need another buffer.

Shapes: B tokens of a tile, V columns (rows of the head), H hidden size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton

MARGIN = 8.0
"""Below log(65504), so that weights fit into fp16."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns a tile holds, and what becomes of `z = hidden @ row`: `cap * tanh(scale * (z + bias) / cap)`.

    Attributes:
        first: index of the tile's first column in the vocabulary.
        bias_V: (V,), of these columns, or None.
        scale: factor on the logits.
        softcap: the cap, or None.
    """

    first: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TokenSums:
    """What is known of each token after the columns seen so far, its target's own column left out. Updated in place.

    Attributes:
        targets_B: int64; a target that is in no tile leaves `target_logit_B` NaN, so that it is not silent.
        reference_B: the running maximum, at most MARGIN below the true one; the lowest finite number at first, so
            that no difference is NaN.
        sum_B: of exp(logit - reference).
        target_logit_B: the target's own logit.
        shrink_B: by what the last tile made sums of earlier tiles smaller.
    """

    targets_B: Tensor
    reference_B: Tensor
    sum_B: Tensor
    target_logit_B: Tensor
    shrink_B: Tensor

    @classmethod
    def start(cls, targets_B: Tensor, dtype: torch.dtype) -> TokenSums:
        """Before the first column."""
        zeros_B = torch.zeros(targets_B.shape, dtype=dtype, device=targets_B.device)
        return cls(
            targets_B=targets_B,
            reference_B=torch.full_like(zeros_B, torch.finfo(dtype).min),
            sum_B=zeros_B,
            target_logit_B=torch.full_like(zeros_B, math.nan),
            shrink_B=torch.ones_like(zeros_B),
        )

    def __getitem__(self, tokens: slice) -> TokenSums:
        """The same tensors, seen through a block of tokens."""
        return TokenSums(*(getattr(self, field.name)[tokens] for field in fields(self)))

    @property
    def gap_B(self) -> Tensor:
        """logsumexp of all columns but the target's, minus the target's logit: the loss is softplus of it."""
        return self.reference_B + self.sum_B.log() - self.target_logit_B

    def targets_within(self, first: int, columns: int) -> tuple[Tensor, Tensor]:
        """-> (is the target among these columns, its place among them or any valid place)."""
        column_B = self.targets_B - first
        return (column_B >= 0) & (column_B < columns), column_B.clamp(0, columns - 1)


def absorb_tile(
    logits_BV: Tensor,
    sums: TokenSums,
    columns: Columns,
    weights_BV: Tensor | None,
    slope_BV: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Add a tile to the sums, and write the gradient's weights where they are wanted.

    Args:
        logits_BV: the bare product, float32 (or float64 in plain torch); destroyed.
        sums: of these tokens.
        columns: of this tile.
        weights_BV: `exp(logit - reference)` times the soft cap's slope, 0 at the target; None for evaluation.
        slope_BV: scratch of the twin, where there are a cap and weights.
        impl: the kernel or its twin.
    """
    if uses_triton(logits_BV.device, impl):
        _kernels().absorb_tile(logits_BV, sums, columns, weights_BV, MARGIN)
        return
    finish_logits(logits_BV, columns)
    inside_B, column_B = sums.targets_within(columns.first, logits_BV.shape[1])
    own_B1 = logits_BV.gather(1, column_B[:, None])
    torch.where(inside_B, own_B1[:, 0], sums.target_logit_B, out=sums.target_logit_B)
    logits_BV.scatter_(1, column_B[:, None], own_B1.masked_fill_(inside_B[:, None], -math.inf))

    highest_B = logits_BV.amax(1)
    reference_B = torch.where(highest_B > sums.reference_B + MARGIN, highest_B, sums.reference_B)
    torch.exp(sums.reference_B - reference_B, out=sums.shrink_B)
    sums.reference_B.copy_(reference_B)
    if weights_BV is None or columns.softcap is None:
        slope_BV = None
    if slope_BV is not None and columns.softcap is not None:  # 1 - (l / cap)**2, and 0 at the target's -inf
        torch.div(logits_BV, columns.softcap, out=slope_BV).clamp_min_(-1.0).square_().neg_().add_(1.0)
    logits_BV.sub_(reference_B[:, None]).exp_()
    sums.sum_B.mul_(sums.shrink_B).add_(logits_BV.sum(1))
    if weights_BV is not None:
        weighted_BV = logits_BV if slope_BV is None else logits_BV.mul_(slope_BV)
        if weights_BV is not logits_BV:
            weights_BV.copy_(weighted_BV)


def finish_logits(logits_BV: Tensor, columns: Columns) -> Tensor:
    """Bias, scale and soft cap, in place, on what the product gave."""
    if columns.bias_V is not None:
        logits_BV.add_(columns.bias_V)
    if columns.scale != 1.0:
        logits_BV.mul_(columns.scale)
    if columns.softcap is not None:
        logits_BV.div_(columns.softcap).tanh_().mul_(columns.softcap)
    return logits_BV


def scale_moved_rows(gradient_BH: Tensor, shrink_B: Tensor, impl: Impl = "auto") -> None:
    """gradient *= shrink, in place; the kernel touches only rows whose factor is not 1."""
    if uses_triton(gradient_BH.device, impl):
        _kernels().scale_moved_rows(gradient_BH, shrink_B)
    else:
        gradient_BH.mul_(shrink_B[:, None])


def copy_target_rows(
    weight_VH: Tensor, first_row: int, targets_B: Tensor, rows_BH: Tensor, impl: Impl = "auto"
) -> None:
    """rows[b] = weight[targets[b] - first_row] for the targets among these rows; the others stay as they are."""
    if uses_triton(rows_BH.device, impl):
        _kernels().copy_target_rows(weight_VH, first_row, targets_B, rows_BH)
        return
    column_B = targets_B - first_row
    inside_B = (column_B >= 0) & (column_B < len(weight_VH))
    found_BH = weight_VH.index_select(0, column_B.clamp(0, len(weight_VH) - 1)).to(rows_BH.dtype)
    torch.where(inside_B[:, None], found_BH, rows_BH, out=rows_BH)


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import vocabulary_tile_triton

    return vocabulary_tile_triton
