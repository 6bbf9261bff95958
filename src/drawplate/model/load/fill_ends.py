"""What lies outside the decoder layers: embedding, final norm, rotary tables and head get real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from drawplate.model.base.arena import private_bytes
from drawplate.model.base.tables import computed_tables, kept_buffers
from drawplate.model.causal_lm import CausalLM
from drawplate.model.ends.head import Head, ResidentRows, StreamedRows
from drawplate.model.load.names import CheckpointNames

WITHOUT = "memory.vram higher, so that embedding and head stay on the device"
"""What needs no page-locked memory for them."""


@torch.no_grad()
def fill_outside(model: CausalLM, names: CheckpointNames) -> None:
    """Real tensors for embedding, final norm, rotary tables and head."""
    anatomy, placement = model.anatomy, model.placement
    skeleton, dtype = anatomy.skeleton, placement.compute_dtype
    streamed, table_on_host = placement.head_rows > 0, placement.table_on_host(tied=anatomy.tied)
    embedding = cast(nn.Embedding, skeleton.get_submodule(anatomy.embedding_path))
    head = cast(nn.Linear, skeleton.get_submodule(anatomy.head_path))

    def on_device(read: Tensor) -> Tensor:
        return read.to(placement.device, dtype)

    def on_host(read: Tensor) -> Tensor:
        return _in_host_memory(read.to(dtype), pinned=placement.device.type == "cuda")

    inside = {id(module) for layer in anatomy.layers for module in layer.modules()}
    for path, module in skeleton.named_modules():
        if id(module) in inside or module is head:
            continue
        place = on_host if table_on_host and module is embedding else on_device
        _materialise(skeleton, module, path, placement.device, names, place)
    embedding.padding_idx = None  # only training it would need one, and its rows may be looked up in a part of it
    model.embedding = embedding
    if anatomy.tied:
        weight = embedding.weight.detach()
    elif streamed:
        weight = on_host(names.read(f"{anatomy.head_path}.weight", head.weight.shape))
    else:
        weight = on_device(names.read(f"{anatomy.head_path}.weight", head.weight.shape))
    bias = names.read(f"{anatomy.head_path}.bias").to(placement.device, dtype) if head.bias is not None else None
    rows = (
        StreamedRows(weight, placement.device, slot_rows=placement.head_rows, poison=placement.poison)
        if streamed
        else ResidentRows(weight)
    )
    model.head = Head(weights=rows, bias=bias, softcap=anatomy.softcap, logit_scale=anatomy.logit_scale)


def _in_host_memory(table: Tensor, *, pinned: bool) -> Tensor:
    """As it is, or page-locked, where a GPU is to read it."""
    if not pinned:
        return table.cpu()
    locked = private_bytes(table.numel() * table.element_size(), pinned=True, without=WITHOUT)
    return locked.view(table.dtype).view(table.shape).copy_(table)


def _materialise(
    skeleton: nn.Module,
    module: nn.Module,
    path: str,
    device: torch.device,
    names: CheckpointNames,
    place: Callable[[Tensor], Tensor],
) -> None:
    """Give a module outside the decoder layers its tensors: tables and buffers on the device, parameters by `place`.

    Tables are computed by transformers' own initialiser, which also fills parameters with noise: so they come first,
    while parameters are still placeholders.
    """
    module._buffers.update(computed_tables(skeleton, module, device))
    for name in kept_buffers(module):
        module._buffers[name] = names.read(f"{path}.{name}".lstrip("."), module.get_buffer(name).shape).to(device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        tensor = place(names.read(f"{path}.{name}".lstrip("."), parameter.shape))
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
