"""The frozen embedding: rows of its table, on the device or in host memory.

Left out: an embedding that trains, and modules that do more with their table than look rows up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drawplate.kernels import Impl
from drawplate.kernels.host_rows import host_rows


def embedded(embedding: nn.Embedding, ids_BT: Tensor) -> Tensor:
    """What the module makes of the ids, shape (B, T, H), on their device, wherever its table is."""
    if embedding.weight.device == ids_BT.device:
        return embedding(ids_BT).detach()
    return from_host(embedding, ids_BT)


def from_host(embedding: nn.Embedding, ids_BT: Tensor, impl: Impl = "auto") -> Tensor:
    """The same where the table is in host memory; on a GPU it must be page-locked.

    A module that does more than look up, such as scale, does so with a table of these rows alone, so that it must have
    no `padding_idx`, which only a table that trains needs.
    """
    rows_NH = host_rows(embedding.weight.detach(), ids_BT.flatten(), impl)
    if type(embedding) is nn.Embedding:
        return rows_NH.view(*ids_BT.shape, -1)
    numbers_BT = torch.arange(ids_BT.numel(), device=ids_BT.device).view_as(ids_BT)
    return torch.func.functional_call(embedding, {"weight": rows_NH}, (numbers_BT,)).detach()
