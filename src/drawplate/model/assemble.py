"""A checkpoint -> a CausalLM in its placement: `assemble` is the one way in.

It replaces each linear layer of the decoder by a FrozenLinear, lays out the stored weights, takes them from the arena
that an earlier run left in the cache or fills them from the checkpoint tensor by tensor (quantizing on the device),
makes the adapter, and gives the few modules outside the decoder layers real tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from drawplate.errors import EnvironmentProblem, IntegrityError, UsageError
from drawplate.model.adapter import Adapter, scaling_of, target_names
from drawplate.model.anatomy import Anatomy, build_anatomy
from drawplate.model.arena import (
    Arena,
    arena_key,
    is_worth_keeping,
    kept_arena,
    private_bytes,
    private_memory,
    require_host_memory,
)
from drawplate.model.causal_lm import CausalLM, Placement
from drawplate.model.frozen import (
    FP8_CAPABILITY,
    FP8_MULTIPLE,
    PLAIN_DTYPES,
    WHOLE,
    FrozenLinear,
    Storage,
)
from drawplate.model.head import Head, ResidentRows, StreamedRows
from drawplate.model.layers import ExecutedLayer
from drawplate.model.residency import LayerLayout, Residency
from drawplate.model.support import require_streamable, walk
from drawplate.model.weights import Checkpoint

DROPOUT_KEY = "dropout_key"
UNWRITTEN = -77
"""What a table holds before it is computed; no table holds it everywhere."""


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
    names = _CheckpointNames(checkpoint, anatomy)
    names.require_all(_wanted_names(anatomy))
    residency = _loaded_layers(anatomy, placement, names, progress, tell)
    adapter = Adapter(
        config,
        anatomy.layers_path,
        [trained_shapes(m, config) for m in anatomy.layers],
        seed=seed,
        device=placement.device,
        on_host=placement.adapter == "host",
    )
    _start_biases(adapter, residency)
    model = CausalLM(anatomy, placement, adapter, residency, unpackable=found.unpackable)
    _fill_outside(model, names)
    body_layers = anatomy.skeleton.get_submodule(anatomy.layers_path)
    for i in range(len(anatomy.layers)):
        body_layers[i] = ExecutedLayer(model.runner, i, found.extras[i])  # type: ignore[operator]
    return model


def _loaded_layers(
    anatomy: Anatomy,
    placement: Placement,
    names: _CheckpointNames,
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
        buffers = {i: arena.buffers[i] for i, layout in enumerate(layouts) if layout == arena.file.layouts[i]}
    on_device = [tier != "host" for tier in tiers]
    residency = Residency(layouts, on_device, device, buffers, slots=placement.slots, poison=placement.poison)
    for i, layer in enumerate(layers):
        if arena is None:
            _fill_layer(layer, f"{anatomy.layers_path}.{i}", residency.stored(i), names, placement)
            if progress:
                progress(i + 1, len(layers))
        elif i not in buffers:
            _copy_layer(layer, residency.stored(i), arena.views(i), placement)
    return residency


def _arena_of(
    anatomy: Anatomy,
    placement: Placement,
    names: _CheckpointNames,
    progress: Callable[[int, int], None] | None,
    tell: Callable[[str], None],
) -> Arena | None:
    """All layers in the placement's precision, whatever their tier, from the cache; None where that is not worth it."""
    layouts = [LayerLayout.of(_kept_specs(layer, placement)) for layer in anatomy.layers]
    streamed = "host" in placement.tiers(len(layouts))
    if not is_worth_keeping(names.checkpoint, placement.storage, layouts, streamed=streamed):
        return None

    def fill(i: int, stored: dict[str, Tensor]) -> None:
        path = f"{anatomy.layers_path}.{i}"
        _fill_layer(anatomy.layers[i], path, stored, names, placement, in_tier=False)

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


def freeze_linears(layer: nn.Module, path: str, storage: Storage, config: LoraConfig, targets: set[str]) -> None:
    """Put a FrozenLinear in the place of every linear layer; those in `targets` with an adapter."""
    for parent_path, parent in list(layer.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            full = ".".join(part for part in (path, parent_path, name) if part)
            rank = config.r if full in targets else 0
            frozen = FrozenLinear(
                child, storage, rank=rank, scaling=scaling_of(config), dropout=config.lora_dropout if rank else 0.0
            )
            setattr(parent, name, frozen)


def _wanted_names(anatomy: Anatomy) -> Iterator[str]:
    """Every tensor that is read from the checkpoint, by transformers' name of it."""
    for i, layer in enumerate(anatomy.layers):
        for path, module in layer.named_modules():
            prefix = ".".join(part for part in (anatomy.layers_path, str(i), path) if part)
            if isinstance(module, FrozenLinear):
                yield f"{prefix}.weight"
                if module.bias is not None:
                    yield f"{prefix}.bias"
                continue
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))
            yield from (f"{prefix}.{name}" for name in _kept_buffers(module))
    yield f"{anatomy.embedding_path}.weight"
    if not anatomy.tied:
        yield f"{anatomy.head_path}.weight"


def _kept_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that a checkpoint holds; the others are tables that its code computes."""
    return [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]


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


def _kept_specs(layer: nn.Module, placement: Placement) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
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
def _start_biases(adapter: Adapter, residency: Residency) -> None:
    for i, trained in enumerate(adapter.layers):
        for name, parameter in trained.items():
            if name.endswith(".bias"):
                parameter.copy_(residency.stored(i)[name])


class _CheckpointNames:
    """Finds the skeleton's tensors in a checkpoint.

    It may have been saved with or without the `model.` prefix, inside a model for text and images, or with GPT-NeoX's
    old name of the head.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
        self.checkpoint = checkpoint
        self.skeleton = anatomy.skeleton
        self.prefix = f"{anatomy.skeleton.base_model_prefix}."
        self.architecture = anatomy.architecture

    def name_of(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, None where it has none."""
        bare = name.removeprefix(self.prefix)
        candidates = [name, bare, self.prefix + name, f"language_model.{name}", f"model.language_model.{bare}"]
        if name == "lm_head.weight":
            candidates += ["embed_out.weight"]
        return next((candidate for candidate in candidates if candidate in self.checkpoint.files), None)

    def require_all(self, wanted: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks tensors, before anything is read.

        Raises:
            IntegrityError: it lacks some; the first is named.
        """
        missing = [name for name in wanted if self.name_of(name) is None]
        if not missing:
            return
        experts = any(".experts" in name or "moe" in name for name in missing)
        raise IntegrityError(
            f"{self.checkpoint.name} lacks {len(missing)} tensors that {self.architecture} runs with, the first "
            f"{missing[0]}." + (" Mixtures of experts are not supported yet." if experts else ""),
            safe="Nothing was loaded or written.",
            next_step="Choose a model without experts."
            if experts
            else "Fetch the model again, or choose one in transformers' own format.",
        )

    def read(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """One tensor.

        Raises:
            IntegrityError: the checkpoint has none of that name, or of another shape than `shape`.
        """
        found = self.name_of(name)
        if found is None:
            raise IntegrityError(
                f"{self.checkpoint.name} has no tensor {name}, which its configuration asks for.",
                safe="Nothing was trained or written.",
                next_step="Fetch the model again, or choose one in transformers' own format.",
            )
        tensor = self.checkpoint.read(found)
        if shape is not None:
            self.require_shape(name, tensor, shape)
        return tensor

    def require_shape(self, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
        """Refuse what copying would broadcast, or quantizing would flatten, without a word."""
        if tuple(tensor.shape) != tuple(shape):
            raise IntegrityError(
                f"{self.checkpoint.name}: {name} has the shape {tuple(tensor.shape)} where the configuration says "
                f"{tuple(shape)}.",
                safe="Nothing was trained or written.",
                next_step="Fetch the model again; its files do not belong together.",
            )


@torch.no_grad()
def _fill_layer(
    layer: nn.Module,
    path: str,
    stored: dict[str, Tensor],
    names: _CheckpointNames,
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
            for name, table in _tables(names.skeleton, module, torch.device("cpu")).items():
                others.pop(f"{local}.{name}".lstrip(".")).copy_(table)
    for name, target in others.items():
        target.copy_(names.read(f"{path}.{name}", target.shape))


@torch.no_grad()
def _copy_layer(layer: nn.Module, stored: dict[str, Tensor], kept: dict[str, Tensor], placement: Placement) -> None:
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


def _encoded_linear(
    name: str, module: FrozenLinear, names: _CheckpointNames, placement: Placement
) -> dict[str, Tensor]:
    """The stored tensors of one linear layer in the placement's precision."""
    wanted, shape = placement.storage, (module.out_features, module.in_features)
    encoded = names.checkpoint.stored_linear(name, wanted) if wanted.quantized else None
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


@torch.no_grad()
def _fill_outside(model: CausalLM, names: _CheckpointNames) -> None:
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
    skeleton: nn.Module, module: nn.Module, path: str, device: torch.device, dtype: torch.dtype, names: _CheckpointNames
) -> None:
    """Give a module outside the decoder layers its tensors.

    Tables are computed by transformers' own initialiser, which also fills parameters with noise: so they come first,
    while parameters are still placeholders.
    """
    module._buffers.update(_tables(skeleton, module, device))
    for name in _kept_buffers(module):
        module._buffers[name] = names.read(f"{path}.{name}".lstrip("."), module.get_buffer(name).shape).to(device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        tensor = names.read(f"{path}.{name}".lstrip("."), parameter.shape).to(device, dtype)
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def _tables(skeleton: nn.Module, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
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
