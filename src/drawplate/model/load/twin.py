"""transformers' own model with the stored weights, in float32 and differentiable, without holding it twice.

The reference of the self-check. Module, attention, loss and autograd are transformers' and torch's; LoRA is two plain
products after each adapted layer. The weights are lent: a decoder layer is dequantized when it is called, and autograd
keeps of its weights only their names, from which backward dequantizes the layer again. So what it takes is one
layer, the activations of a short text and its logits, whatever the model's size.

Left out: dropout.

Shapes: B rows, T positions, V vocabulary, N = B x T, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from drawplate.model.causal_lm import CausalLM
from drawplate.model.ends.embedding import embedded
from drawplate.model.ends.head import Head
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.layer.frozen_linear import FrozenLinear

HEAD_ROWS = 8192
"""Of the head's weight that are float32 at a time."""


class Twin:
    """transformers' own module for a model that is loaded.

    Args:
        model: gives the stored weights and the adapter's values, as they are at each call.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._fresh = fresh = build_anatomy(model.anatomy.config, attention="eager")
        self._layers = list(fresh.layers)
        self._leaves: list[dict[str, Tensor]] = []
        self._lent: tuple[int, dict[str, Tensor]] = (-1, {})
        held = fresh.skeleton.get_submodule(fresh.layers_path)
        for i, layer in enumerate(self._layers):
            held[i] = _LentLayer(self, i, layer)  # type: ignore[operator]
        self._fill_outside()
        fresh.skeleton.eval()

    def gradients(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[float, list[Tensor]]:
        """(sum of nats, its gradient by each trained tensor in the order of `Adapter.parameters`), in float32."""
        device = self._model.placement.device
        adapter = self._model.adapter.layers
        self._leaves = [
            {name: p.detach().to(device).float().requires_grad_() for name, p in layer.items()} for layer in adapter
        ]
        try:
            with torch.enable_grad(), self._adapted():
                logits_BTV = self._fresh.skeleton(input_ids=ids_BT.to(device), use_cache=False).logits.float()
                targets_N = targets_BT.to(device).flatten()
                nats = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="sum")
                del logits_BTV
                leaves = [leaf for layer in self._leaves for leaf in layer.values()]
                made = torch.autograd.grad(nats, leaves, allow_unused=True)
            zeros = zip(made, leaves, strict=True)
            return float(nats.detach()), [
                torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in zeros
            ]
        finally:
            self._leaves, self._lent = [], (-1, {})

    def leaves_of(self, layer: int) -> dict[str, Tensor]:
        """The trained tensors of a layer."""
        return self._leaves[layer]

    def lend(self, layer: int) -> dict[str, Tensor]:
        """Every frozen tensor of a layer by its name in transformers' module, in float32; the last one lent is kept."""
        if self._lent[0] != layer:
            self._lent = (-1, {})  # before the next is made
            self._lent = (layer, self._dequantized(layer))
        return self._lent[1]

    @torch.no_grad()
    def _dequantized(self, layer: int) -> dict[str, Tensor]:
        model = self._model
        device, dtype = model.placement.device, model.placement.compute_dtype
        stored = {name: tensor.to(device) for name, tensor in model.residency.stored(layer).items()}
        for path, module in model.runner.templates[layer].named_modules():
            if not isinstance(module, FrozenLinear):
                continue
            parts = [stored.pop(f"{path}.{name}") for name in module.stored_names]
            weight_OI = module.storage.decode(parts, (module.out_features, module.in_features), dtype)
            turned = isinstance(self._layers[layer].get_submodule(path), Conv1D)
            stored[f"{path}.weight"] = (weight_OI.t() if turned else weight_OI).float()
        return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}

    def copies(self, layer: int) -> dict[int, str]:
        """Where the tensors begin that were made to be lent, with their names; others are the model's own."""
        own = {stored.untyped_storage().data_ptr() for stored in self._model.residency.stored(layer).values()}
        places = {tensor.untyped_storage().data_ptr(): name for name, tensor in self.lend(layer).items()}
        return {place: name for place, name in places.items() if place not in own}

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """LoRA beside every adapted layer, as long as the context is open."""
        config, hooks = self._model.adapter.config, []
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        for leaves, layer in zip(self._leaves, self._layers, strict=True):
            for path in [name.removesuffix(".lora_A") for name in leaves if name.endswith(".lora_A")]:
                hook = _beside(leaves[f"{path}.lora_A"], leaves[f"{path}.lora_B"], scaling)
                hooks.append(layer.get_submodule(path).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _fill_outside(self) -> None:
        """Embeddings and head are ours, asked for rows; the few other tensors are copied in float32."""
        own, fresh, device = self._model.anatomy, self._fresh, self._model.placement.device
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        for path, module in fresh.skeleton.named_modules():
            if id(module) in inside or isinstance(module, _LentLayer):
                continue
            ours = own.skeleton.get_submodule(path)
            if path == fresh.head_path:
                _stand_in(module, _HeadOf(self._model.head))
            elif isinstance(module, nn.Embedding):
                _stand_in(module, _RowsOf(cast(nn.Embedding, ours), self._model))
            else:
                for name, parameter in ours.named_parameters(recurse=False):
                    value = parameter.detach().to(device).float()
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
                for name, buffer in ours.named_buffers(recurse=False):
                    module._buffers[name] = buffer.detach().to(device)


class _LentLayer(nn.Module):
    """Stands where a decoder layer of transformers' stood, and calls it with lent tensors."""

    def __init__(self, twin: Twin, index: int, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_twin", twin)
        object.__setattr__(self, "_layer", layer)
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        twin, index = self._twin, self.index
        lent, names = twin.lend(index), twin.copies(index)
        trained = {name: leaf for name, leaf in twin.leaves_of(index).items() if name in lent}  # biases

        def pack(tensor: Tensor) -> Any:
            name = names.get(tensor.untyped_storage().data_ptr())
            return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, size, stride, offset = packed
            return twin.lend(index)[name].as_strided(size, stride, offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return functional_call(self._layer, {**lent, **trained}, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _beside(lora_A_RI: Tensor, lora_B_OR: Tensor, scaling: float) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + scaling * F.linear(F.linear(given[0], lora_A_RI), lora_B_OR)

    return hook


class _HeadOf:
    """The head's logits before scale and soft-cap, its rows in float32 a few at a time."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = _HeadProduct.apply(hidden, self._head)
        return logits if self._head.bias is None else logits + self._head.bias.float()


class _HeadProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> Tensor:
        ctx.head = head
        return torch.cat([hidden @ rows.t() for _, rows in _float_rows(head)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = [grad[..., first : first + len(rows)] @ rows for first, rows in _float_rows(ctx.head)]
        return torch.stack(parts).sum(0), None


def _float_rows(head: Head) -> Iterator[tuple[int, Tensor]]:
    for first, weight_VH in head.weights.chunks():
        for start in range(0, len(weight_VH), HEAD_ROWS):
            yield first + start, weight_VH[start : start + HEAD_ROWS].float()


class _RowsOf:
    """What one of our embeddings gives, wherever its table is."""

    def __init__(self, embedding: nn.Embedding, model: CausalLM) -> None:
        self._embedding, self._dtype = embedding, model.placement.compute_dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return embedded(self._embedding, ids).to(self._dtype).float()


def _stand_in(module: nn.Module, forward: Any) -> None:
    """Let something else answer for a module; its own tensors stay without data."""
    object.__setattr__(module, "forward", forward)
