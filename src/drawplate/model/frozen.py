"""FrozenLinear: a linear layer whose weight is stored in any precision and never trained, with LoRA beside it.

The weight lives in whatever bytes the layer is handed at the call (`torch.func.functional_call`), so this file knows
nothing of devices, slots or streams. Forward needs x and the stored bytes; backward gives gradients to x and to the
adapter, never to the weight. The stored tensors go through `save_for_backward` like any other, so that whoever
recycles their memory can intercept them (bitsandbytes#2034 is what happens otherwise), and a dequantized weight lives
only inside one matrix product, unless the caller hands over the whole layer dequantized (`whole`): then the compiler
sees plain products, launched faster, at the price of one dequantized layer.

4-bit weights are in bitsandbytes' layout (blocks of 64; with double quantization, 8-bit scales in blocks of 256), so
that its kernels serve on CPU and CUDA and its pre-quantized checkpoints load as they are. int8 is LLM.int8()'s storage
(row-wise absmax) without its outlier path: the product runs on the dequantized weight.

Shapes: B batch, T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drawplate.model.dropout import dropout_mask

BLOCK = 64
WHOLE = "whole"
SCALE_BLOCK = 256
PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Storage:
    """How a frozen weight matrix is stored.

    Attributes:
        precision: nf4, fp4, int8, bf16, fp16 or fp32.
        double_quant: for the 4-bit precisions, quantize the block scales as well.
    """

    precision: str
    double_quant: bool = True

    @property
    def quantized(self) -> bool:
        """Whether the weight must be dequantized before a product."""
        return self.precision not in PLAIN_DTYPES

    def specs(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Stored tensors of an O x I weight: name -> (shape, dtype)."""
        if not self.quantized:
            return {"weight": ((out_features, in_features), PLAIN_DTYPES[self.precision])}
        if self.precision == "int8":
            return {
                "int8": ((out_features, in_features), torch.int8),
                "row_scale": ((out_features,), torch.float32),
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

    def decode(self, stored: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The O x I weight in `dtype`, from stored tensors in the order of `specs`."""
        if not self.quantized:
            return stored[0].to(dtype)
        if self.precision == "int8":
            return (stored[0].to(dtype)) * stored[1].to(dtype)[:, None]
        packed, absmax = stored[:2]
        if self.double_quant:
            code = _scale_code(absmax.device)
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, stored[2], code, SCALE_BLOCK, torch.float32)
            absmax = absmax + stored[3]
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, self.precision, shape, dtype)


DENSE = Storage("bf16")
"""A weight that is given in x's dtype already."""


@lru_cache(maxsize=8)
def _scale_code(device: torch.device) -> Tensor:
    """bitsandbytes' 256-entry dynamic map, in which double quantization writes the scales."""
    from bitsandbytes import functional as bnb

    return bnb.create_dynamic_map().to(device)


def _product(x: Tensor, stored: list[Tensor], storage: Storage, shape: tuple[int, int], transposed: bool) -> Tensor:
    weight_OI = storage.decode(stored, shape, x.dtype)
    return x @ weight_OI if transposed else F.linear(x, weight_OI)


@torch.library.custom_op("drawplate::frozen_product", mutates_args=())
def _frozen_product(
    x: Tensor, stored: list[Tensor], precision: str, double_quant: bool, out_in: list[int], transposed: bool
) -> Tensor:
    """Opaque to the compiler, which would otherwise keep the dequantized weight from forward to backward."""
    return _product(x, stored, Storage(precision, double_quant), (out_in[0], out_in[1]), transposed)


@_frozen_product.register_fake
def _(x, stored, precision, double_quant, out_in, transposed):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_in[1] if transposed else out_in[0]))


def frozen_product(
    x: Tensor, stored: list[Tensor], storage: Storage, shape: tuple[int, int], transposed: bool
) -> Tensor:
    """x_..I @ W^T -> ..O, or with `transposed` dy_..O @ W -> ..I."""
    if storage.quantized and torch.compiler.is_compiling():
        return _frozen_product(x, stored, storage.precision, storage.double_quant, list(shape), transposed)
    return _product(x, stored, storage, shape, transposed)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T; backward to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: Storage, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        ctx.storage, ctx.shape = storage, shape
        ctx.save_for_backward(*stored)
        return frozen_product(x, list(stored), storage, shape, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        grad_x = frozen_product(grad_y, list(ctx.saved_tensors), ctx.storage, ctx.shape, transposed=True)
        return grad_x, None, None, *(None for _ in ctx.saved_tensors)


@dataclass(frozen=True)
class _Settings:
    """What a product with LoRA needs beside tensors."""

    scaling: float
    dropout: float
    storage: Storage
    shape: tuple[int, int]


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + scaling * drop(x) A^T B^T, with the two skinny products added in place and the mask recomputed.

    Saves x, the rank-R intermediate and the stored weight. Adapter gradients are computed in x's dtype and returned in
    the adapter's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        x: Tensor,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        dropout_key: Tensor,
        *stored: Tensor,
    ) -> Tensor:
        scaling, dropout, storage, shape = settings.scaling, settings.dropout, settings.storage, settings.shape
        y = frozen_product(x, list(stored), storage, shape, transposed=False)
        dropped = _dropped(x, dropout_key, dropout)
        t_NR = dropped.reshape(-1, shape[1]) @ lora_A_RI.to(x.dtype).t()
        y.view(-1, shape[0]).addmm_(t_NR, lora_B_OR.to(x.dtype).t(), alpha=scaling)
        ctx.settings = settings
        ctx.save_for_backward(x, lora_A_RI, lora_B_OR, dropout_key, t_NR, *stored)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        settings = ctx.settings
        scaling, dropout, storage, shape = settings.scaling, settings.dropout, settings.storage, settings.shape
        x, lora_A_RI, lora_B_OR, dropout_key, t_NR, *stored = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, shape[0])
        grad_t_NR = (grad_NO @ lora_B_OR.to(x.dtype)) * scaling
        grad_A = grad_B = grad_x = None
        if ctx.needs_input_grad[2]:
            grad_A = (grad_t_NR.t() @ _dropped(x, dropout_key, dropout).reshape(-1, shape[1])).to(lora_A_RI.dtype)
        if ctx.needs_input_grad[3]:
            grad_B = ((grad_NO.t() @ t_NR) * scaling).to(lora_B_OR.dtype)
        if ctx.needs_input_grad[1]:
            grad_x = frozen_product(grad_y, stored, storage, shape, transposed=True)
            through_A = lora_A_RI.to(x.dtype)
            if dropout_key.numel() and dropout:
                grad_x = grad_x + _dropped((grad_t_NR @ through_A).view_as(x), dropout_key, dropout)
            else:
                grad_x.view(-1, shape[1]).addmm_(grad_t_NR, through_A)
        return None, grad_x, grad_A, grad_B, None, *(None for _ in stored)


def _dropped(x: Tensor, dropout_key: Tensor, dropout: float) -> Tensor:
    if dropout == 0 or dropout_key.numel() == 0:
        return x
    return x * dropout_mask(dropout_key, x.shape[-1], dropout, x.dtype)


class FrozenLinear(nn.Module):
    """Stands where a decoder layer had an nn.Linear. All its tensors are placeholders, given at the call.

    Args:
        linear: the meta-device module it replaces; gives the shape and whether there is a bias.
        storage: how the weight is stored.
        rank: of the adapter; 0 for none.
        scaling: of the adapter's product (lora_alpha / r).
        dropout: share of the adapter's input dropped where a `dropout_key` is given.
    """

    def __init__(
        self, linear: nn.Linear, storage: Storage, *, rank: int = 0, scaling: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage, self.rank, self.scaling, self.dropout = storage, rank, scaling, dropout
        self.stored_names = tuple(storage.specs(self.out_features, self.in_features))
        for name, (shape, dtype) in storage.specs(self.out_features, self.in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        if storage.quantized:
            self.register_buffer(WHOLE, torch.empty(0, device="meta"))
        if linear.bias is not None:
            self.bias: nn.Parameter | None = nn.Parameter(linear.bias.detach(), requires_grad=False)
        else:
            self.bias = None
        if rank:
            self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device="meta"))
            self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device="meta"))
            self.register_buffer("dropout_key", torch.empty(0, dtype=torch.int32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x_..I -> y_..O."""
        stored, storage = [getattr(self, name) for name in self.stored_names], self.storage
        whole = getattr(self, WHOLE, None)
        if whole is not None and whole.numel():
            stored, storage = [whole], DENSE
        shape = (self.out_features, self.in_features)
        if self.rank:
            settings = _Settings(self.scaling, self.dropout, storage, shape)
            y = _LoraLinear.apply(settings, x, self.lora_A, self.lora_B, self.dropout_key, *stored)
        else:
            y = _FrozenLinear.apply(x, storage, shape, *stored)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self, stored: dict[str, Tensor], path: str, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, from a layer's stored tensors in which this one's are found under `path`."""
        parts = [stored[f"{path}.{name}"] for name in self.stored_names]
        return self.storage.decode(parts, (self.out_features, self.in_features), dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's, with precision and rank."""
        return f"{self.in_features}, {self.out_features}, {self.storage.precision}, rank={self.rank}"
