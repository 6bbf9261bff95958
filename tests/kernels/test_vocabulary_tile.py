"""The kernels of a tile of logits and their twins against float64. On a CPU they run in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from drawplate.kernels.vocabulary_tile import (
    MARGIN,
    Columns,
    TokenSums,
    absorb_tile,
    copy_target_rows,
    scale_moved_rows,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {"plain": {}, "softcap": {"softcap": 5.0}, "all": {"softcap": 3.0, "scale": 1.7, "bias": True}}
SHAPES = [(3, 1), (5, 16), (4, 257), (2, 1000)]


def a_tile(tokens: int, columns: int, *, height: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, columns, generator=generator) * height).to(DEVICE)


def rule(columns: int, *, first: int = 0, bias: bool = False, **options: float) -> Columns:
    bias_V = torch.linspace(-1, 1, columns, device=DEVICE) if bias else None
    return Columns(first=first, bias_V=bias_V, **options)


def exact(logits_BV: Tensor, targets_B: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, written out without this module -> (logsumexp without the target, target's logit, slopes)."""
    z_BV = logits_BV.double()
    if columns.bias_V is not None:
        z_BV = z_BV + columns.bias_V.double()
    z_BV = z_BV * columns.scale
    slope_BV = torch.ones_like(z_BV)
    if columns.softcap is not None:
        z_BV = columns.softcap * torch.tanh(z_BV / columns.softcap)
        slope_BV = 1 - (z_BV / columns.softcap) ** 2
    own_BV = torch.arange(z_BV.shape[1], device=z_BV.device)[None] == (targets_B - columns.first)[:, None]
    target_B = torch.where(own_BV.any(1), z_BV.masked_fill(~own_BV, 0).sum(1), math.nan)
    rest_BV = z_BV.masked_fill(own_BV, -math.inf)
    return rest_BV.logsumexp(1), target_B, (rest_BV, slope_BV)


def absorbed(logits_BV: Tensor, sums: TokenSums, columns: Columns, dtype: torch.dtype, impl: str) -> Tensor:
    """The weights; the kernel writes them over the logits."""
    tokens, count = logits_BV.shape
    row = -(-count // 8) * 8
    buffer = torch.full((tokens, row), math.nan, device=DEVICE)
    buffer[:, :count] = logits_BV
    own = impl == "triton" and dtype != torch.float32
    weights_BV = buffer.view(dtype)[:, :count] if own else torch.empty(tokens, count, dtype=dtype, device=DEVICE)
    slope_BV = torch.empty(tokens, count, device=DEVICE)
    absorb_tile(buffer[:, :count], sums, columns, weights_BV, slope_BV, impl)
    return weights_BV


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_tile_gives_what_float64_gives(shape, variant, dtype, impl) -> None:
    logits_BV, columns = a_tile(*shape), rule(shape[1], first=100, **RULES[variant])
    targets_B = torch.tensor([100, 100 + shape[1] - 1, 99, 100 + shape[1], 100][: shape[0]], device=DEVICE)
    sums = TokenSums.start(targets_B, torch.float32)
    weights_BV = absorbed(logits_BV, sums, columns, dtype, impl)
    lse_B, target_B, (rest_BV, slope_BV) = exact(logits_BV, targets_B, columns)
    assert torch.allclose(sums.target_logit_B.double(), target_B, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.allclose((sums.reference_B + sums.sum_B.log()).double(), lse_B, rtol=1e-5, atol=2e-5)
    wanted_BV = torch.exp(rest_BV - sums.reference_B.double()[:, None]) * slope_BV
    step = torch.finfo(dtype).eps
    assert torch.allclose(weights_BV.double(), wanted_BV, rtol=step + 1e-4, atol=1e-5 + torch.finfo(dtype).tiny)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_reference_moves_only_beyond_the_margin(impl) -> None:
    targets_B = torch.tensor([999, 999], device=DEVICE)
    sums = TokenSums.start(targets_B, torch.float32)
    seen = []
    for height in (1.0, 1.0 + 0.9 * MARGIN, 2.5 * MARGIN):
        tile_BV = torch.zeros(2, 20, device=DEVICE)
        tile_BV[:, 7] = height
        seen.append(tile_BV.clone())
        absorbed(tile_BV, sums, rule(20), torch.bfloat16, impl)
        moved = bool((sums.shrink_B != 1).all())
        assert moved == (height != 1.0 + 0.9 * MARGIN)
    expected_B = torch.cat(seen, 1).double().logsumexp(1)
    assert torch.allclose((sums.reference_B + sums.sum_B.log()).double(), expected_B, rtol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_is_not_a_number_is_not_hidden(impl) -> None:
    logits_BV = a_tile(2, 20)
    logits_BV[1, 3] = math.nan
    sums = TokenSums.start(torch.tensor([0, 0], device=DEVICE), torch.float32)
    absorbed(logits_BV, sums, rule(20), torch.bfloat16, impl)
    assert not sums.sum_B[0].isnan()
    assert sums.sum_B[1].isnan()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_evaluation_writes_no_weights(impl) -> None:
    logits_BV = a_tile(3, 50)
    sums = TokenSums.start(torch.tensor([0, 1, 2], device=DEVICE), torch.float32)
    absorb_tile(logits_BV.clone(), sums, rule(50), None, impl=impl)
    lse_B, _, _ = exact(logits_BV, sums.targets_B, rule(50))
    assert torch.allclose((sums.reference_B + sums.sum_B.log()).double(), lse_B, rtol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("hidden", [1, 40, 1500])
def test_rows_that_moved_are_scaled_and_no_others(hidden, impl) -> None:
    gradient_BH = a_tile(4, hidden)
    shrink_B = torch.tensor([1.0, 0.5, 1.0, 0.0], device=DEVICE)
    expected_BH = gradient_BH * shrink_B[:, None]
    scale_moved_rows(gradient_BH, shrink_B, impl)
    assert torch.equal(gradient_BH, expected_BH)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("hidden", [3, 1500])
def test_target_rows_of_a_chunk_are_copied_and_the_others_kept(hidden, impl) -> None:
    weight_VH = a_tile(10, hidden).bfloat16()
    targets_B = torch.tensor([4, 5, 14, 15, 0], device=DEVICE)
    rows_BH = torch.full((5, hidden), 7.0, dtype=torch.bfloat16, device=DEVICE)
    copy_target_rows(weight_VH, 5, targets_B, rows_BH, impl)
    assert torch.equal(rows_BH[1:3], weight_VH[[0, 9]])
    assert (rows_BH[[0, 3, 4]] == 7).all()
