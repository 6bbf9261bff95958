"""A decoder layer as a function of its tensors, compiled or not, whole or for its backward alone.

A function takes (tensors by name, hidden states, args, kwargs), so one compilation serves all layers alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drawplate.model.layer.compile_workers import end_with_this_process
from drawplate.model.layer.frozen_linear import FrozenLinear

RECOMPILE_LIMIT = 64
"""Versions of a layer's function before the compiler gives up on it and runs it uncompiled, torch's own limit being 8:
with and without gradients, dequantized whole or not, and a few shapes each of training and of measuring."""
Tensors = dict[str, Tensor]


def _call_of(template: nn.Module) -> Callable[..., Any]:
    def call(tensors: Tensors, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(template, tensors, (hidden, *args), kwargs)

    return call


def functions(templates: Sequence[nn.Module]) -> list[Callable[..., Any]]:
    """One for each layer, as transformers wrote it."""
    return [_call_of(template) for template in templates]


def without_unused(template: nn.Module) -> nn.Module:
    """The layer, with zeros for the outputs that its backward does not need."""
    if all(m.computed_again for m in template.modules() if isinstance(m, FrozenLinear)):
        return template
    less = copy.deepcopy(template)
    for module in less.modules():
        if isinstance(module, FrozenLinear):
            module.output_used = module.computed_again
    return less


def compiled_functions(templates: Sequence[nn.Module]) -> list[Callable[..., Any]]:
    """One compiled function for each kind of layer; layers alike but for their index are one kind."""
    end_with_this_process()
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    by_kind: dict[str, Callable[..., Any]] = {}
    return [
        by_kind.setdefault(kind, torch.compile(_call_of(template), dynamic=False))
        for template in templates
        for kind in [kind_of(template)]
    ]


def kind_of(template: nn.Module) -> str:
    """A string equal for layers that compute the same function of their tensors."""
    parts = []
    for path, module in template.named_modules():
        facts = {
            k: v
            for k, v in vars(module).items()
            if k != "layer_idx" and not k.startswith("_") and isinstance(v, (int, float, str, bool, tuple, type(None)))
        }
        storage = module.storage if isinstance(module, FrozenLinear) else None
        tensors = [(n, tuple(t.shape), t.dtype) for n, t in [*module.named_parameters(), *module.named_buffers()]]
        parts.append(f"{path}:{type(module).__name__}:{sorted(facts.items(), key=str)}:{storage}:{tensors}")
    return "\n".join(parts)
