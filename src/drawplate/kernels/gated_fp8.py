"""A gated feed-forward block's activation in fp8, each row read once: silu(gate) * up is rounded as it is made.

    gated            a = silu(gate) * up                       -> a in e4m3 and a scale a row
    gated_backward   d gate = da * up * silu'(gate),  d up = da * silu(gate), each times the scales of the weight that
                     it is multiplied by next                  -> both in e4m3 and a scale a row each

The compiler fuses the same arithmetic, but a row's largest must be known before any of it is rounded, so it reads every
row twice, and rows of this block are too many to be found in a cache the second time: 1.64 bytes moved where 1 is
needed. The kernels hold a row in registers. Rows wider than `MOST_COLUMNS` are left to the twins.

Shapes: N tokens, I intermediate features.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
SMALLEST = 1e-30
"""A row of zeros has this for its largest."""
MOST_COLUMNS = 32768


def fp8_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """-> (x / scale in e4m3, scale_N1 in float32): each row's largest becomes the largest that e4m3 has."""
    largest_N1 = x_NK.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST)
    return (x_NK.float() * (FP8_LARGEST / largest_N1)).to(FP8), largest_N1 / FP8_LARGEST


def gated(gate_NI: Tensor, up_NI: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """silu(gate) * up -> (rounded_NI in e4m3, scale_N1 in float32)."""
    if uses_triton(gate_NI.device, impl) and gate_NI.shape[1] <= MOST_COLUMNS:
        return _kernels().gated(gate_NI.contiguous(), up_NI.contiguous())
    gate_NI = gate_NI.float()
    return fp8_rows(gate_NI * gate_NI.sigmoid() * up_NI.float())


def gated_backward(
    grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, gate_scale_I: Tensor, up_scale_I: Tensor, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate and of up, times a scale a feature -> (rounded, scale) of the first and of the second."""
    if uses_triton(gate_NI.device, impl) and gate_NI.shape[1] <= MOST_COLUMNS:
        tensors = [tensor.contiguous() for tensor in (grad_NI, gate_NI, up_NI)]
        return _kernels().gated_backward(*tensors, gate_scale_I, up_scale_I)
    gate_NI, grad_NI = gate_NI.float(), grad_NI.float()
    sigmoid_NI = gate_NI.sigmoid()
    slope_NI = sigmoid_NI * (1 + gate_NI * (1 - sigmoid_NI))
    return (
        *fp8_rows(grad_NI * up_NI.float() * slope_NI * gate_scale_I),
        *fp8_rows(grad_NI * gate_NI * sigmoid_NI * up_scale_I),
    )


@torch.library.custom_op("drawplate::gated_fp8", mutates_args=())
def gated_fp8(gate_NI: Tensor, up_NI: Tensor) -> tuple[Tensor, Tensor]:
    """`gated`, opaque to the compiler."""
    return gated(gate_NI, up_NI)


@torch.library.custom_op("drawplate::gated_backward_fp8", mutates_args=())
def gated_backward_fp8(
    grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, gate_scale_I: Tensor, up_scale_I: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gated_backward`, opaque to the compiler."""
    return gated_backward(grad_NI, gate_NI, up_NI, gate_scale_I, up_scale_I)


def _rounded_like(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    return x_NI.new_empty(x_NI.shape, dtype=FP8), x_NI.new_empty(x_NI.shape[0], 1, dtype=torch.float32)


@gated_fp8.register_fake
def _(gate_NI: Tensor, up_NI: Tensor) -> tuple[Tensor, Tensor]:
    return _rounded_like(gate_NI)


@gated_backward_fp8.register_fake
def _(
    grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, gate_scale_I: Tensor, up_scale_I: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_rounded_like(gate_NI), *_rounded_like(gate_NI))


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import gated_fp8_triton

    return gated_fp8_triton
