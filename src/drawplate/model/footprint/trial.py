"""A decoder layer and what it is called with, all without data: what footprints are measured on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call

from drawplate.layout.footprint import Mode
from drawplate.model.base.precision import Storage
from drawplate.model.footprint.body import arguments_of, device_of
from drawplate.model.footprint.recorder import TRACED_TOKENS
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import WHOLE, FrozenLinear
from drawplate.model.load.fill_layer import freeze_linears, stored_specs, trained_shapes
from drawplate.model.support.targets import target_names
from drawplate.model.support.walk import walked


@dataclass
class Trial:
    """A layer and what it is called with, all without data.

    Attributes:
        layer: the decoder layer with frozen linear layers and our attention.
        stored, trained, keys: its tensors by name.
        unused: its linear layers that are not computed again for its backward.
        hidden: its input, shape (1, TRACED_TOKENS, H).
        arguments: what transformers' body passes along beside it: (args, kwargs).
    """

    layer: nn.Module
    mode: Mode
    stored: dict[str, Tensor]
    trained: dict[str, Tensor]
    keys: dict[str, Tensor]
    unused: tuple[str, ...]
    hidden: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of the layer's, those of a whole dequantized layer standing in for what they were made of."""
        whole = {name: torch.empty_like(tensor) for name, tensor in self.whole().items()}
        return {**self.stored, **whole, **self.trained, **self.keys}

    def whole(self) -> dict[str, Tensor]:
        """The layer's weights dequantized, where that is done before it is called; else none."""
        if not self.mode.whole:
            return {}
        dtype, modules = self.hidden.dtype, self.layer.named_modules()
        linears = {path: m for path, m in modules if isinstance(m, FrozenLinear) and m.storage.quantized}
        return {f"{path}.{WHOLE}": m.dequantized(self.stored, path, dtype) for path, m in linears.items()}

    def run(self, hidden: Tensor) -> Tensor:
        """As the layer's runner calls it."""
        return self.call({**self.stored, **self.whole(), **self.trained, **self.keys}, hidden, self.arguments)

    @classmethod
    def of(cls, layer: nn.Module, anatomy: Anatomy, index: int, lora: LoraConfig, mode: Mode) -> Trial:
        """Everything a call of the frozen layer needs."""
        device = device_of(mode)
        dtype = getattr(torch, mode.compute_dtype)
        hidden = torch.empty(1, TRACED_TOKENS, anatomy.config.hidden_size, dtype=dtype, device=device)
        specs = stored_specs(layer, dtype)
        adapted = [path for path, m in layer.named_modules() if isinstance(m, FrozenLinear) and m.rank]
        shape = (1, TRACED_TOKENS) if mode.dropout else (0,)
        return cls(
            layer=layer,
            mode=mode,
            stored={n: torch.empty(s, dtype=d, device=device) for n, (s, d) in specs.items()},
            trained={n: torch.empty(s, device=device) for n, s in trained_shapes(layer, lora).items()},
            keys={f"{path}.dropout_key": torch.empty(shape, dtype=torch.int32, device=device) for path in adapted},
            unused=unused_of(anatomy, index),
            hidden=hidden,
            arguments=arguments_of(anatomy, index, hidden, mode),
        )

    def call(self, tensors: dict[str, Tensor], hidden: Tensor, arguments: Any) -> Tensor:
        """The layer's output."""
        args, kwargs = arguments
        out = functional_call(self.layer, tensors, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out


def frozen_layer(anatomy: Anatomy, index: int, lora: LoraConfig, storage: Storage) -> nn.Module:
    """A copy of a decoder layer as it would be run, without data."""
    with unset_fake_temporarily():  # what an architecture keeps beside its parameters is not copied in that mode
        layer = copy.deepcopy(anatomy.layers[index])
    for module in layer.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation = attention.NAME
    freeze_linears(layer, f"{anatomy.layers_path}.{index}", storage, lora, target_names(lora, anatomy))
    return layer.eval()


def unused_of(anatomy: Anatomy, index: int) -> tuple[str, ...]:
    """The linear layers of a decoder layer that are not computed again for its backward."""
    unused = walked(anatomy).unused
    return unused[index] if unused else ()
