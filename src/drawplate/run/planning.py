"""A recipe, a model and tokens -> the plan for this machine: what the search is asked, and what its answer lacks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import torch

from drawplate.data.steps import target_tokens_of
from drawplate.data.tokens import Tokenized
from drawplate.errors import UsageError
from drawplate.machine.caches import standing
from drawplate.machine.cgroups import available_ram_bytes
from drawplate.machine.device import machine, pick_device
from drawplate.machine.memory import lasting_process_bytes, memory_sample
from drawplate.machine.speed import measured_speed
from drawplate.model.base.foreign import refusing
from drawplate.model.base.weights import Checkpoint
from drawplate.model.footprint.measure import Tell, layer_shapes, outer_footprints, unheard
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.support.targets import left_out, lora_config, target_names
from drawplate.model.support.walk import require_practical, walk
from drawplate.planner.advise import advised_adapter
from drawplate.planner.choose import choose
from drawplate.planner.disk import RunFiles, disk_warning, with_disk_lines
from drawplate.planner.shape import ModelShape
from drawplate.planner.situation import CorpusShape, Obstacles, Situation, choose_compute_dtype
from drawplate.planner.tax import plan_quantization_tax
from drawplate.recipe import FOUR_BITS, Recipe, expand
from drawplate.records import Plan

HOST_SHARE = 0.85  # of what the host can still give, the most that a measurement beside the run takes


TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*")


def left_out_of(recipe: Recipe, anatomy: Anatomy) -> tuple[str, ...]:
    """A warning where all-linear does not mean every linear layer of this architecture."""
    if recipe.lora.filled().target_modules != "all-linear":
        return ()
    names = left_out(lora_config(recipe.lora, anatomy, recipe.model.name_or_path, None), anatomy)
    if not names:
        return ()
    why = "the model never calls them as layers, or PEFT takes no adapter for them"
    return (f"lora.target_modules: all-linear leaves out {', '.join(names)} of {anatomy.architecture}: {why}.",)


def with_quantization_tax(
    chosen: Plan, recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy, *, host_bytes: int | None = None
) -> Plan:
    """The plan with the decision on measuring the unquantized base model, within what the host can still give.

    `host_bytes` are those of a host that is not this one.
    """
    available = host_bytes or available_ram_bytes()
    if recipe.memory.ram is not None:
        available = min(available, recipe.memory.ram - memory_sample().process_bytes)
    return plan_quantization_tax(
        chosen,
        model_shape(anatomy, recipe),
        asked=recipe.evaluation.quantization_tax,
        stored_precision=checkpoint.quantized_precision,
        host_room_bytes=int(HOST_SHARE * available),
        starts_adapter=recipe.lora.filled().init_lora_weights == "quantization_error" and chosen.precision in FOUR_BITS,
    )


def with_disk(chosen: Plan, recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy) -> Plan:
    """The plan with what the run will have of the disk, and a warning where that has less room."""
    files = RunFiles(
        trained_parameters=model_shape(anatomy, recipe).trained_parameters,
        tokenizer_bytes=sum(
            path.stat().st_size for pattern in TOKENIZER_FILES for path in checkpoint.folder.glob(pattern)
        ),
    )
    counted = with_disk_lines(chosen, recipe, files)
    warning = disk_warning(counted, shutil.disk_usage(standing(expand(recipe.output_dir))).free, recipe.output_dir)
    return replace(counted, warnings=(*counted.warnings, warning)) if warning else counted


def choose_context_tokens(recipe: Recipe, max_length: int) -> int:
    """Tokens that each window of a long held-out document reads again: as asked, else half a window.

    Raises:
        UsageError: so many are asked for that a window would hold nothing new.
    """
    asked = recipe.evaluation.context_tokens
    if asked == "auto":
        return max_length // 2
    if asked >= max_length:
        raise UsageError(
            f"evaluation.context_tokens: {asked} leave nothing new in a window of {max_length} tokens.",
            safe="Nothing was loaded or written.",
            next_step=f"Set it below {max_length}; half of that is usual.",
        )
    return asked


def max_positions(checkpoint: Checkpoint) -> int:
    """Longest input the model was made for; a generous guess where its configuration does not say."""
    return int(getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or 2**15)


def model_shape(
    anatomy: Anatomy, recipe: Recipe, device: torch.device | None = None, tell: Tell = unheard
) -> ModelShape:
    """The numbers that memory and time depend on, read off the meta-device module, with the adapter that is advised.

    Args:
        anatomy: of the base model.
        recipe: for the adapter.
        device: that the run will use, where it is here; what compiled layers hold is measured on it.
        tell: told once, before that is done.
    """
    require_practical(anatomy)
    section, _ = advised_adapter(recipe.lora, anatomy.config.hidden_size)
    config = lora_config(section, anatomy, recipe.model.name_or_path, None)
    targets = target_names(config, anatomy)
    linears = {
        f"{anatomy.layers_path}.{i}.{path}": module
        for i, layer in enumerate(anatomy.layers)
        for path, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linear_parameters = sum(module.weight.numel() for module in linears.values())
    attention = [
        m for name, m in linears.items() if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "qkv_proj")
    ]
    settings = anatomy.config
    kinds, kind_of_layer = layer_shapes(anatomy, config, device, tell, recipe.memory.vram)
    opening, closing = outer_footprints(anatomy)
    return ModelShape(
        kinds=kinds,
        kind_of_layer=kind_of_layer,
        opening=opening,
        closing=closing,
        tied=anatomy.tied,
        softcap=anatomy.softcap is not None,
        one_by_one=anatomy.one_by_one,
        parameters=anatomy.parameters,
        layers=len(anatomy.layers),
        linear_parameters=linear_parameters,
        outside_parameters=anatomy.parameters - linear_parameters,
        hidden=settings.hidden_size,
        intermediate=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        vocab=settings.vocab_size,
        attention_width=sum(m.out_features for m in attention) // len(anatomy.layers) or 3 * settings.hidden_size,
        trained_parameters=sum(config.r * (linears[n].in_features + linears[n].out_features) for n in targets),
        max_positions=getattr(settings, "max_position_embeddings", None) or 2**15,
    )


def corpus_shape(training: Tokenized, heldout: Tokenized | None = None) -> CorpusShape:
    """Lengths of the sequences on both sides."""
    return CorpusShape(
        lengths=_lengths(training),
        target_tokens=target_tokens_of(training.sequences),
        heldout_lengths=_lengths(heldout) if heldout else (),
    )


def _lengths(tokens: Tokenized) -> tuple[int, ...]:
    return tuple(len(sequence) for sequence in tokens.sequences)


def plan_for_lengths(
    recipe: Recipe,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    corpus: CorpusShape,
    max_length: int,
    tell: Tell = unheard,
) -> Plan:
    """The plan for windows of these lengths in tokens, on this machine."""
    with refusing(anatomy.architecture):
        return choose(situation_of(recipe, checkpoint, anatomy, tell), corpus, max_length)


def obstacles_of(anatomy: Anatomy) -> Obstacles:
    """What the architecture cannot take part in."""
    found = walk(anatomy)
    return Obstacles(packing=found.unpackable, streaming=found.obstacle)


def situation_of(recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy, tell: Tell = unheard) -> Situation:
    """What a plan for this machine rests on; a device whose speed is not known yet is measured."""
    device = pick_device(recipe.model.device_map)
    here = machine(device)
    dtype, _ = choose_compute_dtype(recipe, here)
    return Situation(
        recipe=recipe,
        machine=here,
        model=model_shape(anatomy, recipe, device, tell),
        base_bytes=lasting_process_bytes(),
        stored_precision=checkpoint.quantized_precision,
        stored_double_quant=checkpoint.quantized_doubly,
        speed=measured_speed(device, getattr(torch, dtype)),
        frontier=True,
        obstacles=obstacles_of(anatomy),
    )
