"""How a frozen weight matrix is stored: in which tensors, how a weight becomes them, and how it comes back.

The tensors are those of layout/stored_linear.py. 4-bit weights are in bitsandbytes' layout, so that its kernels serve
on CPU and CUDA and its pre-quantized checkpoints load as they are. int8 is without LLM.int8()'s outlier path.
`fp8_both` (2 bytes a weight, as bf16) saves backward the time to make the transpose (model/layer/frozen_product.py);
both kinds of fp8 hold the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drawplate.kernels import four_bits
from drawplate.kernels.fp8_rows import fp8_rows
from drawplate.kernels.transposed import transposed as transpose_of
from drawplate.layout import stored_linear
from drawplate.layout.stored_linear import BLOCK, FP8_KINDS, StoredLinear

FP8_MULTIPLE = 16
FP8_CAPABILITY = (8, 9)
PLAIN_DTYPES = {name: getattr(torch, dtype) for name, dtype in stored_linear.PLAIN_DTYPES.items()}


@dataclass(frozen=True)
class Storage(StoredLinear):
    """A frozen weight matrix as it is stored: how it becomes the stored tensors, and how it comes back."""

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
        stored = self.tensors(out_features, in_features)
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in stored.items()}

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
