"""A decoder layer's gated feed-forward block in fp8: down(silu(gate(x)) * up(x)) as one function with its own backward.

Between the three products stand two kernels (kernels/gated_fp8.py) instead of what the compiler would make. Only for
the block that most architectures have, written as they write it, without biases and without adapters in it; every
other block is left as it is, and computes the same.

Shapes: N tokens, H hidden, I intermediate.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.kernels.gated_fp8 import fp8_rows, gated_backward_fp8, gated_fp8
from drawplate.model.frozen import FrozenLinear
from drawplate.model.frozen_product import fp8_product
from drawplate.model.storage import FP8_KINDS

SILUS = ("SiLU", "SiLUActivation")
"""torch's and transformers' own."""
PRODUCTS = ("gate_proj", "up_proj", "down_proj")
_RESULT = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_BODIES = ([f"return {_RESULT}"], [f"down_proj = {_RESULT}", "return down_proj"])


class _GatedBlock(torch.autograd.Function):
    """Given: x, whether the output is used, and the stored tensors of gate, up and down, as many of each. Saves gate's
    and up's outputs."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, output_used, *tensors = given
        gate, up, down = _thirds(tensors)
        rounded_NH, scale_N1 = fp8_rows(x.reshape(-1, x.shape[-1]))
        gate_NI = fp8_product(rounded_NH, scale_N1, gate, transposed=False).to(x.dtype)
        up_NI = fp8_product(rounded_NH, scale_N1, up, transposed=False).to(x.dtype)
        ctx.save_for_backward(gate_NI, up_NI, *tensors)
        if not output_used:
            return torch.zeros_like(x)
        rounded_NI, scale_N1 = gated_fp8(gate_NI, up_NI)
        y_NH = fp8_product(rounded_NI, scale_N1, down, transposed=False)
        return y_NH.to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        gate_NI, up_NI, *tensors = ctx.saved_tensors
        gate, up, down = _thirds(tensors)
        rounded_NH, scale_N1 = fp8_rows(grad_y.reshape(-1, grad_y.shape[-1]).float() * down[1])
        grad_NI = fp8_product(rounded_NH, scale_N1, down, transposed=True).to(grad_y.dtype)
        gate8_NI, gate_scale_N1, up8_NI, up_scale_N1 = gated_backward_fp8(grad_NI, gate_NI, up_NI, gate[1], up[1])
        grad_x_NH = fp8_product(gate8_NI, gate_scale_N1, gate, transposed=True).to(grad_y.dtype)
        grad_x_NH = grad_x_NH + fp8_product(up8_NI, up_scale_N1, up, transposed=True).to(grad_y.dtype)
        return grad_x_NH.view_as(grad_y), None, *(None for _ in tensors)


def _thirds(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    each = len(tensors) // 3
    return tensors[:each], tensors[each : 2 * each], tensors[2 * each :]


class GatedBlock(nn.Module):
    """Stands where a layer had its feed-forward block, with the same three linear layers under the same names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in PRODUCTS:
            setattr(self, name, getattr(block, name))

    def forward(self, x: Tensor) -> Tensor:
        """x_..H -> y_..H."""
        linears = [getattr(self, name) for name in PRODUCTS]
        stored = [getattr(linear, name) for linear in linears for name in linear.stored_names]
        y: Tensor = _GatedBlock.apply(x, linears[-1].output_used, *stored)
        return y


def join_gated_blocks(layer: nn.Module) -> None:
    """Put a GatedBlock in the place of every block that is one, once its linear layers are FrozenLinear."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if _is_gated(child):
                setattr(parent, name, GatedBlock(child))


def _is_gated(block: nn.Module) -> bool:
    linears = [getattr(block, name, None) for name in PRODUCTS]
    frozen = [m for m in linears if isinstance(m, FrozenLinear)]
    return (
        len(frozen) == len(PRODUCTS)
        and all(m.storage.precision in FP8_KINDS and not m.rank and m.bias is None for m in frozen)
        and type(getattr(block, "act_fn", None)).__name__ in SILUS
        and _body_of(type(block)) in _BODIES
    )


def _body_of(kind: type[nn.Module]) -> list[str]:
    """The lines of its forward; none where there is no source."""
    try:
        lines = inspect.getsource(kind.forward).splitlines()
    except (OSError, TypeError):
        return []
    return [line.strip() for line in lines[1:] if line.strip()]
