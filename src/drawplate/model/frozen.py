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

from collections.abc import Sequence
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
    """y = x W^T; backward to x only. Constants as in _LoraLinears."""

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


class _LoraLinears(torch.autograd.Function):
    """y_g = x W_g^T + scaling * drop_g(x) A_g^T B_g^T for the modules g of a group, the masks recomputed in backward.

    Given: x; the constants scaling, dropout, precision, double_quant and the number of modules; every module's A, every
    B, every dropout key (all empty without dropout), every module's stored tensors. One kernel then makes all modules'
    products with the dropped x, which is most of what an adapter costs. Saves x, the rank-R intermediates and what was
    given. Adapter gradients are computed in x's dtype and returned in the adapter's. The storage comes as two
    constants: torch 2.11's compiler mixes a dataclass up with tensors.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        x, scaling, dropout, precision, double_quant, count, *tensors = given
        parts = _Parts.of(tensors, count)
        storage, x_NI = Storage(precision, double_quant), x.reshape(-1, x.shape[-1])
        if parts.drop(dropout):
            t_GNR = dropped_product.dropped_down(x_NI, parts.keys_N, parts.lora_As, dropout)
        else:
            t_GNR = torch.stack([x_NI @ lora_A_RI.to(x.dtype).t() for lora_A_RI in parts.lora_As])
        outputs = []
        for t_NR, lora_A_RI, lora_B_OR, stored in zip(t_GNR, parts.lora_As, parts.lora_Bs, parts.stored, strict=True):
            shape = (lora_B_OR.shape[0], lora_A_RI.shape[1])
            y = frozen_product(x, stored, storage, shape, transposed=False)
            if torch.compiler.is_compiling():  # in place would be a copy there; a sum joins whatever follows it
                y = y + ((t_NR @ lora_B_OR.to(x.dtype).t()) * scaling).view_as(y)
            else:
                y.view(-1, shape[0]).addmm_(t_NR, lora_B_OR.to(x.dtype).t(), alpha=scaling)
            outputs.append(y)
        ctx.constants = scaling, dropout, storage.precision, storage.double_quant, count
        ctx.save_for_backward(x, t_GNR, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scaling, dropout, precision, double_quant, count = ctx.constants
        x, t_GNR, *tensors = ctx.saved_tensors
        parts = _Parts.of(tensors, count)
        storage, x_NI, drops = Storage(precision, double_quant), x.reshape(-1, x.shape[-1]), parts.drop(dropout)
        grads_NO = [grad_y.reshape(-1, grad_y.shape[-1]) for grad_y in grads]
        grad_ts = [(g_NO @ B_OR.to(x.dtype)) * scaling for g_NO, B_OR in zip(grads_NO, parts.lora_Bs, strict=True)]
        needs = ctx.needs_input_grad
        grad_As = grad_Bs = [None] * count
        if any(needs[GIVEN_FIRST : GIVEN_FIRST + count]):
            if drops:
                made = dropped_product.dropped_grad_A(grad_ts, x_NI, parts.keys_N, dropout)
            else:
                made = [grad_t_NR.t() @ x_NI for grad_t_NR in grad_ts]
            grad_As = [grad.to(A.dtype) for grad, A in zip(made, parts.lora_As, strict=True)]
        if any(needs[GIVEN_FIRST + count : GIVEN_FIRST + 2 * count]):
            pairs = zip(grads_NO, t_GNR, parts.lora_Bs, strict=True)
            grad_Bs = [((grad_NO.t() @ t_NR) * scaling).to(B.dtype) for grad_NO, t_NR, B in pairs]
        grad_x = parts.grad_x(grads, grad_ts, storage, dropout) if needs[0] else None
        return grad_x, *[None] * (GIVEN_FIRST - 1), *grad_As, *grad_Bs, *[None] * (len(tensors) - 2 * count)


GIVEN_FIRST = 6
"""The place of the first tensor of a module among what `_LoraLinears` is given."""


@dataclass(frozen=True)
class _Parts:
    """The tensors of the modules of a group."""

    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    keys_N: list[Tensor]
    stored: list[list[Tensor]]

    @classmethod
    def of(cls, tensors: list[Tensor], count: int) -> _Parts:
        stored = tensors[3 * count :]
        each = len(stored) // count
        return cls(
            tensors[:count],
            tensors[count : 2 * count],
            [key.reshape(-1) for key in tensors[2 * count : 3 * count]],
            [stored[g * each : (g + 1) * each] for g in range(count)],
        )

    def drop(self, dropout: float) -> bool:
        """Whether there is a mask."""
        return _drops(self.keys_N[0], dropout)

    def grad_x(self, grads: Sequence[Tensor], grad_ts: list[Tensor], storage: Storage, dropout: float) -> Tensor:
        """The gradient of x: through the weights, and through the adapters."""
        grad_x = None
        for grad_y, lora_A_RI, lora_B_OR, stored in zip(grads, self.lora_As, self.lora_Bs, self.stored, strict=True):
            shape = (lora_B_OR.shape[0], lora_A_RI.shape[1])
            part = frozen_product(grad_y, stored, storage, shape, transposed=True)
            grad_x = part if grad_x is None else grad_x + part
        assert grad_x is not None
        if self.drop(dropout):
            return grad_x + dropped_product.dropped_up(grad_ts, self.lora_As, self.keys_N, dropout).view_as(grad_x)
        for grad_t_NR, lora_A_RI in zip(grad_ts, self.lora_As, strict=True):
            grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_t_NR, lora_A_RI.to(grad_x.dtype))
        return grad_x


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
        self.group: Group | None = None
        self.place_in_group = 0
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
        if self.group is not None:
            y = self.group.output(self.place_in_group, x)
        elif self.rank:
            (y,) = lora_outputs(x, [self])
        else:
            storage, stored = self._given()
            facts = (self.out_features, self.in_features, storage.precision, storage.double_quant)
            y = _FrozenLinear.apply(x, *facts, *stored)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _given(self) -> tuple[Storage, list[Tensor]]:
        """The weight as it was handed over: as stored, or dequantized."""
        whole = getattr(self, WHOLE, None)
        if whole is not None and whole.numel():
            return DENSE, [whole]
        return self.storage, [getattr(self, name) for name in self.stored_names]

    def dequantized(self, stored: dict[str, Tensor], path: str, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, from a layer's stored tensors in which this one's are found under `path`."""
        parts = [stored[f"{path}.{name}"] for name in self.stored_names]
        return self.storage.decode(parts, (self.out_features, self.in_features), dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's, with precision and rank."""
        return f"{self.in_features}, {self.out_features}, {self.storage.precision}, rank={self.rank}"


def lora_outputs(x: Tensor, modules: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """What each of these modules gives for x, biases left out; all have an adapter of the same rank and dropout."""
    given = [module._given() for module in modules]
    storage, first = given[0][0], modules[0]
    adapters = [getattr(m, name) for name in ("lora_A", "lora_B", "dropout_key") for m in modules]
    stored = [tensor for _, tensors in given for tensor in tensors]
    facts = (first.scaling, first.dropout, storage.precision, storage.double_quant, len(modules))
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, *facts, *adapters, *stored)
    return outputs


class Group:
    """Modules with adapters that are called with the same x, one after another, and computed at the first call.

    The others' outputs wait here for their calls. Whoever is called with another x is computed anew.
    """

    def __init__(self, modules: Sequence[FrozenLinear]) -> None:
        self.modules = tuple(modules)
        self._x: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        for place, module in enumerate(self.modules):
            module.group, module.place_in_group = self, place

    def output(self, place: int, x: Tensor) -> Tensor:
        """What the module at that place gives for x."""
        if self._x is not x or self._outputs[place] is None:
            self._x, self._outputs = x, list(lora_outputs(x, self.modules))
        y = self._outputs[place]
        assert y is not None
        self._outputs[place] = None
        if not any(waiting is not None for waiting in self._outputs):
            self._x, self._outputs = None, []
        return y

    def dissolve(self) -> None:
        """Let every module be computed by itself."""
        for module in self.modules:
            module.group = None
