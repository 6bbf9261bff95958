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

fp8 alone is multiplied as it is stored (`native`): e4m3 with a scale a row, and the products' other operand rounded to
e4m3 with a scale a row as it comes, in forward and in backward. The hardware wants both operands with the summed
dimension last, so backward needs the transpose: made as it is needed (`fp8`, 1 byte a weight), or stored beside the
weight (`fp8_both`, 2 bytes, as bf16), which only saves time. Both hold the same numbers: the rows' scales, which
backward cannot take out of its sum, go into the incoming gradient before it is rounded. Where there are no fp8 units
(a CPU) the same rounded numbers are multiplied in float32: slow, and what tests compare with.

Shapes: B batch, T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drawplate.kernels import dropped_product, four_bits
from drawplate.kernels.transposed import transposed as transpose_of

BLOCK = four_bits.BLOCK
WHOLE = "whole"
SCALE_BLOCK = four_bits.SCALE_BLOCK
PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_KINDS = ("fp8", "fp8_both")
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
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


DENSE = Storage("bf16")
"""A weight that is given in x's dtype already."""


def fp8_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """-> (x / scale in e4m3, scale_N1 in float32): each row's largest becomes the largest that e4m3 has."""
    scale_N1 = x_NK.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30) / FP8_LARGEST
    return (x_NK.float() / scale_N1).to(FP8), scale_N1


def _fp8_product(x: Tensor, stored: list[Tensor], transposed: bool) -> Tensor:
    weight_OI, scale_O, *weight_IO = stored
    rows_NK = x.reshape(-1, x.shape[-1])
    rounded_NK, scale_N1 = fp8_rows(rows_NK.float() * scale_O if transposed else rows_NK)
    if not transposed:
        y_NM = _rounded_product(rounded_NK, scale_N1, weight_OI, scale_O)
    elif weight_IO:
        y_NM = _rounded_product(rounded_NK, scale_N1, weight_IO[0], None)
    elif torch.compiler.is_compiling():
        y_NM = _frozen_product_fp8(rounded_NK, scale_N1, weight_OI)
    else:
        y_NM = _rounded_product(rounded_NK, scale_N1, transpose_of(weight_OI), None)
    return y_NM.to(x.dtype).view(*x.shape[:-1], -1)


def _rounded_product(rounded_NK: Tensor, scale_N1: Tensor, other_MK: Tensor, scale_M: Tensor | None) -> Tensor:
    """The product of two operands in e4m3, each row times its scale; bf16, on a CPU float32."""
    scale_1M = scale_N1.new_ones(1, len(other_MK)) if scale_M is None else scale_M[None]
    if rounded_NK.device.type == "cpu":
        return (rounded_NK.float() @ other_MK.t().float()) * scale_N1 * scale_1M
    return torch._scaled_mm(
        rounded_NK, other_MK.t(), scale_a=scale_N1, scale_b=scale_1M, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@torch.library.custom_op("drawplate::frozen_product_fp8", mutates_args=())
def _frozen_product_fp8(rounded_NO: Tensor, scale_N1: Tensor, weight_OI: Tensor) -> Tensor:
    """Backward's product; opaque to the compiler, which would otherwise make the transpose in forward and keep it."""
    return _rounded_product(rounded_NO, scale_N1, transpose_of(weight_OI), None)


@_frozen_product_fp8.register_fake
def _(rounded_NO: Tensor, scale_N1: Tensor, weight_OI: Tensor) -> Tensor:
    dtype = torch.float32 if rounded_NO.device.type == "cpu" else torch.bfloat16
    return scale_N1.new_empty(rounded_NO.shape[0], weight_OI.shape[1], dtype=dtype)


def _product(x: Tensor, stored: list[Tensor], storage: Storage, shape: tuple[int, int], transposed: bool) -> Tensor:
    if storage.precision in FP8_KINDS:
        return _fp8_product(x, stored, transposed)
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
    if not storage.native and torch.compiler.is_compiling():
        return _frozen_product(x, stored, storage.precision, storage.double_quant, list(shape), transposed)
    return _product(x, stored, storage, shape, transposed)


# The two functions below take what they take as `*given`: without gradients, torch's compiler leaves the context out
# where forward has as many parameters as it is given arguments, as it would with two stored tensors at the end (int8).


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T; backward to x only. Constants as in _LoraLinear."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, out_features, in_features, precision, double_quant, *stored = given
        ctx.shape, ctx.precision, ctx.double_quant = (out_features, in_features), precision, double_quant
        ctx.save_for_backward(*stored)
        return frozen_product(x, stored, Storage(precision, double_quant), ctx.shape, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        storage, stored = Storage(ctx.precision, ctx.double_quant), list(ctx.saved_tensors)
        grad_x = frozen_product(grad_y, stored, storage, ctx.shape, transposed=True)
        return grad_x, None, None, None, None, *(None for _ in stored)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + scaling * drop(x) A^T B^T, with the two skinny products added in place and the mask recomputed.

    Saves x, the rank-R intermediate and the stored weight. Adapter gradients are computed in x's dtype and returned in
    the adapter's. The storage comes as two constants: torch 2.11's compiler mixes a dataclass up with tensors.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, lora_A_RI, lora_B_OR, dropout_key, scaling, dropout, precision, double_quant, *stored = given
        storage, shape = Storage(precision, double_quant), (lora_B_OR.shape[0], lora_A_RI.shape[1])
        y = frozen_product(x, stored, storage, shape, transposed=False)
        x_NI = x.reshape(-1, shape[1])
        if _drops(dropout_key, dropout):
            t_NR = dropped_product.dropped_down(x_NI, dropout_key.reshape(-1), lora_A_RI, dropout)
        else:
            t_NR = x_NI @ lora_A_RI.to(x.dtype).t()
        if torch.compiler.is_compiling():  # in place would be a copy there; a sum joins whatever follows it
            y = y + ((t_NR @ lora_B_OR.to(x.dtype).t()) * scaling).view_as(y)
        else:
            y.view(-1, shape[0]).addmm_(t_NR, lora_B_OR.to(x.dtype).t(), alpha=scaling)
        ctx.scaling, ctx.dropout, ctx.precision, ctx.double_quant = scaling, dropout, precision, double_quant
        ctx.save_for_backward(x, lora_A_RI, lora_B_OR, dropout_key, t_NR, *stored)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        scaling, dropout = ctx.scaling, ctx.dropout
        x, lora_A_RI, lora_B_OR, dropout_key, t_NR, *stored = ctx.saved_tensors
        storage, shape = Storage(ctx.precision, ctx.double_quant), (lora_B_OR.shape[0], lora_A_RI.shape[1])
        grad_NO = grad_y.reshape(-1, shape[0])
        grad_t_NR = (grad_NO @ lora_B_OR.to(x.dtype)) * scaling
        grad_A = grad_B = grad_x = None
        x_NI, drops = x.reshape(-1, shape[1]), _drops(dropout_key, dropout)
        if ctx.needs_input_grad[1] and drops:
            grad_A = dropped_product.dropped_grad_A(grad_t_NR, x_NI, dropout_key.reshape(-1), dropout)
            grad_A = grad_A.to(lora_A_RI.dtype)
        elif ctx.needs_input_grad[1]:
            grad_A = (grad_t_NR.t() @ x_NI).to(lora_A_RI.dtype)
        if ctx.needs_input_grad[2]:
            grad_B = ((grad_NO.t() @ t_NR) * scaling).to(lora_B_OR.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = frozen_product(grad_y, stored, storage, shape, transposed=True)
            if drops:
                added_NI = dropped_product.dropped_up(grad_t_NR, lora_A_RI, dropout_key.reshape(-1), dropout)
                grad_x = grad_x + added_NI.view_as(x)
            else:
                grad_x.view(-1, shape[1]).addmm_(grad_t_NR, lora_A_RI.to(x.dtype))
        return grad_x, grad_A, grad_B, *(None for _ in range(5)), *(None for _ in stored)


def _drops(dropout_key: Tensor, dropout: float) -> bool:
    return bool(dropout) and dropout_key.numel() > 0


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
        if not storage.native:
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
        facts = (storage.precision, storage.double_quant)
        if self.rank:
            adapter = (self.lora_A, self.lora_B, self.dropout_key, self.scaling, self.dropout)
            y = _LoraLinear.apply(x, *adapter, *facts, *stored)
        else:
            y = _FrozenLinear.apply(x, self.out_features, self.in_features, *facts, *stored)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self, stored: dict[str, Tensor], path: str, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, from a layer's stored tensors in which this one's are found under `path`."""
        parts = [stored[f"{path}.{name}"] for name in self.stored_names]
        return self.storage.decode(parts, (self.out_features, self.in_features), dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's, with precision and rank."""
        return f"{self.in_features}, {self.out_features}, {self.storage.precision}, rank={self.rank}"
