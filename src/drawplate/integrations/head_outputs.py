"""What other people's loops ask of a head beside the summed loss: logits, and what is known of each token.

All of it goes through the head chunk by chunk, so that it works where the head is streamed, and is differentiable in
the hidden states. Logits are tokens x vocabulary by definition: they are made only where nobody gave labels.
Entropy and accuracy, which TRL logs at every step, take a second pass over the head without gradients, half as much
again as the loss itself; for a head that is a tenth of the model that is 2 % of a step.

Shapes: N tokens, C tokens that count, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from drawplate.kernels.vocabulary_tile import finish_logits
from drawplate.model.ends.head import Head, HeadRows
from drawplate.model.ends.loss import IGNORED, head_cross_entropy

TILE_TOKENS, TILE_COLUMNS = 1024, 8192


@dataclass
class TokenScores(ModelOutput):
    """What TRL's fused head returns, under its names; (B, T - 1), zero where the label is -100.

    Attributes:
        loss: negative log-likelihood over `num_items_in_batch`, or over the tokens that count.
        log_probs: of each next token; differentiable.
        entropy: of the next token's distribution, in nats.
        is_top1: whether the next token is the most likely one.
        label_mask: whether it counts.
        aux_loss: None; there is no router here.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def raw_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """hidden @ weight.T + bias, (N, V), before scale and soft cap; differentiable in the hidden states."""
    product_NV: Tensor = _HeadProduct.apply(hidden_NH, head.weights)
    return product_NV if head.bias is None else product_NV + head.bias


def head_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    """The model's logits, (N, V), differentiable in the hidden states."""
    logits_NV = raw_logits(hidden_NH, head) * head.logit_scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def token_nats(hidden_NH: Tensor, head: Head, targets_N: Tensor, counted: int) -> Tensor:
    """Each token's cross-entropy, (N,), differentiable: any weights on the tokens may come back in backward."""
    if not (torch.is_grad_enabled() and hidden_NH.requires_grad):
        return head_cross_entropy(hidden_NH, head, targets_N, counted=counted)[1]
    leaf_NH = hidden_NH.detach().requires_grad_()
    loss, nats_N = head_cross_entropy(leaf_NH, head, targets_N, counted=counted)
    (grad_NH,) = torch.autograd.grad(loss, leaf_NH)
    weighted_N: Tensor = _TokenNats.apply(hidden_NH, nats_N, grad_NH)
    return weighted_N


@torch.no_grad()
def entropy_and_top1(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats (float32) and whether the target is the most likely token (bool), (N,); 0 where it is ignored."""
    targets_N = targets_N.to(hidden_NH.device)
    counted_C = (targets_N != IGNORED).nonzero()[:, 0]
    hidden_CH, targets_C = hidden_NH[counted_C], targets_N[counted_C]
    zeros_C = torch.zeros(len(targets_C), device=hidden_NH.device)
    max_C, target_C = torch.full_like(zeros_C, -torch.inf), zeros_C.clone()
    sum_C, weighted_C = zeros_C.clone(), zeros_C.clone()  # of exp(l - max), and of l * exp(l - max)
    for tokens, first, logits_CV in _tiles(hidden_CH, head):
        column_C = targets_C[tokens] - first
        inside_C = (column_C >= 0) & (column_C < logits_CV.shape[1])
        own_C = logits_CV.gather(1, column_C.clamp(0, logits_CV.shape[1] - 1)[:, None])[:, 0]
        target_C[tokens] = torch.where(inside_C, own_C, target_C[tokens])
        top_C = torch.maximum(max_C[tokens], logits_CV.amax(1))
        shrink_C, weights_CV = torch.exp(max_C[tokens] - top_C), torch.exp(logits_CV - top_C[:, None])
        sum_C[tokens] = sum_C[tokens] * shrink_C + weights_CV.sum(1)
        weighted_C[tokens] = weighted_C[tokens] * shrink_C + (weights_CV * logits_CV).sum(1)
        max_C[tokens] = top_C
    entropy_N = torch.zeros(len(targets_N), device=hidden_NH.device)
    entropy_N[counted_C] = sum_C.log() + max_C - weighted_C / sum_C
    top1_N = torch.zeros(len(targets_N), dtype=torch.bool, device=hidden_NH.device)
    top1_N[counted_C] = target_C >= max_C
    return entropy_N, top1_N


def _tiles(hidden_CH: Tensor, head: Head) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (tokens, first column, float32 logits) until every token has met every column."""
    for first_row, weight_VH in head.weights.chunks():
        for start in range(0, len(weight_VH), TILE_COLUMNS):
            rows_VH, first = weight_VH[start : start + TILE_COLUMNS], first_row + start
            columns = head.columns(first, len(rows_VH))
            for token in range(0, len(hidden_CH), TILE_TOKENS):
                tokens = slice(token, token + TILE_TOKENS)
                yield tokens, first, finish_logits((hidden_CH[tokens] @ rows_VH.T).float(), columns)


class _HeadProduct(torch.autograd.Function):
    """hidden @ weight.T; backward walks the chunks again, because a streamed chunk does not stay."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, rows: HeadRows) -> Tensor:
        ctx.rows = rows
        out_NV = hidden_NH.new_empty(len(hidden_NH), rows.vocab)
        for first, weight_VH in rows.chunks():
            out_NV[:, first : first + len(weight_VH)] = hidden_NH @ weight_VH.T
        return out_NV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:
        grad_NH = grad_NV.new_zeros(len(grad_NV), ctx.rows.hidden)
        for first, weight_VH in ctx.rows.chunks():
            grad_NH += grad_NV[:, first : first + len(weight_VH)] @ weight_VH
        return grad_NH, None


class _TokenNats(torch.autograd.Function):
    """The nats of each token, with the hidden states' gradient made beforehand, token by token."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, nats_N: Tensor, grad_NH: Tensor) -> Tensor:
        ctx.save_for_backward(grad_NH)
        return nats_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats_N: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_nats_N[:, None].to(grad_NH.dtype), None, None
