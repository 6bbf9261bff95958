"""Buffers of transformers' modules: those that a checkpoint holds, and tables that its code computes (rotary ones)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drawplate.errors import UsageError
from drawplate.model.base.foreign import refusing
from drawplate.model.base.rotary import LONG, long_table

UNWRITTEN = -77
"""What a table holds before it is computed; no table holds it everywhere."""


def kept_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that a checkpoint holds; the others are tables that its code computes."""
    return [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]


def computed_tables(skeleton: nn.Module, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The buffers that no checkpoint holds, such as rotary frequencies, computed by transformers' own initialiser.

    Raises:
        UsageError: it leaves one unwritten, so that the model would compute with whatever lay in memory.
    """
    own = dict(module.named_buffers(recurse=False))
    tables = {
        name: torch.full(own[name].shape, UNWRITTEN, dtype=own[name].dtype, device=device)
        for name in own
        if name in module._non_persistent_buffers_set
    }
    if not tables:
        return {}
    module._buffers.update(tables)
    try:
        if LONG in tables:
            tables[LONG].copy_(long_table(module))
        with refusing(type(skeleton).__name__):
            skeleton._init_weights(module)  # type: ignore[operator]
        made = {name: module.get_buffer(name) for name in tables}
    finally:
        module._buffers.update(own)
    unwritten = [name for name, table in made.items() if bool((table == UNWRITTEN).all())]
    if unwritten:
        raise UsageError(
            f"{type(skeleton).__name__} keeps {unwritten[0]} of {type(module).__name__} in no file, and transformers "
            "computes it only while it builds the whole model.",
            safe="Nothing was trained or written.",
            next_step="Choose another base model.",
        )
    return made
