"""4-bit weights with doubly quantized scales -> the weights, in one pass; bitsandbytes needs three kernels for it.

The numbers are bitsandbytes' own, bit for bit: code[nibble] * (scale_code[absmax] * absmax_scale + absmax_offset), each
operation rounded to float32 by itself, the product rounded once to the wanted dtype.

Left out: scales that are not quantized, and other blocks than bitsandbytes' defaults; its own kernels do those.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton
from drawplate.layout.stored_linear import BLOCK, SCALE_BLOCK


def dequantize(
    stored: list[Tensor], quant_type: str, shape: tuple[int, int], dtype: torch.dtype, impl: Impl = "auto"
) -> Tensor:
    """The weight of a doubly quantized nf4 or fp4 matrix.

    Args:
        stored: packed uint8 (two weights a byte, the first in the high half), absmax uint8 (a block), absmax_scale
            float32 (256 blocks), absmax_offset float32 ().
        quant_type: nf4 or fp4.
        shape: of the weight.
        dtype: wanted.
        impl: the kernel or its twin, which is bitsandbytes.
    """
    packed, absmax, scale, offset = stored
    if uses_triton(packed.device, impl):
        code = tables(quant_type, packed.device)
        return _kernels().dequantize(packed, absmax, scale, offset, code, shape, dtype)
    _, scale_code = tables(quant_type, packed.device)
    blocks = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scale, scale_code, SCALE_BLOCK, torch.float32)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, blocks + offset, BLOCK, quant_type, shape, dtype)


@functools.lru_cache(maxsize=8)
def tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> (the 16 values of a nibble, the 256 of a scale), float32."""
    from bitsandbytes import functional as bnb

    return bnb.get_4bit_type(quant_type, device=device), bnb.create_dynamic_map().to(device)


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import four_bits_triton

    return four_bits_triton
