"""One matrix product with a stored weight, forward and transposed: what `FrozenLinear` is made of.

A weight that is not stored in x's dtype is dequantized inside the product and lives no longer than it; a compiler sees
one opaque operation, because it would keep the dequantized weight from forward to backward.

fp8 alone is multiplied as it is stored (`native`): the products' other operand is rounded to e4m3 with a scale a row as
it comes, in forward and in backward. The hardware wants both operands with the summed dimension last, so backward needs
the transpose: made as it is needed (`fp8`), or stored beside the weight (`fp8_both`). The rows' scales, which backward
cannot take out of its sum, go into the incoming gradient before it is rounded. Where there are no fp8 units (a CPU) the
same rounded numbers are multiplied in float32: slow, and what tests compare with.

An adapter's output lies in the result before the frozen product is summed onto it (`adapted_products`), so that the two
are rounded as one sum. Added to a product that is already rounded to bf16, most of a small output would be lost
(bench/small_updates.py); fp8's products take no third operand, so there it still is.

Shapes: N rows, K summed, M columns; O out_features, I in_features; R rank, G modules of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from drawplate.kernels.fp8_rows import fp8_rows
from drawplate.kernels.transposed import transposed as transpose_of
from drawplate.model.base.precision import FP8_KINDS, Storage


def _rounding_product(x: Tensor, stored: list[Tensor], transposed: bool) -> Tensor:
    rows_NK = x.reshape(-1, x.shape[-1])
    rounded_NK, scale_N1 = fp8_rows(rows_NK.float() * stored[1] if transposed else rows_NK)
    return fp8_product(rounded_NK, scale_N1, stored, transposed).to(x.dtype).view(*x.shape[:-1], -1)


def fp8_product(rounded_NK: Tensor, scale_N1: Tensor, stored: list[Tensor], transposed: bool) -> Tensor:
    """The product of rounded rows with a weight in fp8, in bf16 (float32 on a CPU).

    With `transposed` the weight's row scales must be in the rows already, before they were rounded.
    """
    weight_OI, scale_O, *weight_IO = stored
    if not transposed:
        return _rounded_product(rounded_NK, scale_N1, weight_OI, scale_O)
    if weight_IO:
        return _rounded_product(rounded_NK, scale_N1, weight_IO[0], None)
    if torch.compiler.is_compiling():
        made: Tensor = _frozen_product_fp8(rounded_NK, scale_N1, weight_OI)
        return made
    return _rounded_product(rounded_NK, scale_N1, transpose_of(weight_OI), None)


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
        return _rounding_product(x, stored, transposed)
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


def _adapted_products(
    x: Tensor, stored: list[list[Tensor]], storage: Storage, t_GNR: Tensor, lora_Bs: list[Tensor]
) -> list[Tensor]:
    x_NI, outputs = x.reshape(-1, x.shape[-1]), []
    for t_NR, lora_B_OR, parts in zip(t_GNR, lora_Bs, stored, strict=True):
        shape = (lora_B_OR.shape[0], x.shape[-1])
        if storage.precision in FP8_KINDS:
            y_NO = _product(x_NI, parts, storage, shape, transposed=False).addmm_(t_NR, lora_B_OR.t())
        else:
            y_NO = (t_NR @ lora_B_OR.t()).addmm_(x_NI, storage.decode(parts, shape, x.dtype).t())
        outputs.append(y_NO.view(*x.shape[:-1], -1))
    return outputs


@torch.library.custom_op("drawplate::adapted_products", mutates_args=())
def _opaque_adapted_products(
    x: Tensor, stored: list[Tensor], precision: str, double_quant: bool, t_GNR: Tensor, lora_Bs: list[Tensor]
) -> list[Tensor]:
    """Opaque to the compiler, which would copy the adapter's output before it sums onto it."""
    each = len(stored) // len(lora_Bs)
    parts = [stored[g * each : (g + 1) * each] for g in range(len(lora_Bs))]
    return _adapted_products(x, parts, Storage(precision, double_quant), t_GNR, lora_Bs)


@_opaque_adapted_products.register_fake
def _(x, stored, precision, double_quant, t_GNR, lora_Bs):  # type: ignore[no-untyped-def]
    return [x.new_empty((*x.shape[:-1], lora_B_OR.shape[0])) for lora_B_OR in lora_Bs]


def adapted_products(
    x: Tensor, stored: list[list[Tensor]], storage: Storage, t_GNR: Tensor, lora_Bs: list[Tensor]
) -> list[Tensor]:
    """x_..I @ W_g^T + t_g B_g^T -> ..O for each module g; B in x's dtype, the adapter's scaling in it."""
    if not torch.compiler.is_compiling():
        return _adapted_products(x, stored, storage, t_GNR, lora_Bs)
    if storage.precision in FP8_KINDS:  # a sum joins whatever follows it
        shapes = [(lora_B_OR.shape[0], x.shape[-1]) for lora_B_OR in lora_Bs]
        products = [_product(x, parts, storage, shape, False) for parts, shape in zip(stored, shapes, strict=True)]
        added = [t_NR @ lora_B_OR.t() for t_NR, lora_B_OR in zip(t_GNR, lora_Bs, strict=True)]
        return [y + added_NO.view_as(y) for y, added_NO in zip(products, added, strict=True)]
    flat = [part for parts in stored for part in parts]
    made: list[Tensor] = _opaque_adapted_products(x, flat, storage.precision, storage.double_quant, t_GNR, lora_Bs)
    return made


def frozen_product(
    x: Tensor, stored: list[Tensor], storage: Storage, shape: tuple[int, int], transposed: bool
) -> Tensor:
    """x_..I @ W^T -> ..O, or with `transposed` dy_..O @ W -> ..I."""
    if not storage.native and torch.compiler.is_compiling():
        return _frozen_product(x, stored, storage.precision, storage.double_quant, list(shape), transposed)
    return _product(x, stored, storage, shape, transposed)
