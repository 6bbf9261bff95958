"""Cross-entropy of a frozen linear head, without ever holding tokens x vocabulary.

One pass over the head gives both the loss and its gradient. It is flash attention with keys = values = the head's
rows: for a tile of the vocabulary, logits; a running maximum and sum per token; and an accumulator of `exp(l - max)
@ W`, shrunk whenever the maximum grows. A head streamed from the host therefore crosses the bus once per micro-batch.
The target's own row t is left out of those sums, because then nothing cancels where the model is already sure:

    gap  = logsumexp(l_j, j != t) - l_t
    loss = softplus(gap)                                                                    (= logsumexp(l) - l_t)
    grad = sigmoid(gap) * (sum_{j != t} softmax_{j != t}(l)_j f'(l_j) W_j  -  f'(l_t) W_t)     (sigmoid(gap) = 1 - p_t)

where f is the soft cap and f' its slope. The gradient is made in the forward, while the logits are at hand, and kept in
the hidden state's dtype; backward only multiplies it by the incoming scalar.

Left out: a head that trains (its gradient would need tokens x vocabulary twice over), label smoothing, z-loss. Products
run in the hidden state's dtype and everything else in float32. There are two products of 2*N*H*V FLOPs, the least
possible; what happens to a tile between them is one kernel on a GPU (kernels/vocabulary_tile.py).

Shapes: N tokens, C tokens that count, B tokens of a tile, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from drawplate.kernels import Impl
from drawplate.kernels.vocabulary_tile import (
    Columns,
    TokenSums,
    absorb_tile,
    copy_target_rows,
    scale_moved_rows,
)
from drawplate.model.ends.head import Head
from drawplate.model.ends.loss_tile import LossShape, Tile

IGNORED = -100
"""The target of a token that does not count, as everywhere in torch and transformers."""


def head_cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    scale: float | Tensor = 1.0,
    counted: int | None = None,
    impl: Literal["reference"] | Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of the tokens that count, and each token's own.

    Args:
        hidden_NH: what the head is applied to, already shifted against the targets; gradients flow here and nowhere
            else. Without autograd (evaluation) no gradient is made and less memory is used.
        head: the frozen head.
        targets_N: int64 ids; `IGNORED` (-100) for tokens that do not count.
        scale: factor on the returned loss, and on the gradient before it is rounded to the hidden state's dtype. Pass
            `loss scale / tokens of the step` here rather than multiply later: fp16 gradients then do not underflow.
        counted: how many targets are not `IGNORED`, or any larger number up to N: places for so many tokens are
            computed. With it nothing waits for a GPU; without it they are counted, which on a GPU is a
            synchronisation. Too small a number gives NaN, not a wrong loss.
        impl: "reference" holds all logits and uses autograd: the specification. The others are the kernels' choices:
            "triton", "torch", or the one that suits the device.

    Returns:
        `(loss, nats_N)`: the scalar `scale * nats.sum()` in float32 (float64 for float64 input), differentiable; and
        the unscaled nats per token, detached, 0 where the target is `IGNORED`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if hidden_NH.dim() != 2 or targets_N.shape != hidden_NH.shape[:1] or hidden_NH.shape[1] != head.weights.hidden:
        raise ValueError(
            f"hidden {tuple(hidden_NH.shape)} and targets {tuple(targets_N.shape)} must be (N, {head.weights.hidden}) "
            "and (N,): flatten batch and time first"
        )
    if impl == "reference":
        return _reference(hidden_NH, head, targets_N, scale)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if torch.is_grad_enabled() and hidden_NH.requires_grad:
            result: tuple[Tensor, Tensor] = _HeadCrossEntropy.apply(hidden_NH, head, targets_N, scale, counted, impl)
            return result
        shape = LossShape.of(hidden_NH, head, impl, training=False)
        _, nats_C, counted_N = _compact_pass(hidden_NH, head, targets_N, counted, shape)
        return nats_C.sum() * scale, _spread(nats_C, counted_N, len(targets_N))


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - those of head_cross_entropy
        ctx: Any,
        hidden_NH: Tensor,
        head: Head,
        targets_N: Tensor,
        scale: float | Tensor,
        counted: int | None,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        shape = LossShape.of(hidden_NH, head, impl)
        grad_CH, nats_C, counted_N = _compact_pass(hidden_NH, head, targets_N, counted, shape, scale)
        assert grad_CH is not None
        ctx.save_for_backward(grad_CH, counted_N)
        ctx.tokens = len(targets_N)
        nats_N = _spread(nats_C, counted_N, ctx.tokens)
        ctx.mark_non_differentiable(nats_N)
        return nats_C.sum() * scale, nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_nats: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_CH, counted_N = ctx.saved_tensors
        grad_CH = grad_CH * grad_loss.to(grad_CH.dtype)
        return _spread(grad_CH, counted_N, ctx.tokens), None, None, None, None, None


def _spread(values_C: Tensor, counted_N: Tensor | None, tokens: int) -> Tensor:
    """Values of the tokens that count -> of all tokens, 0 elsewhere."""
    if counted_N is None:
        return values_C
    return values_C.new_zeros(tokens, *values_C.shape[1:]).index_copy_(0, counted_N, values_C)


def _compact_pass(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    counted: int | None,
    shape: LossShape,
    scale: float | Tensor = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Leave out ignored tokens, run the pass -> (gradient_CH, nats_C, indices of the tokens; None for all)."""
    ignored_N = targets_N == IGNORED
    present = ignored_N.logical_not().sum()
    counted = int(present) if counted is None else counted
    device = hidden_NH.device
    if counted < len(targets_N):
        # A stable sort, not nonzero(): its output's size is known without asking the device.
        counted_N = torch.argsort(ignored_N, stable=True)[:counted].to(device, non_blocking=True)
        hidden_NH = hidden_NH.index_select(0, counted_N)
        targets_C = targets_N.to(device, non_blocking=True).index_select(0, counted_N)
    else:
        counted_N, targets_C = None, targets_N.to(device, non_blocking=True)
    tokens = _one_pass(hidden_NH.detach(), head, targets_C, shape)
    grad_CH, nats_C = tokens.finish(head, scale)
    enough = (present <= counted).to(device, non_blocking=True)
    return grad_CH, torch.where(enough, nats_C, math.nan), counted_N


def _one_pass(hidden_CH: Tensor, head: Head, targets_C: Tensor, shape: LossShape) -> _Tokens:
    """The pass over the head."""
    tile = Tile.of(shape, len(targets_C))
    tokens = _Tokens.start(hidden_CH, targets_C, tile)
    tile.allocate(shape.hidden)
    blocks = [tokens[start : start + tile.tokens] for start in range(0, len(targets_C), tile.tokens)]
    for first_row, weight_VH in head.weights.chunks() if blocks else ():
        if tokens.target_row_BH is not None:
            copy_target_rows(weight_VH, first_row, targets_C, tokens.target_row_BH, tile.impl)
        for start in range(0, len(weight_VH), tile.columns):
            rows_VH = weight_VH[start : start + tile.columns].to(tile.product_dtype)
            columns = head.columns(first_row + start, len(rows_VH))
            for block in blocks:
                _add_tile(block, tile, columns, rows_VH)
    return tokens


def _add_tile(block: _Tokens, tile: Tile, columns: Columns, rows_VH: Tensor) -> None:
    """Add some rows of the head to the running sums of the tokens of one block."""
    logits_BV = tile.logits(block.hidden_BH, rows_VH)
    weights_BV, slope_BV = tile.weights(logits_BV), tile.slope(logits_BV)
    absorb_tile(logits_BV, block.sums, columns, weights_BV, slope_BV, tile.impl)
    if weights_BV is not None and block.gradient_BH is not None:
        scale_moved_rows(block.gradient_BH, block.sums.shrink_B, tile.impl)
        tile.accumulate(block.gradient_BH, weights_BV, rows_VH)


@dataclass
class _Tokens:
    """The tokens of a pass, or of a block: what goes in, and what is known of them after the rows seen so far."""

    hidden_BH: Tensor
    sums: TokenSums
    gradient_BH: Tensor | None  # sum of exp(logit - reference) * slope * row
    target_row_BH: Tensor | None

    @classmethod
    def start(cls, hidden_BH: Tensor, targets_B: Tensor, tile: Tile) -> _Tokens:
        return cls(
            hidden_BH=hidden_BH,
            sums=TokenSums.start(targets_B, tile.sum_dtype),
            gradient_BH=torch.zeros_like(hidden_BH, dtype=tile.sum_dtype) if tile.training else None,
            target_row_BH=torch.zeros_like(hidden_BH) if tile.training else None,
        )

    def __getitem__(self, tokens: slice) -> _Tokens:
        """The same tensors, seen through a block of tokens."""
        gradient_BH = None if self.gradient_BH is None else self.gradient_BH[tokens]
        return replace(self, hidden_BH=self.hidden_BH[tokens], sums=self.sums[tokens], gradient_BH=gradient_BH)

    def finish(self, head: Head, scale: float | Tensor) -> tuple[Tensor | None, Tensor]:
        """-> (gradient times `scale`, nats), by the formulas at the top of the file."""
        counts_B = self.sums.targets_B != IGNORED
        gap_B = self.sums.gap_B
        nats_B = F.softplus(gap_B).where(counts_B, 0)
        if self.gradient_BH is None or self.target_row_BH is None:
            return None, nats_B
        slope_B = torch.ones_like(gap_B)
        if head.softcap is not None:
            slope_B -= (self.sums.target_logit_B / head.softcap).square_()
        factor_B = gap_B.sigmoid().mul_(head.logit_scale).mul_(scale).where(counts_B, 0)
        # A vocabulary of one row has no rest: 0 / tiny is 0.
        rest_B = factor_B / self.sums.sum_B.clamp_min_(torch.finfo(gap_B.dtype).tiny)
        grad_BH = self.gradient_BH.mul_(rest_B[:, None])
        grad_BH.addcmul_(self.target_row_BH, (factor_B * slope_B).where(counts_B, 0)[:, None], value=-1)
        return self.target_row_BH.copy_(grad_BH), nats_B


def _reference(hidden_NH: Tensor, head: Head, targets_N: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The specification: all logits at once, autograd's gradient."""
    weight_VH = torch.cat([rows_VH.clone() for _, rows_VH in head.weights.chunks()]).to(hidden_NH.dtype)
    logits_NV = F.linear(hidden_NH, weight_VH).to(torch.promote_types(hidden_NH.dtype, torch.float32))
    if head.bias is not None:
        logits_NV = logits_NV + head.bias
    logits_NV = logits_NV * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    nats_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
    return nats_N.sum() * scale, nats_N.detach()
