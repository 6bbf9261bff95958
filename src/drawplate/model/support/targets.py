"""Which linear layers get an adapter, by PEFT's own rule; an adapter that does not fit the model is refused here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from drawplate.errors import UsageError
from drawplate.model.base.adapter_config import ranks_of
from drawplate.model.layer.adapter import peft_name, require_same
from drawplate.model.layer.adapter_home import pattern_for
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.support.walk import walked
from drawplate.recipe import LoraSection

ALWAYS_CALLED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Linear layers that every family calls as modules, so that nothing need be walked to know it."""


PEFT_REFUSES = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), frozenset({"out_proj"}))
"""Linear layers that PEFT (0.19 to 0.21) takes no adapter for, by model type: they are left out of all-linear."""


def lora_config(section: LoraSection, anatomy: Anatomy, base_model: str, revision: str | None) -> LoraConfig:
    """PEFT's configuration for a recipe, with `target_modules` resolved to names of this architecture.

    Raises:
        UsageError: a target that no linear layer of the decoder layers has.
    """
    section = section.filled()
    targets, alpha = section.target_modules, cast(float, section.lora_alpha)
    config = LoraConfig(
        r=cast(int, section.r),
        lora_alpha=cast(int, alpha if alpha % 1 else int(alpha)),
        target_modules=targets,
        lora_dropout=section.lora_dropout,
        bias=section.bias,
        use_rslora=section.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
    )
    if targets == "all-linear":
        config.target_modules = _all_linear(anatomy)
    found = {name.rpartition(".")[2] for name in target_names(config, anatomy)}
    wanted = set() if isinstance(targets, str) else {t.rpartition(".")[2] for t in targets}
    if not linear_names(anatomy):
        raise UsageError(
            f"{anatomy.architecture} has no linear layers in its decoder layers, so LoRA has nothing to attach to.",
            safe="Nothing was loaded or written.",
            next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        )
    if not found or wanted - found:
        have = ", ".join(sorted({name.rpartition(".")[2] for name in linear_names(anatomy)}))
        raise UsageError(
            f"lora.target_modules: no linear layer is called {', '.join(sorted(wanted - found)) or targets}.",
            safe="Nothing was loaded or written.",
            next_step=f"Choose among {have}, or all-linear.",
        )
    _name_no_others(config, anatomy)
    return config


def _all_linear(anatomy: Anatomy) -> list[str]:
    """What all-linear means, as `target_modules`: the layers that are called as modules and that PEFT takes."""
    names = linear_names(anatomy)
    kind = getattr(anatomy.home.config, "model_type", None)
    refused = PEFT_REFUSES.get(str(kind), frozenset())
    idle = set[str]()
    shared = getattr(anatomy.config, "num_kv_shared_layers", None)  # Gemma 3n and 4: some keys are another layer's
    if shared or not {leaf_of(name) for name in names} <= ALWAYS_CALLED:
        idle = {f"{anatomy.layers_path}.{path}" for path in walked(anatomy).idle}
    partly = {leaf_of(name) for name in idle}
    left = [name for name in names if name not in idle and leaf_of(name) not in refused]
    return sorted({saved_name(name, anatomy) if leaf_of(name) in partly else leaf_of(name) for name in left})


def left_out(config: LoraConfig, anatomy: Anatomy) -> list[str]:
    """Last names of the linear layers that have no adapter, though all of them were asked for."""
    taken = target_names(config, anatomy)
    return sorted({leaf_of(name) for name in linear_names(anatomy) if name not in taken})


def leaf_of(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]


def _name_no_others(config: LoraConfig, anatomy: Anatomy) -> None:
    """Where PEFT would find more under these names in the class that the checkpoint names, name them by a pattern."""
    home = anatomy.home
    modules = home.modules or [name for name, _ in anatomy.skeleton.named_modules()]
    wanted = {saved_name(name, anatomy) for name in target_names(config, anatomy)}
    if {name for name in modules if name and check_target_module_exists(config, name)} == wanted:
        return
    config.target_modules = pattern_for(sorted(wanted), home.layers_path)
    if {name for name in modules if name and check_target_module_exists(config, name)} != wanted:
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))


def linear_names(anatomy: Anatomy) -> list[str]:
    """Full names of the linear layers inside the decoder layers."""
    return [
        f"{anatomy.layers_path}.{i}.{path}"
        for i, layer in enumerate(anatomy.layers)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]


def target_names(config: LoraConfig, anatomy: Anatomy) -> set[str]:
    """Full names of the linear layers that get an adapter, by PEFT's own rule, under their names here or in the class
    that the checkpoint names."""
    return {
        name
        for name in linear_names(anatomy)
        if check_target_module_exists(config, saved_name(name, anatomy)) or check_target_module_exists(config, name)
    }


def saved_name(name: str, anatomy: Anatomy) -> str:
    """A module's name in the class that the checkpoint names."""
    return anatomy.home.layers_path + name.removeprefix(anatomy.layers_path)


def require_fit(config: LoraConfig, state: Mapping[str, Tensor], anatomy: Anatomy, origin: str) -> None:
    """Refuse an adapter whose tensors are not those of a model, before its weights are read.

    Raises:
        IntegrityError: tensors are missing, left over, or of another shape; their counts are named.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    targets = target_names(config, anatomy)
    for i, layer in enumerate(anatomy.layers):
        for path, module in layer.named_modules():
            name = f"{anatomy.layers_path}.{i}.{path}"
            if not isinstance(module, nn.Linear):
                continue
            if name in targets:
                rank, _ = ranks_of(config, name)
                saved = saved_name(name, anatomy)
                wanted[peft_name(f"{saved}.lora_A")] = (rank, module.in_features)
                wanted[peft_name(f"{saved}.lora_B")] = (module.out_features, rank)
    biases = {name for name in state if name.endswith(".bias")} if config.bias != "none" else set()
    require_same({name: tensor for name, tensor in state.items() if name not in biases}, wanted, origin)
