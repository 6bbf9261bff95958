"""`drawplate.prepare_model`: a base model's name and parts of a recipe -> a model that any training loop trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from drawplate.integrations.trainer_model import DrawplateForCausalLM
from drawplate.machine.device import pick_device
from drawplate.model.base.foreign import refusing
from drawplate.model.base.weights import open_checkpoint
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import placement_of
from drawplate.model.support.targets import lora_config
from drawplate.planner.advise import advised_adapter
from drawplate.planner.choose import choose
from drawplate.planner.situation import CorpusShape, choose_max_length
from drawplate.recipe import Recipe, Section, load_recipe
from drawplate.run.planning import left_out_of, max_positions, situation_of

Keys = Mapping[str, Any] | Section | None


def prepare_model(  # noqa: PLR0913 - one keyword a section of the recipe
    name_or_path: str,
    *,
    model: Keys = None,
    quantization: Keys = None,
    lora: Keys = None,
    memory: Keys = None,
    train: Keys = None,
    seed: int | None = None,
) -> DrawplateForCausalLM:
    """A base model with a fresh adapter, ready for any training loop.

    The keywords take a recipe's sections, as mappings or as the recipe's own objects, checked alike. What is left open
    is planned as `drawplate plan` would for full windows, with steps that are launched kernel by kernel. Of `train`,
    only seed, fp16, bf16, gradient_checkpointing and per_device_train_batch_size are read, and of `memory` all but
    log_frequency: the rest is the outer loop's to decide. What a person should know of the model's files, of the
    adapter's layers or of the plan is a Python warning.

    Args:
        name_or_path: a model folder or repository name.
        model: revision, gguf_file, device_map, compile.
        quantization: precision of the frozen weights.
        lora: the adapter.
        memory: the budget, where weights live, what becomes of activations.
        train: see above.
        seed: decides the adapter's start and its dropout; instead of `train.seed`.

    Raises:
        UsageError: an unknown key (the nearest known one is named), or values that cannot be meant.
        UserError: a model that cannot be loaded, or does not fit.
    """
    recipe = _recipe(name_or_path, model, quantization=quantization, lora=lora, memory=memory, train=train)
    seed = recipe.train.seed if seed is None else seed
    checkpoint = open_checkpoint(recipe.model)
    length = choose_max_length(recipe, max_positions(checkpoint))
    anatomy = build_anatomy(checkpoint.config)
    lora_section = advised_adapter(recipe.lora, anatomy.config.hidden_size)[0]
    advised = recipe.model_copy(update={"lora": lora_section})
    with refusing(anatomy.architecture):
        situation = replace(situation_of(recipe, checkpoint, anatomy), launched=True)
        chosen = choose(situation, CorpusShape(lengths=(length,)), length)
    for line in (*checkpoint.remarks, *left_out_of(advised, anatomy), *chosen.warnings):
        warnings.warn(line, stacklevel=2)  # what `drawplate tune` says on screen and in its record
    assembled = assemble(
        checkpoint,
        placement_of(chosen, pick_device(recipe.model.device_map)),
        lambda anatomy: lora_config(lora_section, anatomy, checkpoint.loadable_name, checkpoint.revision),
        seed=seed,
    )
    return DrawplateForCausalLM(assembled, checkpoint, seed=seed)


def _recipe(name_or_path: str, model: Keys, **sections: Keys) -> Recipe:
    values = {name: _plain(keys) for name, keys in sections.items() if keys is not None}
    base = {**_plain(model), "name_or_path": name_or_path}
    return load_recipe({"model": base, **values, "data": {"files": ["given by the training loop"]}})


def _plain(keys: Keys) -> dict[str, Any]:
    if isinstance(keys, Section):
        return {name: getattr(keys, name) for name in keys.model_fields_set}
    return dict(keys or {})
