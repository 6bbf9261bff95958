"""What lies outside the decoder layers: embedding, final norm, rotary tables and head get real tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from drawplate.model.arena import private_bytes
from drawplate.model.causal_lm import CausalLM
from drawplate.model.checkpoint_names import CheckpointNames
from drawplate.model.head import Head, ResidentRows, StreamedRows
from drawplate.model.tables import computed_tables, kept_buffers


@torch.no_grad()
def fill_outside(model: CausalLM, names: CheckpointNames) -> None:
    """Real tensors for embedding, final norm, rotary tables and head."""
    anatomy, placement = model.anatomy, model.placement
    skeleton, dtype = anatomy.skeleton, placement.compute_dtype
    streamed = placement.head_rows > 0
    table_device = torch.device("cpu") if streamed else placement.device
    embedding = cast(nn.Embedding, skeleton.get_submodule(anatomy.embedding_path))
    head = cast(nn.Linear, skeleton.get_submodule(anatomy.head_path))
    inside = {id(module) for layer in anatomy.layers for module in layer.modules()}
    for path, module in skeleton.named_modules():
        if id(module) in inside or module is head:
            continue
        own_device = table_device if module is embedding else placement.device
        _materialise(skeleton, module, path, own_device, dtype, names)
    model.embedding = embedding
    weight = embedding.weight if anatomy.tied else names.read(f"{anatomy.head_path}.weight")
    weight = weight.detach().to(table_device, dtype)
    if streamed and placement.device.type == "cuda":
        locked = private_bytes(weight.numel() * weight.element_size(), pinned=True)
        weight = locked.view(weight.dtype).view(weight.shape).copy_(weight)
        if anatomy.tied:
            embedding.weight = nn.Parameter(weight, requires_grad=False)
    bias = names.read(f"{anatomy.head_path}.bias").to(placement.device, dtype) if head.bias is not None else None
    rows = (
        StreamedRows(weight, placement.device, slot_rows=placement.head_rows, poison=placement.poison)
        if streamed
        else ResidentRows(weight)
    )
    model.head = Head(weights=rows, bias=bias, softcap=anatomy.softcap, logit_scale=anatomy.logit_scale)


def _materialise(
    skeleton: nn.Module, module: nn.Module, path: str, device: torch.device, dtype: torch.dtype, names: CheckpointNames
) -> None:
    """Give a module outside the decoder layers its tensors.

    Tables are computed by transformers' own initialiser, which also fills parameters with noise: so they come first,
    while parameters are still placeholders.
    """
    module._buffers.update(computed_tables(skeleton, module, device))
    for name in kept_buffers(module):
        module._buffers[name] = names.read(f"{path}.{name}".lstrip("."), module.get_buffer(name).shape).to(device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        tensor = names.read(f"{path}.{name}".lstrip("."), parameter.shape).to(device, dtype)
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
