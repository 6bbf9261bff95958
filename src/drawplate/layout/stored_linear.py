"""In which tensors a frozen weight matrix is stored, and where each lies in its layer's run of bytes.

4-bit weights are in bitsandbytes' layout: blocks of 64; with double quantization, 8-bit scales in blocks of 256. int8
is LLM.int8()'s storage (row-wise absmax). fp8 is e4m3 with a scale a row; `fp8_both` stores the transpose beside it.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own."""
ALIGNMENT = 256
"""Every tensor of a layer begins at a multiple of so many bytes."""
LAYER_ALIGNMENT = 2**16
"""Every layer begins at such a multiple in the cache's file."""
PLAIN_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Precisions that store a weight's own numbers -> their dtype."""
FP8_KINDS = ("fp8", "fp8_both")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class StoredLinear:
    """How a frozen weight matrix is stored.

    Attributes:
        precision: nf4, fp4, int8, fp8, fp8_both, bf16, fp16 or fp32.
        double_quant: for the 4-bit precisions, quantize the block scales as well.
    """

    precision: str
    double_quant: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the stored numbers are not the weight's own."""
        return self.precision not in PLAIN_DTYPES

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors of an O x I weight: name -> (shape, dtype's name in torch)."""
        if not self.quantized:
            return {"weight": ((out_features, in_features), PLAIN_DTYPES[self.precision])}
        row_scale = {"row_scale": ((out_features,), "float32")}
        if self.precision == "int8":
            return {"int8": ((out_features, in_features), "int8"), **row_scale}
        if self.precision in FP8_KINDS:
            turned = {"fp8_transposed": ((in_features, out_features), "float8_e4m3fn")}
            codes = {"fp8": ((out_features, in_features), "float8_e4m3fn")}
            return {**codes, **row_scale, **(turned if self.precision == "fp8_both" else {})}
        blocks = math.ceil(out_features * in_features / BLOCK)
        packed = {"packed": ((math.ceil(out_features * in_features / 2), 1), "uint8")}
        if not self.double_quant:
            return {**packed, "absmax": ((blocks,), "float32")}
        scales = {"absmax_scale": ((math.ceil(blocks / SCALE_BLOCK),), "float32"), "absmax_offset": ((), "float32")}
        return {**packed, "absmax": ((blocks,), "uint8"), **scales}

    def sizes(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Bytes of each stored tensor of an O x I weight."""
        stored = self.tensors(out_features, in_features).values()
        return tuple(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in stored)


def aligned(size: int) -> int:
    """Bytes from the beginning of a tensor of so many bytes to where the next one may begin."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def run_of(sizes: Iterable[int]) -> int:
    """Bytes of a layer with tensors of these sizes."""
    return sum(map(aligned, sizes))
