"""How a frozen weight matrix is stored: in which tensors, how a weight becomes them, and how it comes back.

4-bit weights are in bitsandbytes' layout (blocks of 64; with double quantization, 8-bit scales in blocks of 256), so
that its kernels serve on CPU and CUDA and its pre-quantized checkpoints load as they are. int8 is LLM.int8()'s storage
(row-wise absmax) without its outlier path. fp8 is e4m3 with a scale a row; `fp8_both` stores the transpose beside it (2
bytes a weight, as bf16), which saves backward the time to make it (model/layer/frozen_product.py). Both hold the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drawplate.kernels import four_bits
from drawplate.kernels.fp8_rows import FP8, fp8_rows
from drawplate.kernels.transposed import transposed as transpose_of

BLOCK = four_bits.BLOCK
SCALE_BLOCK = four_bits.SCALE_BLOCK
PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_KINDS = ("fp8", "fp8_both")
FP8_MULTIPLE = 16
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Storage:
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

    @property
    def native(self) -> bool:
        """Whether products take the weight as it is stored; else it is dequantized for them."""
        return self.precision in FP8_KINDS or not self.quantized

    @property
    def fastest(self) -> Storage | None:
        """The same numbers stored so that no step has to turn them into anything; None where that is the plain dtype.

        In tier "dequantized" a layer is stored so."""
        return replace(self, precision="fp8_both") if self.precision in FP8_KINDS else None

    def specs(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored tensors of an O x I weight: name -> (shape, dtype)."""
        if not self.quantized:
            return {"weight": ((out_features, in_features), PLAIN_DTYPES[self.precision])}
        if self.precision == "int8":
            return {
                "int8": ((out_features, in_features), torch.int8),
                "row_scale": ((out_features,), torch.float32),
            }
        if self.precision in FP8_KINDS:
            turned = {"fp8_transposed": ((in_features, out_features), FP8)} if self.precision == "fp8_both" else {}
            return {
                "fp8": ((out_features, in_features), FP8),
                "row_scale": ((out_features,), torch.float32),
                **turned,
            }
        count = out_features * in_features
        blocks = -(-count // BLOCK)
        packed = {"packed": ((-(-count // 2), 1), torch.uint8)}
        if not self.double_quant:
            return {**packed, "absmax": ((blocks,), torch.float32)}
        return {
            **packed,
            "absmax": ((blocks,), torch.uint8),
            "absmax_scale": ((-(-blocks // SCALE_BLOCK),), torch.float32),
            "absmax_offset": ((), torch.float32),
        }

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight, on the weight's device."""
        if not self.quantized:
            return {"weight": weight_OI.to(PLAIN_DTYPES[self.precision])}
        if self.precision == "int8":
            row_scale = weight_OI.float().abs().amax(dim=1).clamp(min=1e-30) / 127
            return {
                "int8": (weight_OI.float() / row_scale[:, None]).round().to(torch.int8),
                "row_scale": row_scale,
            }
        if self.precision in FP8_KINDS:
            rounded, scale = fp8_rows(weight_OI.float())
            return self.completed({"fp8": rounded, "row_scale": scale[:, 0]})
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            weight_OI.contiguous(),
            blocksize=BLOCK,
            quant_type=self.precision,
            compress_statistics=self.double_quant,
        )
        stored = {"packed": packed, "absmax": state.absmax}
        if self.double_quant:
            stored |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
        return stored

    def completed(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """What fp8 stores -> what this kind of fp8 stores."""
        turned = {"fp8_transposed": transpose_of(encoded["fp8"])} if self.precision == "fp8_both" else {}
        return {**encoded, **turned}

    def decode(self, stored: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The O x I weight in `dtype`, from stored tensors in the order of `specs`."""
        if not self.quantized:
            return stored[0].to(dtype)
        if self.precision == "int8":
            return (stored[0].to(dtype)) * stored[1].to(dtype)[:, None]
        if self.precision in FP8_KINDS:
            return (stored[0].float() * stored[1][:, None]).to(dtype)
        if self.double_quant:
            return four_bits.dequantize(stored, self.precision, shape, dtype)
        packed, absmax = stored
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, self.precision, shape, dtype)
