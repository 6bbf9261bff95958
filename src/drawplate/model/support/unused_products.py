"""Which products of a decoder layer its backward can do without.

A layer whose activations are not kept is computed twice, the second time only so that autograd has what it saves. What
nobody saves need not be made then: the last product of most layers (a Llama's `down_proj`, a quarter of its weights)
only goes into the sum that the layer returns. Where a norm follows it (Gemma 2) its value is needed after all.

Found from the autograd graph of transformers' own layer on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from drawplate.model.layer.frozen_linear import FrozenLinear


def unused_products(layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Paths of the linear layers whose outputs go into no other linear layer and into nothing that saves them.

    Args:
        layer: on the meta device.
        hidden, args, kwargs: what it is called with.
    """
    layer = copy.deepcopy(layer)  # some layers keep a state of what they computed
    made = _marked(layer)
    with torch.enable_grad():
        out = layer(hidden.detach().requires_grad_(), *args, **kwargs)
    last = (out[0] if isinstance(out, tuple) else out).grad_fn
    if last is None:
        return ()
    order = list(_forwards_from(last))
    products = {node for nodes in made.values() for node in nodes}
    unused = []
    for path, nodes in made.items():
        if len(nodes) != 1 or nodes[0] not in order:
            continue
        behind, later = {nodes[0]}, []
        for node in order:
            if any(earlier in behind for earlier, _ in node.next_functions):
                behind.add(node)
                later.append(node)
        if not any(node in products or _saves(node) for node in later):
            unused.append(path)
    return tuple(unused)


def _forwards_from(last: Node) -> Iterator[Node]:
    """The nodes behind `last` and itself, each after those it depends on."""
    seen, waiting = set[Node](), [(last, False)]
    while waiting:
        node, ready = waiting.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(earlier, False) for earlier, _ in node.next_functions if earlier is not None]


def _saves(node: Node) -> bool:
    """Whether it keeps a tensor; numbers that a tensor was multiplied by do not count."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return True
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            kept = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(each, Tensor) and each.dim() for each in kept):
                return True
    return False


def _marked(layer: nn.Module) -> dict[str, list[Node]]:
    """From now on each linear layer is one known node of the graph; these nodes by the layer's path."""
    made: dict[str, list[Node]] = {}
    for path, module in layer.named_modules():
        if isinstance(module, (nn.Linear, FrozenLinear)):
            object.__setattr__(module, "forward", _node(made.setdefault(path, []), module.out_features))
    return made


def _node(nodes: list[Node], width: int) -> Any:
    def forward(x: Tensor) -> Tensor:
        out = x[..., :1].expand(*x.shape[:-1], width).clone()
        assert out.grad_fn is not None
        nodes.append(out.grad_fn)
        return out

    return forward
