"""FrozenLinear: a linear layer whose weight is stored in any precision and never trained, with LoRA beside it.

The weight lives in whatever bytes the layer is handed at the call (`torch.func.functional_call`), so this file knows
nothing of devices, slots or streams. Forward needs x and the stored bytes; backward gives gradients to x and to the
adapter, never to the weight. The stored tensors go through `save_for_backward` like any other, so that whoever
recycles their memory can intercept them (bitsandbytes#2034 is what happens otherwise), and a dequantized weight lives
only inside one matrix product (model/layer/frozen_product.py), unless the caller hands over the whole layer dequantized
(`whole`): then the compiler sees plain products, launched faster, at the price of one dequantized layer.

Shapes: B batch, T tokens, N = B x T, I in_features, O out_features, R rank, G modules of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.kernels import dropped_product
from drawplate.model.base.precision import Storage
from drawplate.model.layer.frozen_product import adapted_products, frozen_product

WHOLE = "whole"
DENSE = Storage("bf16")
"""A weight that is given in x's dtype already."""

# The two functions below take what they take as `*given`: without gradients, torch's compiler leaves the context out
# where forward has as many parameters as it is given arguments, as it would with two stored tensors at the end (int8).


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T; backward to x only. Constants as in _LoraLinears."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, output_used, out_features, in_features, precision, double_quant, *stored = given
        ctx.shape, ctx.precision, ctx.double_quant = (out_features, in_features), precision, double_quant
        ctx.save_for_backward(*stored)
        if not output_used:
            return x.new_zeros((*x.shape[:-1], out_features))
        return frozen_product(x, stored, Storage(precision, double_quant), ctx.shape, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        storage, stored = Storage(ctx.precision, ctx.double_quant), list(ctx.saved_tensors)
        grad_x = frozen_product(grad_y, stored, storage, ctx.shape, transposed=True)
        return grad_x, None, None, None, None, None, *(None for _ in stored)


class _LoraLinears(torch.autograd.Function):
    """y_g = x W_g^T + scaling * drop_g(x) A_g^T B_g^T for the modules g of a group, the masks recomputed in backward.

    Given: x; whether the outputs are used (else they are zeros, and only backward is right); the constants scaling,
    dropout, precision, double_quant and the number of modules; every module's A, every B, every dropout key (all empty
    without dropout), every module's stored tensors. One kernel then makes all modules' products with the dropped x,
    which is most of what an adapter costs. Saves x, the rank-R intermediates and what was given. Adapter gradients are
    computed in x's dtype and returned in the adapter's. The storage comes as two constants: torch 2.11's compiler mixes
    a dataclass up with tensors.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        x, output_used, scaling, dropout, precision, double_quant, count, *tensors = given
        parts = _Parts.of(tensors, count)
        storage, x_NI = Storage(precision, double_quant), x.reshape(-1, x.shape[-1])
        if parts.drop(dropout):
            t_GNR = dropped_product.dropped_down(x_NI, parts.keys_N, parts.lora_As, dropout)
        else:
            t_GNR = torch.stack([x_NI @ lora_A_RI.to(x.dtype).t() for lora_A_RI in parts.lora_As])
        if output_used:
            lora_Bs = [(lora_B_OR * scaling).to(x.dtype) for lora_B_OR in parts.lora_Bs]
            outputs = adapted_products(x, parts.stored, storage, t_GNR, lora_Bs)
        else:
            outputs = [x.new_zeros((*x.shape[:-1], len(lora_B_OR))) for lora_B_OR in parts.lora_Bs]
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


GIVEN_FIRST = 7
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

    Attributes:
        changed_in_place: its caller changes what it is given (OLMo clips), and is given a copy.
        computed_again: False where a layer's backward does not need this output (model/support/unused_products.py).
        output_used: False in a copy that is run for its backward alone: the output is zeros then, no product is made.
    """

    def __init__(
        self, linear: nn.Linear, storage: Storage, *, rank: int = 0, scaling: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage, self.rank, self.scaling, self.dropout = storage, rank, scaling, dropout
        self.group: Group | None = None
        self.place_in_group = 0
        self.computed_again = self.output_used = True
        self.changed_in_place = False
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
            facts = (self.output_used, self.out_features, self.in_features, storage.precision, storage.double_quant)
            y = _FrozenLinear.apply(x, *facts, *stored)
        if self.bias is not None:
            return y + self.bias.to(y.dtype)
        return y.clone() if self.changed_in_place else y

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
    output_used = any(module.output_used for module in modules)
    facts = (output_used, first.scaling, first.dropout, storage.precision, storage.double_quant, len(modules))
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
