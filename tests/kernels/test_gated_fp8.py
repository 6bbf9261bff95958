"""The gated activation in fp8: kernels and twins against float64, odd shapes included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drawplate.kernels.gated_fp8 import FP8, FP8_LARGEST, fp8_rows, gated, gated_backward

pytest.importorskip("triton")

from drawplate.kernels import gated_fp8_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(1, 1), (3, 16), (17, 200), (5, 1030)]
HALF_STEP = 2.0**-4
"""e4m3 has three bits after the point: a number is at most this share of itself away from where it is rounded to."""


def draw(shape: tuple[int, int], dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    return [(2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for _ in range(count)]


def assert_rounded(rounded: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Half a step from the exact numbers, a row's largest at the largest that e4m3 has; tiny ones to its smallest."""
    if rounded.dtype == torch.float32:
        rounded = rounded.to(FP8)
    assert rounded.dtype == FP8
    assert scale.shape == (len(exact), 1)
    assert torch.allclose(scale.double(), exact.abs().amax(1, keepdim=True) / FP8_LARGEST, rtol=1e-5)
    error = (rounded.double() * scale.double() - exact).abs()
    assert bool((error <= exact.abs() * HALF_STEP * 1.001 + scale.double() * 2.0**-10 * 1.001).all())


@pytest.fixture(params=["triton", "torch"])
def functions(request) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(gated, gated_backward) of an implementation; Triton's interpreter is only asked for unrounded numbers."""
    if request.param == "torch" or DEVICE == "cuda":
        return partial(gated, impl=request.param), partial(gated_backward, impl=request.param)
    return partial(gated_fp8_triton.gated, dtype=torch.float32), partial(
        gated_fp8_triton.gated_backward, dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_are_the_exact_ones_rounded_once(functions, dtype, shape) -> None:
    forward, backward = functions
    gate, up, grad = draw(shape, dtype, 3)
    scales = [0.5 + torch.rand(shape[1], generator=torch.Generator().manual_seed(2)).to(DEVICE) for _ in range(2)]
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    out = F.silu(exact[0]) * exact[1]
    d_gate, d_up = torch.autograd.grad(out, exact, grad.double())
    assert_rounded(*forward(gate, up), out.detach())
    rounded_gate, scale_gate, rounded_up, scale_up = backward(grad, gate, up, *scales)
    assert_rounded(rounded_gate, scale_gate, d_gate * scales[0])
    assert_rounded(rounded_up, scale_up, d_up * scales[1])


def test_a_row_of_zeros_stays_one(functions) -> None:
    zeros = torch.zeros(2, 40, device=DEVICE)
    rounded, scale = functions[0](zeros, zeros)
    assert bool((rounded.float() == 0).all())
    assert bool((scale > 0).all())


def test_rounding_to_tensors_instead_of_rows_would_be_seen() -> None:
    """The negative control: one scale for all rows fails what the test above asks for."""
    gate, up = draw((17, 200), torch.float32, 2)
    gate[0] *= 1e-4
    exact = (F.silu(gate.double()) * up.double()).detach()
    rounded, scale = fp8_rows(exact.float().reshape(1, -1))
    with pytest.raises(AssertionError):
        assert_rounded(rounded.reshape(17, 200), scale.expand(17, 1), exact)
