"""Rounding to fp8 (e4m3) with a scale a row. Plain torch: the compiler fuses it with what comes before."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
SMALLEST = 1e-30
"""A row of zeros has this for its largest."""


def fp8_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """-> (x / scale in e4m3, scale_N1 in float32): each row's largest becomes the largest that e4m3 has."""
    largest_N1 = x_NK.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST)
    return (x_NK.float() * (FP8_LARGEST / largest_N1)).to(FP8), largest_N1 / FP8_LARGEST
