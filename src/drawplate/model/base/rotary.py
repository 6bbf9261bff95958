"""Rotary tables that depend on the length of the text: by document, not by batch.

transformers chooses between two tables (`longrope`: Phi-3.5, Phi-4-mini) by the largest position of a whole batch, and
keeps the choice in the module. A document then gets another table where a longer one shares its row or its batch.
Here both tables are made and each position takes that of its own document, whose length is read from the positions:
every segment of a row, padding included, begins at position 0.

Dynamic tables, which grow with the text, are left as they are up to the length at which they begin to change; longer
texts are refused (`longest_text`).

Shapes: B rows, T positions, D head size.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONG = "drawplate_long_inv_freq"
"""Our buffer beside transformers' `original_inv_freq`: the frequencies of longer texts."""


def by_document(skeleton: nn.Module) -> None:
    """Let the skeleton's rotary modules choose their table for each document, and keep no state between calls."""
    for module in skeleton.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            module.register_buffer(LONG, torch.empty_like(module.get_buffer("original_inv_freq")), persistent=False)
            module.__dict__["forward"] = functools.partial(_longrope, module)
        elif kind == "dynamic":
            module.__dict__["forward"] = functools.partial(_plain, module)


def long_table(module: nn.Module) -> Tensor:
    """The frequencies of texts longer than the model was first trained on."""
    config: Any = module.config
    beyond = config.rope_parameters["original_max_position_embeddings"] + 1
    table: Tensor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=beyond)[0]
    return table


def longest_text(config: PretrainedConfig) -> int | None:
    """The longest text whose tables are known, where tables grow with the text; None where they do not."""
    parameters = getattr(config, "rope_parameters", None) or {}
    dynamic = isinstance(parameters, dict) and parameters.get("rope_type") == "dynamic"
    return int(config.max_position_embeddings) if dynamic else None


def document_lengths(position_ids_BT: Tensor) -> Tensor:
    """For each position, the length of the document that it is in, (B, T)."""
    document_BT = (position_ids_BT == 0).long().cumsum(-1)
    room = position_ids_BT.new_zeros(position_ids_BT.shape[0], position_ids_BT.shape[1] + 1)
    return room.scatter_reduce(1, document_BT, position_ids_BT + 1, "amax").gather(1, document_BT)


def _longrope(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    config: Any = module.config
    border = config.rope_parameters["original_max_position_embeddings"]
    longer_BT1 = (document_lengths(position_ids) > border)[..., None]
    short = _with(module, module.get_buffer("original_inv_freq"), x, position_ids)
    long = _with(module, module.get_buffer(LONG), x, position_ids)
    cos_BTD, sin_BTD = (torch.where(longer_BT1, b, a) for a, b in zip(short, long, strict=True))
    return cos_BTD, sin_BTD


def _with(module: nn.Module, frequencies: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    own = module._buffers["inv_freq"]
    module._buffers["inv_freq"] = frequencies
    try:
        return _plain(module, x, position_ids)
    finally:
        module._buffers["inv_freq"] = own


@torch.no_grad()
def _plain(module: nn.Module, x: Tensor, position_ids: Tensor) -> Any:
    """transformers' own forward without what chooses the table."""
    return inspect.unwrap(type(module).forward)(module, x, position_ids)
