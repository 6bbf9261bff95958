"""A matrix of one-byte elements -> its transpose, at the memory's speed; torch's own copy takes seven times as long.

fp8 units want both operands of a product with the summed dimension last, so backward multiplies by the transpose of
what forward multiplies by (model/layer/frozen_product.py).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton


def transposed(x_RC: Tensor, impl: Impl = "auto") -> Tensor:
    """The same elements, contiguous, as (C, R); of any dtype that is one byte wide.

    Raises:
        ValueError: wider elements, or a matrix that is not contiguous.
    """
    if x_RC.element_size() != 1 or not x_RC.is_contiguous():
        raise ValueError(f"needs a contiguous matrix of one-byte elements, got {x_RC.dtype} of strides {x_RC.stride()}")
    if uses_triton(x_RC.device, impl):
        return _kernels().transposed(x_RC.view(torch.uint8)).view(x_RC.dtype)
    return x_RC.t().contiguous()


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import transposed_triton

    return transposed_triton
