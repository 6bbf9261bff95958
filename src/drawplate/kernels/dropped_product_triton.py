"""The Triton half of `dropped_product`: the same three functions. Imports Triton.

Ranks are padded to a power of two of at least 16, the smallest product the tensor cores have. `grad_A` adds up parts of
the tokens in parallel, and the parts in a second step, so that its sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drawplate.kernels.dropped_product import GOLDEN, threshold_of

FEATURE_BLOCK = 128
TOKEN_BLOCK = 64
PARTS = 16
LEAST_RANK = 16


def _rank_block(rank: int) -> int:
    return max(LEAST_RANK, triton.next_power_of_2(rank))


def _token_block(tokens: int) -> int:
    """Few tokens in small blocks, so that every multiprocessor has one."""
    return TOKEN_BLOCK if tokens > 8192 else TOKEN_BLOCK // 2 if tokens > 2048 else TOKEN_BLOCK // 4


def down(x_NI: Tensor, key_N: Tensor, lora_A_RI: Tensor, dropout: float) -> Tensor:
    """See dropped_product.down."""
    (tokens, features), rank = x_NI.shape, lora_A_RI.shape[0]
    t_NR = x_NI.new_empty(tokens, rank)
    block = _token_block(tokens)
    _down[(triton.cdiv(tokens, block),)](
        x_NI,
        key_N,
        lora_A_RI,
        t_NR,
        tokens,
        features,
        rank,
        x_NI.stride(0),
        lora_A_RI.stride(0),
        1 / (1 - dropout),
        THRESHOLD=threshold_of(dropout),
        GOLDEN_RATIO=GOLDEN,
        TOKENS=block,
        FEATURES=FEATURE_BLOCK,
        RANK=_rank_block(rank),
    )
    return t_NR


def grad_A(grad_t_NR: Tensor, x_NI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    """See dropped_product.grad_A."""
    (tokens, features), rank = x_NI.shape, grad_t_NR.shape[1]
    parts = min(PARTS, triton.cdiv(tokens, TOKEN_BLOCK))
    grad_PRI = torch.empty(parts, rank, features, dtype=torch.float32, device=x_NI.device)
    _grad_A[(triton.cdiv(features, FEATURE_BLOCK), parts)](
        grad_t_NR,
        x_NI,
        key_N,
        grad_PRI,
        tokens,
        features,
        rank,
        grad_t_NR.stride(0),
        x_NI.stride(0),
        triton.cdiv(triton.cdiv(tokens, TOKEN_BLOCK), parts),
        1 / (1 - dropout),
        THRESHOLD=threshold_of(dropout),
        GOLDEN_RATIO=GOLDEN,
        TOKENS=TOKEN_BLOCK,
        FEATURES=FEATURE_BLOCK,
        RANK=_rank_block(rank),
    )
    return grad_PRI.sum(0)


def up(grad_t_NR: Tensor, lora_A_RI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    """See dropped_product.up."""
    (tokens, rank), features = grad_t_NR.shape, lora_A_RI.shape[1]
    out_NI = grad_t_NR.new_empty(tokens, features)
    _up[(triton.cdiv(tokens, TOKEN_BLOCK), triton.cdiv(features, FEATURE_BLOCK))](
        grad_t_NR,
        lora_A_RI,
        key_N,
        out_NI,
        tokens,
        features,
        rank,
        grad_t_NR.stride(0),
        lora_A_RI.stride(0),
        1 / (1 - dropout),
        THRESHOLD=threshold_of(dropout),
        GOLDEN_RATIO=GOLDEN,
        TOKENS=TOKEN_BLOCK,
        FEATURES=FEATURE_BLOCK,
        RANK=_rank_block(rank),
    )
    return out_NI


@triton.jit
def _keep(key_N, feature_I, THRESHOLD: tl.constexpr, GOLDEN_RATIO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which features of which tokens stay: dropped_product.mix in unsigned arithmetic."""
    h = (key_N[:, None] + (feature_I * GOLDEN_RATIO)[None, :]).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    return h.to(tl.int32, bitcast=True) >= THRESHOLD


@triton.jit
def _down(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    x,
    key,
    lora_A,
    out,
    tokens,
    features,
    rank,
    x_stride,
    A_stride,
    scale,
    THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
):
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    key_N = tl.load(key + n, mask=n < tokens, other=0)
    rows = x + n.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, features, FEATURES):
        i = start + tl.arange(0, FEATURES)
        x_NI = tl.load(rows + i[None, :], mask=(n[:, None] < tokens) & (i[None, :] < features), other=0.0)
        x_NI = tl.where(_keep(key_N, i, THRESHOLD, GOLDEN_RATIO), x_NI, 0.0)
        A_IR = tl.load(
            lora_A + r[None, :] * A_stride + i[:, None], mask=(r[None, :] < rank) & (i[:, None] < features), other=0.0
        )
        total = tl.dot(x_NI, A_IR.to(x_NI.dtype), total, input_precision="ieee")
    place = out + n.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(place, (total * scale).to(out.dtype.element_ty), mask=(n[:, None] < tokens) & (r[None, :] < rank))


@triton.jit
def _grad_A(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    grad_t,
    x,
    key,
    out,
    tokens,
    features,
    rank,
    t_stride,
    x_stride,
    blocks,
    scale,
    THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
):
    i = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    r = tl.arange(0, RANK)
    part = tl.program_id(1)
    total = tl.zeros((RANK, FEATURES), dtype=tl.float32)
    for block in range(part * blocks, part * blocks + blocks):
        n = block * TOKENS + tl.arange(0, TOKENS)
        key_N = tl.load(key + n, mask=n < tokens, other=0)
        place = n.to(tl.int64)[:, None]
        x_NI = tl.load(
            x + place * x_stride + i[None, :], mask=(n[:, None] < tokens) & (i[None, :] < features), other=0.0
        )
        x_NI = tl.where(_keep(key_N, i, THRESHOLD, GOLDEN_RATIO), x_NI, 0.0)
        t_NR = tl.load(
            grad_t + place * t_stride + r[None, :], mask=(n[:, None] < tokens) & (r[None, :] < rank), other=0.0
        )
        total = tl.dot(tl.trans(t_NR), x_NI.to(t_NR.dtype), total, input_precision="ieee")
    place = out + (part * rank + r)[:, None] * features + i[None, :]
    tl.store(place, total * scale, mask=(r[:, None] < rank) & (i[None, :] < features))


@triton.jit
def _up(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    grad_t,
    lora_A,
    key,
    out,
    tokens,
    features,
    rank,
    t_stride,
    A_stride,
    scale,
    THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
):
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    r = tl.arange(0, RANK)
    place = n.to(tl.int64)[:, None]
    key_N = tl.load(key + n, mask=n < tokens, other=0)
    t_NR = tl.load(grad_t + place * t_stride + r[None, :], mask=(n[:, None] < tokens) & (r[None, :] < rank), other=0.0)
    A_RI = tl.load(
        lora_A + r[:, None] * A_stride + i[None, :], mask=(r[:, None] < rank) & (i[None, :] < features), other=0.0
    )
    value = tl.dot(t_NR, A_RI.to(t_NR.dtype), input_precision="ieee") * scale
    value = tl.where(_keep(key_N, i, THRESHOLD, GOLDEN_RATIO), value, 0.0)
    inside = (n[:, None] < tokens) & (i[None, :] < features)
    tl.store(out + place * features + i[None, :], value.to(out.dtype.element_ty), mask=inside)
