"""One decoder layer, frozen: its linear layers replaced, what is stored of it, and how that is filled.

From a checkpoint tensor by tensor, quantizing on the device, or from an arena that an earlier run prepared.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import Tensor, nn

from drawplate.model.base.adapter_config import ranks_of, scaling_of
from drawplate.model.base.precision import Storage
from drawplate.model.base.tables import computed_tables
from drawplate.model.layer.frozen_linear import WHOLE, FrozenLinear, Group
from drawplate.model.load.names import CheckpointNames
from drawplate.model.placement import Placement

DROPOUT_KEY = "dropout_key"
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that transformers' decoder layers call with one tensor, in this order."""


def freeze_linears(layer: nn.Module, path: str, storage: Storage, config: LoraConfig, targets: set[str]) -> None:
    """Put a FrozenLinear in the place of every linear layer; those in `targets` with an adapter.

    Adapted ones that usually read the same input are made a group; model/support/walk.py takes apart what does not.
    """
    for parent_path, parent in list(layer.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            full = ".".join(part for part in (path, parent_path, name) if part)
            rank = ranks_of(config, full)[0] if full in targets else 0
            scaling, dropout = scaling_of(config, full), config.lora_dropout if rank else 0.0
            frozen = FrozenLinear(child, storage, rank=rank, scaling=scaling, dropout=dropout)
            frozen.changed_in_place = getattr(getattr(parent, "config", None), "clip_qkv", None) is not None
            setattr(parent, name, frozen)
        for names in SAME_INPUT:
            found = [getattr(parent, name, None) for name in names]
            group = [m for m in found if isinstance(m, FrozenLinear) and m.rank]
            if len(group) > 1 and len({(m.in_features, m.rank, m.scaling) for m in group}) == 1:
                Group(group)


def stored_specs(layer: nn.Module, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Everything of a layer that is frozen: name -> (shape, dtype)."""
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, tensor in layer.named_buffers():
        if name.rpartition(".")[2] not in (DROPOUT_KEY, WHOLE):
            specs[name] = (tuple(tensor.shape), tensor.dtype)
    for name, tensor in layer.named_parameters():
        if name.rpartition(".")[2] not in ("lora_A", "lora_B"):
            specs[name] = (tuple(tensor.shape), dtype)
    return specs


def kept_specs(layer: nn.Module, placement: Placement) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What `stored_specs` gives for a layer that is not dequantized, in the same order."""
    linears = {path: module for path, module in layer.named_modules() if isinstance(module, FrozenLinear)}
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, spec in stored_specs(layer, placement.compute_dtype).items():
        path, _, last = name.rpartition(".")
        linear = linears.get(path)
        if linear is None or last not in linear.stored_names:
            specs[name] = spec
            continue
        encoded = placement.storage.specs(linear.out_features, linear.in_features)
        specs |= {f"{path}.{key}": encoded_spec for key, encoded_spec in encoded.items()}
    return specs


def trained_shapes(layer: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Everything of a layer with frozen linear layers that is trained: name -> shape."""
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if n.rpartition(".")[2] in ("lora_A", "lora_B")}
    if config.bias == "none":
        return shapes
    targets = {name.rpartition(".")[0] for name in shapes}
    biases = {
        name: tuple(p.shape)
        for name, p in layer.named_parameters()
        if name.endswith(".bias") and (config.bias == "all" or name.removesuffix(".bias") in targets)
    }
    return shapes | biases


@torch.no_grad()
def fill_layer(
    layer: nn.Module,
    path: str,
    stored: dict[str, Tensor],
    names: CheckpointNames,
    placement: Placement,
    *,
    in_tier: bool = True,
) -> None:
    """From the checkpoint; with `in_tier` as the layer's tier keeps it, else as the arena does."""
    others = dict(stored)
    for local, module in layer.named_modules():
        if not isinstance(module, FrozenLinear):
            continue
        encoded = _encoded_linear(f"{path}.{local}", module, names, placement)
        for name, tensor in (_in_tier(module, encoded, placement) if in_tier else encoded).items():
            others.pop(f"{local}.{name}").copy_(tensor)
    for local, module in layer.named_modules():
        if not isinstance(module, FrozenLinear):
            for name, table in computed_tables(names.skeleton, module, torch.device("cpu")).items():
                others.pop(f"{local}.{name}".lstrip(".")).copy_(table)
    for name, target in others.items():
        target.copy_(names.read(f"{path}.{name}", target.shape))


@torch.no_grad()
def copy_layer(layer: nn.Module, stored: dict[str, Tensor], kept: dict[str, Tensor], placement: Placement) -> None:
    """From the arena, as the layer's tier keeps it."""
    others = dict(stored)
    for local, module in layer.named_modules():
        if not isinstance(module, FrozenLinear):
            continue
        names = placement.storage.specs(module.out_features, module.in_features)
        encoded = {name: kept[f"{local}.{name}"] for name in names}
        for name, tensor in _in_tier(module, encoded, placement).items():
            others.pop(f"{local}.{name}").copy_(tensor)
    for name, target in others.items():
        target.copy_(kept[name])


def _encoded_linear(name: str, module: FrozenLinear, names: CheckpointNames, placement: Placement) -> dict[str, Tensor]:
    """The stored tensors of one linear layer in the placement's precision."""
    wanted, shape = placement.storage, (module.out_features, module.in_features)
    found = (names.name_of(f"{name}.weight") or f"{name}.weight").removesuffix(".weight")
    encoded = names.checkpoint.stored_linear(found, wanted) if wanted.quantized else None
    if encoded is None:
        weight = names.read(f"{name}.weight", shape).to(placement.device).to(placement.compute_dtype)
        return wanted.encode(weight)
    for part, (part_shape, _) in wanted.specs(*shape).items():
        names.require_shape(f"{name}.weight ({part})", encoded[part], part_shape)
    return encoded


def _in_tier(module: FrozenLinear, encoded: dict[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    """As the layer's tier stores it: a dequantized layer has been through its quantization all the same."""
    wanted, shape = placement.storage, (module.out_features, module.in_features)
    if module.storage == wanted:
        return encoded
    if module.storage == wanted.fastest:
        return module.storage.completed(encoded)
    on_device = [encoded[key].to(placement.device) for key in wanted.specs(*shape)]
    return module.storage.encode(wanted.decode(on_device, shape, placement.compute_dtype))
