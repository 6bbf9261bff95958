"""A decoder layer and what it is called with: what footprints are measured on, with data of zeros or without any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from drawplate.layout.footprint import Mode
from drawplate.model.base.precision import Storage
from drawplate.model.footprint.body import arguments_of
from drawplate.model.footprint.recorder import TRACED_TOKENS
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import WHOLE, FrozenLinear
from drawplate.model.layer.functions import without_unused
from drawplate.model.load.fill_layer import freeze_linears, stored_specs, trained_shapes
from drawplate.model.support.targets import target_names
from drawplate.model.support.walk import walked


@dataclass
class Trial:
    """A layer and what it is called with.

    Attributes:
        layer: the decoder layer with frozen linear layers and our attention, as the mode's use needs it.
        tensors: its stored tensors and dropout keys by name, on the device that it is tried on.
        trained: the adapter's, by name.
        keys: the names of the dropout keys.
        hidden: its input, shape (1, TRACED_TOKENS, H).
        arguments: what transformers' body passes along beside it: (args, kwargs).
    """

    layer: nn.Module
    mode: Mode
    tensors: dict[str, Tensor]
    trained: dict[str, Tensor]
    keys: tuple[str, ...]
    hidden: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @classmethod
    def of(
        cls, layer: nn.Module, anatomy: Anatomy, index: int, lora: LoraConfig, mode: Mode, device: torch.device
    ) -> Trial:
        """Everything that a call of the frozen layer needs, on a device (`meta` for no data at all)."""
        dtype = getattr(torch, mode.compute_dtype)
        hidden = torch.zeros(1, TRACED_TOKENS, anatomy.config.hidden_size, dtype=dtype, device=device)
        linears = {path: m for path, m in layer.named_modules() if isinstance(m, FrozenLinear)}
        keys = tuple(f"{path}.dropout_key" for path, linear in linears.items() if linear.rank)
        shape = (1, TRACED_TOKENS) if mode.dropout else (0,)
        stored = {n: torch.zeros(s, dtype=d, device=device) for n, (s, d) in stored_specs(layer, dtype).items()}
        nothing = {
            f"{path}.{WHOLE}": torch.empty(0, device=device) for path, m in linears.items() if not m.storage.native
        }
        return cls(
            layer=layer,
            mode=mode,
            tensors={**stored, **nothing, **{n: torch.zeros(shape, dtype=torch.int32, device=device) for n in keys}},
            trained={n: torch.zeros(s, device=device) for n, s in trained_shapes(layer, lora).items()},
            keys=keys,
            hidden=hidden,
            arguments=arguments_of(anatomy, index, hidden, mode),
        )

    @property
    def dropout_keys(self) -> int:
        """Of the layer, one for each adapted linear layer; none without dropout."""
        return len(self.keys) if self.mode.dropout else 0

    @property
    def given(self) -> list[Tensor]:
        """All that a call is given, but for the hidden states."""
        others = [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        return [*self.tensors.values(), *self.trained.values(), *others]

    def call(self, function: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The layer's output, its function called as model/layer/runner.py does."""
        out = function({**self.tensors, **self._whole(), **self.trained}, hidden, *self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def _whole(self) -> dict[str, Tensor]:
        """The layer's weights dequantized, where that is done before it is called; else none."""
        if not self.mode.whole:
            return {}
        dtype, modules = self.hidden.dtype, self.layer.named_modules()
        linears = {path: m for path, m in modules if isinstance(m, FrozenLinear) and not m.storage.native}
        return {f"{path}.{WHOLE}": m.dequantized(self.tensors, path, dtype) for path, m in linears.items()}


def frozen_layer(anatomy: Anatomy, index: int, lora: LoraConfig, storage: Storage, *, again: bool = False) -> nn.Module:
    """A copy of a decoder layer as it would be run, on the meta device; `again` for its backward alone."""
    with unset_fake_temporarily():  # what an architecture keeps beside its parameters is not copied in that mode
        layer = copy.deepcopy(anatomy.layers[index])
    for module in layer.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation = attention.NAME
    freeze_linears(layer, f"{anatomy.layers_path}.{index}", storage, lora, target_names(lora, anatomy))
    unused = unused_of(anatomy, index)
    for path, module in layer.named_modules():
        if isinstance(module, FrozenLinear):
            module.computed_again = path not in unused
    return without_unused(layer.eval()) if again else layer.eval()


def unused_of(anatomy: Anatomy, index: int) -> tuple[str, ...]:
    """The linear layers of a decoder layer that are not computed again for its backward."""
    unused = walked(anatomy).unused
    return unused[index] if unused else ()
