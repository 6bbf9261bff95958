"""The Triton half of `dropped_product`: the same three functions, for up to three modules. Imports Triton.

Ranks are padded to a power of two of at least 16, the smallest product the tensor cores have. `grad_A` adds up parts of
the tokens in parallel, and the parts in a second step, so that its sum has one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from drawplate.kernels.dropped_product import GOLDEN, HALF, MOST_MODULES, threshold_of

TOKEN_BLOCK = 64
PARTS = 16
LEAST_RANK = 16


def _constants(modules: int, rank: int, dropout: float) -> dict[str, int]:
    return {
        "MODULES": modules,
        "RANK": max(LEAST_RANK, triton.next_power_of_2(rank)),
        "THRESHOLD": threshold_of(dropout),
        "GOLDEN_RATIO": GOLDEN,
        "HALF": HALF,
    }


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernels take; those too many are not read."""
    return [*tensors, *[tensors[0]] * (MOST_MODULES - len(tensors))]


def _token_block(tokens: int) -> int:
    """Few tokens in small blocks, so that every multiprocessor has some."""
    return TOKEN_BLOCK if tokens > 16384 else TOKEN_BLOCK // 2 if tokens > 4096 else TOKEN_BLOCK // 4


def down(x_NI: Tensor, keys_N: Sequence[Tensor], lora_As: Sequence[Tensor], dropout: float) -> Tensor:
    """See dropped_product.down."""
    (tokens, features), rank = x_NI.shape, lora_As[0].shape[0]
    t_GNR = x_NI.new_empty(len(lora_As), tokens, rank)
    block = _token_block(tokens)
    _down[(triton.cdiv(tokens, block),)](
        x_NI,
        *_three(keys_N),
        *_three(lora_As),
        t_GNR,
        tokens,
        features,
        rank,
        tokens * rank,
        x_NI.stride(0),
        1 / (1 - dropout),
        TOKENS=block,
        **_constants(len(lora_As), rank, dropout),
    )
    return t_GNR


def grad_A(grad_ts: Sequence[Tensor], x_NI: Tensor, keys_N: Sequence[Tensor], dropout: float) -> list[Tensor]:
    """See dropped_product.grad_A."""
    (tokens, features), rank = x_NI.shape, grad_ts[0].shape[1]
    parts = min(PARTS, triton.cdiv(tokens, TOKEN_BLOCK))
    grad_GPRI = torch.empty(len(grad_ts), parts, rank, features, dtype=torch.float32, device=x_NI.device)
    _grad_A[(triton.cdiv(features, 2 * HALF), parts)](
        *_three([t_NR.contiguous() for t_NR in grad_ts]),
        x_NI,
        *_three(keys_N),
        grad_GPRI,
        tokens,
        features,
        rank,
        x_NI.stride(0),
        triton.cdiv(triton.cdiv(tokens, TOKEN_BLOCK), parts),
        1 / (1 - dropout),
        TOKENS=TOKEN_BLOCK,
        **_constants(len(grad_ts), rank, dropout),
    )
    return [grad_PRI.sum(0) for grad_PRI in grad_GPRI]


def up(grad_ts: Sequence[Tensor], lora_As: Sequence[Tensor], keys_N: Sequence[Tensor], dropout: float) -> Tensor:
    """See dropped_product.up."""
    (tokens, rank), features = grad_ts[0].shape, lora_As[0].shape[1]
    out_NI = grad_ts[0].new_empty(tokens, features)
    _up[(triton.cdiv(tokens, TOKEN_BLOCK), triton.cdiv(features, 2 * HALF))](
        *_three([t_NR.contiguous() for t_NR in grad_ts]),
        *_three(lora_As),
        *_three(keys_N),
        out_NI,
        tokens,
        features,
        rank,
        1 / (1 - dropout),
        TOKENS=TOKEN_BLOCK,
        **_constants(len(grad_ts), rank, dropout),
    )
    return out_NI


@triton.jit
def _bits(key, n, tokens, pair_P, GOLDEN_RATIO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hashes of some tokens and pairs of features: dropped_product.mix in unsigned arithmetic."""
    key_N = tl.load(key + n, mask=n < tokens, other=0)
    h = (key_N[:, None] + (pair_P * GOLDEN_RATIO)[None, :]).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _features(start, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """From `start` on: the features of the first half, of the second, and the pairs that they make."""
    p = start + tl.arange(0, HALF)
    return p, p + HALF, start // 2 + tl.arange(0, HALF)


@triton.jit
def _halves(rows, row_inside, p, q, features):  # type: ignore[no-untyped-def]
    """What stands in some rows (pointers, a column of them) at the features of both halves."""
    first = tl.load(rows + p[None, :], mask=row_inside & (p[None, :] < features), other=0.0)
    second = tl.load(rows + q[None, :], mask=row_inside & (q[None, :] < features), other=0.0)
    return first, second


@triton.jit
def _store_halves(rows, row_inside, p, q, features, first, second):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    dtype = rows.dtype.element_ty
    tl.store(rows + p[None, :], first.to(dtype), mask=row_inside & (p[None, :] < features))
    tl.store(rows + q[None, :], second.to(dtype), mask=row_inside & (q[None, :] < features))


@triton.jit
def _kept(h, first, second, THRESHOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves, 0 where the hash drops them."""
    first = tl.where((h & 0xFFFF) >= THRESHOLD, first, 0.0)
    return first, tl.where((h >> 16) >= THRESHOLD, second, 0.0)


@triton.jit
def _halves_of_A(lora_A, r, p, q, features, rank, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    A_RP, A_RQ = _halves(lora_A + r[:, None] * features, r[:, None] < rank, p, q, features)
    return A_RP.to(dtype), A_RQ.to(dtype)


@triton.jit
def _add_down(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    total, x_NP, x_NQ, key, lora_A, n, r, p, q, pair_P, tokens, features, rank,
    THRESHOLD: tl.constexpr, GOLDEN_RATIO: tl.constexpr,
):  # fmt: skip
    x_NP, x_NQ = _kept(_bits(key, n, tokens, pair_P, GOLDEN_RATIO), x_NP, x_NQ, THRESHOLD)
    A_RP, A_RQ = _halves_of_A(lora_A, r, p, q, features, rank, x_NP.dtype)
    total = tl.dot(x_NP, tl.trans(A_RP), total, input_precision="ieee")
    return tl.dot(x_NQ, tl.trans(A_RQ), total, input_precision="ieee")


@triton.jit
def _down(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    x, key0, key1, key2, A0, A1, A2, out, tokens, features, rank, each, x_stride, scale,
    TOKENS: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    rows = x + n.to(tl.int64)[:, None] * x_stride
    total0 = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    total1 = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    total2 = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, features, 2 * HALF):
        p, q, pair_P = _features(start, HALF)
        x_NP, x_NQ = _halves(rows, n[:, None] < tokens, p, q, features)
        total0 = _add_down(
            total0, x_NP, x_NQ, key0, A0, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
        )
        if MODULES > 1:
            total1 = _add_down(
                total1, x_NP, x_NQ, key1, A1, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
            )
        if MODULES > 2:
            total2 = _add_down(
                total2, x_NP, x_NQ, key2, A2, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
            )
    place = out + n.to(tl.int64)[:, None] * rank + r[None, :]
    inside = (n[:, None] < tokens) & (r[None, :] < rank)
    tl.store(place, (total0 * scale).to(out.dtype.element_ty), mask=inside)
    if MODULES > 1:
        tl.store(place + each, (total1 * scale).to(out.dtype.element_ty), mask=inside)
    if MODULES > 2:
        tl.store(place + 2 * each, (total2 * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of_t(grad_t, n, r, tokens, rank):  # type: ignore[no-untyped-def]
    place = grad_t + n.to(tl.int64)[:, None] * rank + r[None, :]
    return tl.load(place, mask=(n[:, None] < tokens) & (r[None, :] < rank), other=0.0)


@triton.jit
def _add_grad(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    total_P, total_Q, x_NP, x_NQ, grad_t, key, n, r, pair_P, tokens, rank,
    THRESHOLD: tl.constexpr, GOLDEN_RATIO: tl.constexpr,
):  # fmt: skip
    x_NP, x_NQ = _kept(_bits(key, n, tokens, pair_P, GOLDEN_RATIO), x_NP, x_NQ, THRESHOLD)
    t_RN = tl.trans(_rows_of_t(grad_t, n, r, tokens, rank))
    total_P = tl.dot(t_RN, x_NP.to(t_RN.dtype), total_P, input_precision="ieee")
    total_Q = tl.dot(t_RN, x_NQ.to(t_RN.dtype), total_Q, input_precision="ieee")
    return total_P, total_Q


@triton.jit
def _grad_A(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    t0, t1, t2, x, key0, key1, key2, out, tokens, features, rank, x_stride, blocks, scale,
    TOKENS: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    p, q, pair_P = _features(tl.program_id(0) * 2 * HALF, HALF)
    r = tl.arange(0, RANK)
    part = tl.program_id(1)
    total0_P = tl.zeros((RANK, HALF), dtype=tl.float32)
    total0_Q = tl.zeros((RANK, HALF), dtype=tl.float32)
    total1_P = tl.zeros((RANK, HALF), dtype=tl.float32)
    total1_Q = tl.zeros((RANK, HALF), dtype=tl.float32)
    total2_P = tl.zeros((RANK, HALF), dtype=tl.float32)
    total2_Q = tl.zeros((RANK, HALF), dtype=tl.float32)
    for block in range(part * blocks, part * blocks + blocks):
        n = block * TOKENS + tl.arange(0, TOKENS)
        x_NP, x_NQ = _halves(x + n.to(tl.int64)[:, None] * x_stride, n[:, None] < tokens, p, q, features)
        total0_P, total0_Q = _add_grad(
            total0_P, total0_Q, x_NP, x_NQ, t0, key0, n, r, pair_P, tokens, rank, THRESHOLD, GOLDEN_RATIO
        )
        if MODULES > 1:
            total1_P, total1_Q = _add_grad(
                total1_P, total1_Q, x_NP, x_NQ, t1, key1, n, r, pair_P, tokens, rank, THRESHOLD, GOLDEN_RATIO
            )
        if MODULES > 2:
            total2_P, total2_Q = _add_grad(
                total2_P, total2_Q, x_NP, x_NQ, t2, key2, n, r, pair_P, tokens, rank, THRESHOLD, GOLDEN_RATIO
            )
    rows = out + (part * rank + r)[:, None] * features
    each = tl.num_programs(1) * rank * features
    inside = r[:, None] < rank
    _store_halves(rows, inside, p, q, features, total0_P * scale, total0_Q * scale)
    if MODULES > 1:
        _store_halves(rows + each, inside, p, q, features, total1_P * scale, total1_Q * scale)
    if MODULES > 2:
        _store_halves(rows + 2 * each, inside, p, q, features, total2_P * scale, total2_Q * scale)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    sum_NP, sum_NQ, grad_t, lora_A, key, n, r, p, q, pair_P, tokens, features, rank,
    THRESHOLD: tl.constexpr, GOLDEN_RATIO: tl.constexpr,
):  # fmt: skip
    t_NR = _rows_of_t(grad_t, n, r, tokens, rank)
    A_RP, A_RQ = _halves_of_A(lora_A, r, p, q, features, rank, t_NR.dtype)
    add_NP, add_NQ = tl.dot(t_NR, A_RP, input_precision="ieee"), tl.dot(t_NR, A_RQ, input_precision="ieee")
    add_NP, add_NQ = _kept(_bits(key, n, tokens, pair_P, GOLDEN_RATIO), add_NP, add_NQ, THRESHOLD)
    return sum_NP + add_NP, sum_NQ + add_NQ


@triton.jit
def _up(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    t0, t1, t2, A0, A1, A2, key0, key1, key2, out, tokens, features, rank, scale,
    TOKENS: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr,
    GOLDEN_RATIO: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    p, q, pair_P = _features(tl.program_id(1) * 2 * HALF, HALF)
    r = tl.arange(0, RANK)
    sum_NP = tl.zeros((TOKENS, HALF), dtype=tl.float32)
    sum_NQ = tl.zeros((TOKENS, HALF), dtype=tl.float32)
    sum_NP, sum_NQ = _add_up(
        sum_NP, sum_NQ, t0, A0, key0, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
    )
    if MODULES > 1:
        sum_NP, sum_NQ = _add_up(
            sum_NP, sum_NQ, t1, A1, key1, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
        )
    if MODULES > 2:
        sum_NP, sum_NQ = _add_up(
            sum_NP, sum_NQ, t2, A2, key2, n, r, p, q, pair_P, tokens, features, rank, THRESHOLD, GOLDEN_RATIO
        )
    rows = out + n.to(tl.int64)[:, None] * features
    _store_halves(rows, n[:, None] < tokens, p, q, features, sum_NP * scale, sum_NQ * scale)
