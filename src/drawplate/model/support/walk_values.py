"""Values for a body that looks at them while it is walked without data (model/support/walk.py).

Everything that is on the meta device becomes zeros on the CPU for a while. Linear layers and embeddings, which are
nearly all of a model, get no tensors: they give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.model.layer.frozen_linear import FrozenLinear

LARGE = (nn.Linear, nn.Embedding, FrozenLinear)


@contextmanager
def with_values(body: nn.Module) -> Iterator[None]:
    """Zeros on the CPU for the body's tensors, as long as the context is open. FrozenLinears are left as they are."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    standing_in: list[nn.Module] = []
    for module in body.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            object.__setattr__(module, "forward", _zeros_of(module))
            standing_in.append(module)
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in () if isinstance(module, LARGE) else own:
            kept += [(held, name, tensor) for name, tensor in held.items() if tensor is not None and tensor.is_meta]
    try:
        for held, name, tensor in kept:
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            held[name] = nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros
        yield
    finally:
        for held, name, tensor in kept:
            held[name] = tensor
        for module in standing_in:
            object.__delattr__(module, "forward")


def _zeros_of(module: nn.Linear | nn.Embedding) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.Embedding):
        return lambda ids: torch.zeros(*ids.shape, module.embedding_dim, device=ids.device)
    return lambda x: x.new_zeros((*x.shape[:-1], module.out_features))
