"""The Triton half of `gated_fp8`: one program for a token, its row in registers. Imports Triton.

Triton's interpreter rounds to e4m3 wrongly (3.9: a carry out of the mantissa is lost), so on a CPU the kernels are
tested with `dtype` float32: the numbers that would be rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drawplate.kernels.gated_fp8 import FP8, FP8_LARGEST, SMALLEST

COLUMNS_A_WARP = 512
MOST_REGISTERS = 64
"""Of a thread: two rows of 8,192 then share a multiprocessor, and one is read while the other is computed."""


def gated(gate_NI: Tensor, up_NI: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """See gated_fp8.gated; contiguous rows."""
    rows, columns = gate_NI.shape
    rounded_NI, scale_N1 = _outputs(gate_NI, dtype)
    _gated[(rows,)](gate_NI, up_NI, rounded_NI, scale_N1, columns, **_constants(columns))
    return rounded_NI, scale_N1


def gated_backward(
    grad_NI: Tensor,
    gate_NI: Tensor,
    up_NI: Tensor,
    gate_scale_I: Tensor,
    up_scale_I: Tensor,
    dtype: torch.dtype = FP8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See gated_fp8.gated_backward; contiguous rows."""
    rows, columns = gate_NI.shape
    outputs = (*_outputs(gate_NI, dtype), *_outputs(gate_NI, dtype))
    _gated_backward[(rows,)](
        grad_NI, gate_NI, up_NI, gate_scale_I, up_scale_I, *outputs, columns, **_constants(columns)
    )
    return outputs


def _outputs(like_NI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(like_NI, dtype=dtype), like_NI.new_empty(len(like_NI), 1, dtype=torch.float32)


def _constants(columns: int) -> dict[str, Any]:
    block = triton.next_power_of_2(columns)
    warps = max(1, min(32, block // COLUMNS_A_WARP))
    launch = {"num_warps": warps, "maxnreg": MOST_REGISTERS}
    return {"LARGEST": FP8_LARGEST, "SMALLEST": SMALLEST, "BLOCK": block, **launch}


@triton.jit
def _store_rounded(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    value, rounded, scales, row, place, inside, LARGEST: tl.constexpr, SMALLEST: tl.constexpr
):
    largest = tl.maximum(tl.max(tl.abs(value), axis=0), SMALLEST)
    tl.store(scales + row, largest / LARGEST)
    tl.store(rounded + place, (value * (LARGEST / largest)).to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def _gated(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    gate, up, rounded, scales, columns, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, place = column < columns, row * columns + column
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    _store_rounded(g * tl.sigmoid(g) * u, rounded, scales, row, place, inside, LARGEST, SMALLEST)


@triton.jit
def _gated_backward(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes what it takes
    grad, gate, up, gate_scale, up_scale, rounded_gate, scales_gate, rounded_up, scales_up, columns,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, place = column < columns, row * columns + column
    da = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    scale_g = tl.load(gate_scale + column, mask=inside, other=0.0)
    scale_u = tl.load(up_scale + column, mask=inside, other=0.0)
    d_gate = da * u * sigmoid * (1.0 + g * (1.0 - sigmoid)) * scale_g
    _store_rounded(d_gate, rounded_gate, scales_gate, row, place, inside, LARGEST, SMALLEST)
    d_up = da * g * sigmoid * scale_u
    _store_rounded(d_up, rounded_up, scales_up, row, place, inside, LARGEST, SMALLEST)
