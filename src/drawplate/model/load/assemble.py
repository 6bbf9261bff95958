"""A checkpoint -> a CausalLM in its placement: `assemble` is the one way in.

It replaces each linear layer of the decoder by a FrozenLinear, lays out the stored weights, takes them from the arena
that an earlier run left in the cache or fills them from the checkpoint tensor by tensor (quantizing on the device),
makes the adapter, and gives the few modules outside the decoder layers real tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig
from torch import Tensor, nn

from drawplate.errors import EnvironmentProblem, UsageError
from drawplate.model.base.arena import (
    Arena,
    arena_key,
    is_worth_keeping,
    kept_arena,
    private_memory,
    require_host_memory,
)
from drawplate.model.base.layer_layout import LayerLayout
from drawplate.model.base.precision import FP8_CAPABILITY, FP8_MULTIPLE, PLAIN_DTYPES, Storage
from drawplate.model.base.weights import Checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import Adapter
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.model.layer.runner import ExecutedLayer
from drawplate.model.load.fill_ends import fill_outside
from drawplate.model.load.fill_layer import (
    copy_layer,
    fill_layer,
    freeze_linears,
    kept_specs,
    stored_specs,
    trained_shapes,
)
from drawplate.model.load.names import CheckpointNames, wanted_names
from drawplate.model.placement import Placement
from drawplate.model.stream.weight_ring import Residency
from drawplate.model.support.targets import target_names
from drawplate.model.support.walk import require_practical, require_streamable, walk


def assemble(
    checkpoint: Checkpoint,
    placement: Placement,
    lora: LoraConfig | Callable[[Anatomy], LoraConfig],
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> CausalLM:
    """Load a checkpoint into a placement, with a fresh adapter.

    Args:
        checkpoint: the base model's files.
        placement: where the parts go.
        lora: PEFT's configuration, or what makes it once the anatomy is known.
        seed: of the adapter's initial values.
        progress: called with (layers loaded, layers).
        tell: takes a warning, such as that the cache of prepared weights was damaged.

    Raises:
        UsageError: an architecture, placement or target that cannot be used; nothing was read yet.
        IntegrityError: tensors missing from the checkpoint.
        DoesNotFit: device or host memory is too small.
        EnvironmentProblem: host memory cannot be page-locked.
    """
    anatomy = build_anatomy(checkpoint.config)
    anatomy.skeleton.eval()
    require_practical(anatomy)
    config = lora(anatomy) if callable(lora) else lora
    tiers = placement.tiers(len(anatomy.layers))
    targets = target_names(config, anatomy)
    require_fp8_units(placement, anatomy)
    plain = next(name for name, dtype in PLAIN_DTYPES.items() if dtype == placement.compute_dtype)
    for i, (layer, tier) in enumerate(zip(anatomy.layers, tiers, strict=True)):
        storage = (placement.storage.fastest or Storage(plain)) if tier == "dequantized" else placement.storage
        freeze_linears(layer, f"{anatomy.layers_path}.{i}", storage, config, targets)
    found = walk(anatomy)
    require_streamable(anatomy, found, tiers, placement.policies(len(anatomy.layers)))
    names = CheckpointNames(checkpoint, anatomy)
    wanted = tuple(wanted_names(anatomy))
    names.require_all(wanted)
    names.require_accounted(wanted)
    residency = _loaded_layers(anatomy, placement, names, progress, tell)
    adapter = Adapter(
        config,
        anatomy.home.layers_path,
        [trained_shapes(m, config) for m in anatomy.layers],
        seed=seed,
        device=placement.device,
        on_host=placement.adapter == "host",
    )
    _start_biases(adapter, residency)
    model = CausalLM(anatomy, placement, adapter, residency, unpackable=found.unpackable)
    fill_outside(model, names)
    body_layers = anatomy.skeleton.get_submodule(anatomy.layers_path)
    for i in range(len(anatomy.layers)):
        body_layers[i] = ExecutedLayer(model.runner, i, found.extras[i])  # type: ignore[operator]
    return model


def _loaded_layers(
    anatomy: Anatomy,
    placement: Placement,
    names: CheckpointNames,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> Residency:
    """Every layer's frozen weights where they are to live: from the cache's arena, or from the checkpoint."""
    layers, device, tiers = anatomy.layers, placement.device, placement.tiers(len(anatomy.layers))
    layouts = [LayerLayout.of(stored_specs(layer, placement.compute_dtype)) for layer in layers]
    host_layers = [i for i, tier in enumerate(tiers) if tier == "host"]
    held = range(len(layers)) if device.type == "cpu" else host_layers
    require_host_memory(sum(layouts[i].bytes for i in held), _smaller_on_host(placement))
    arena = _arena_of(anatomy, placement, names, progress, tell)
    pinned = device.type == "cuda"
    if arena is None:
        buffers = private_memory({i: layouts[i] for i in host_layers}, pinned=pinned)
    elif pinned:
        buffers = arena.page_locked(host_layers)
    else:
        buffers = arena.in_place([i for i, layout in enumerate(layouts) if layout == arena.file.layouts[i]])
    on_device = [tier != "host" for tier in tiers]
    residency = Residency(layouts, on_device, device, buffers, slots=placement.slots, poison=placement.poison)
    for i, layer in enumerate(layers):
        if arena is None:
            fill_layer(layer, f"{anatomy.layers_path}.{i}", residency.stored(i), names, placement)
            if progress:
                progress(i + 1, len(layers))
        elif i not in buffers:
            copy_layer(layer, residency.stored(i), arena.views(i), placement)
    return residency


def _arena_of(
    anatomy: Anatomy,
    placement: Placement,
    names: CheckpointNames,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> Arena | None:
    """All layers in the placement's precision, whatever their tier, from the cache; None where that is not worth it."""
    layouts = [LayerLayout.of(kept_specs(layer, placement)) for layer in anatomy.layers]
    streamed = "host" in placement.tiers(len(layouts)) and not placement.read_once
    if not is_worth_keeping(names.checkpoint, placement.storage, layouts, streamed=streamed):
        return None

    def fill(i: int, stored: dict[str, Tensor]) -> None:
        path = f"{anatomy.layers_path}.{i}"
        fill_layer(anatomy.layers[i], path, stored, names, placement, in_tier=False)

    key = arena_key(names.checkpoint, placement.storage, placement.compute_dtype, placement.device)
    return kept_arena(key, layouts, fill, progress=progress, tell=tell)


def require_fp8_units(placement: Placement, anatomy: Anatomy) -> None:
    """Refuse fp8 where a GPU cannot multiply it. A CPU can, slowly."""
    if placement.storage.precision != "fp8" or placement.device.type != "cuda":
        return
    if torch.cuda.get_device_capability(placement.device) < FP8_CAPABILITY:
        raise EnvironmentProblem(
            f"{torch.cuda.get_device_name(placement.device)} has no fp8 units: Ada, Hopper and Blackwell have them.",
            safe="Nothing was loaded or written.",
            next_step="Set quantization.precision: bf16, or nf4 if memory is short.",
        )
    linears = (m for layer in anatomy.layers for m in layer.modules() if isinstance(m, nn.Linear))
    sizes = {size for m in linears for size in (m.in_features, m.out_features)}
    if placement.compute_dtype == torch.float16 or any(size % FP8_MULTIPLE for size in sizes):
        raise UsageError(
            f"fp8 products give bf16 and need sizes that {FP8_MULTIPLE} divides; this run computes in "
            f"{placement.compute_dtype} with sizes {sorted(sizes)}.",
            safe="Nothing was loaded or written.",
            next_step="Set train.bf16: true, or another quantization.precision.",
        )


def _smaller_on_host(placement: Placement) -> str:
    """The change that needs less host memory for the frozen layers."""
    if placement.storage.precision not in ("nf4", "fp4"):
        return "Set quantization.precision: nf4, which needs half a byte a weight."
    if placement.device.type == "cuda":
        return "Set memory.weights: device, or use a machine with more memory."
    return "Free some memory, or use a smaller model or a machine with more memory."


@torch.no_grad()
def _start_biases(adapter: Adapter, residency: Residency) -> None:
    for i, trained in enumerate(adapter.layers):
        for name, parameter in trained.items():
            if name.endswith(".bias"):
                parameter.copy_(residency.stored(i)[name])
