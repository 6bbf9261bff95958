"""LoRA: the trained tensors, in PEFT's names, PEFT's file format and with PEFT's own rule of which layers are targets.

PEFT decides what `target_modules` means and writes adapter_config.json; the tensors are ours, one dict a layer, in fp32
on the device. What is saved loads with `peft.PeftModel.from_pretrained`, and the number of tensors is checked at every
save, because an adapter that is silently empty costs a whole run.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drawplate.errors import IntegrityError, UsageError, reason_of
from drawplate.model.base.adapter_config import CONFIG_NAME, WEIGHTS_NAME, ranks_of, read_adapter_config
from drawplate.model.footprint.body import walked
from drawplate.model.layer.adapter_home import pattern_for, require_loadable
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.host_adapter import HostAdapter
from drawplate.recipe import LoraSection

PREFIX = "base_model.model."
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


class Adapter:
    """The trained tensors of all layers.

    Args:
        config: PEFT's configuration.
        layers_path: the decoder layers' path in the class that the checkpoint names.
        shapes: for each layer, local name (`self_attn.q_proj.lora_A`) -> shape.
        seed: decides the initial A matrices, whatever the global RNG's state; B starts at zero.
        device: where layers are computed.
        on_host: keep the tensors in host memory; else they live on the device. In fp32 either way.
    """

    def __init__(
        self,
        config: LoraConfig,
        layers_path: str,
        shapes: list[dict[str, tuple[int, ...]]],
        *,
        seed: int,
        device: torch.device,
        on_host: bool = False,
    ) -> None:
        self.config, self.layers_path = config, layers_path
        self._aliases: list[dict[str, Tensor]] | None = None
        generator = torch.Generator().manual_seed(seed)
        home = torch.device("cpu") if on_host else device
        self.layers: list[dict[str, nn.Parameter]] = [
            {name: nn.Parameter(_initial(name, shape, generator).to(home)) for name, shape in layer.items()}
            for layer in shapes
        ]
        self.host = HostAdapter(self.layers, device) if on_host else None

    def of_layer(self, layer: int) -> Mapping[str, Tensor]:
        """A layer's trained tensors on the device; a visit of theirs, if they live on the host."""
        if self._aliases is not None:
            return self._aliases[layer]
        return self.layers[layer] if self.host is None else self.host.visit(layer)

    @contextmanager
    def aliased(self) -> Iterator[list[Tensor]]:
        """Within, layers see new leaves on the same memory; yields them in the order of `parameters()`.

        A leaf remembers the stream on which it was first used, and a captured one may not be the default stream.
        """
        self._aliases = [{name: p.detach().requires_grad_() for name, p in layer.items()} for layer in self.layers]
        try:
            yield [tensor for layer in self._aliases for tensor in layer.values()]
        finally:
            self._aliases = None

    def begin(self) -> None:
        """A new micro-batch: whatever the one before has left unfinished is dropped."""
        if self.host is not None:
            self.host.forget()

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Every trained tensor under the name PEFT saves it by."""
        return {
            _peft_name(f"{self.layers_path}.{i}.{name}"): tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor, in a fixed order."""
        return list(self.named_tensors().values())

    @property
    def parameter_count(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.parameters())

    def zero_gradients(self) -> None:
        """Every `grad` zero, in place where there are any: what adds to them may have been captured with them."""
        parameters = self.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if len(gradients) == len(parameters):
            torch._foreach_zero_(gradients)
            return
        flat = torch.zeros(self.parameter_count, device=parameters[0].device)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view(parameter.shape)

    def drop_gradients(self) -> None:
        """Give the gradients' memory back."""
        for parameter in self.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """A copy of the trained tensors in host memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.named_tensors().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Set the trained tensors.

        Raises:
            IntegrityError: a tensor is missing, left over, or of another shape.
        """
        own = self.named_tensors()
        _require_same(state, {name: tuple(tensor.shape) for name, tensor in own.items()}, origin)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write adapter_model.safetensors and adapter_config.json, then read the tensors' names back.

        Raises:
            IntegrityError: what was written is not what is trained.
        """
        save_adapter(folder, self.config, state if state is not None else self.state(), self.named_tensors())


def save_adapter(folder: Path, config: LoraConfig, state: dict[str, Tensor], trained: Collection[str]) -> None:
    """Write an adapter in PEFT's files, then read the tensors' names back.

    Raises:
        IntegrityError: what was written is not `trained`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.chmod(folder / WEIGHTS_NAME, 0o666 & ~_umask())
    written = load_file(folder / WEIGHTS_NAME)
    if written.keys() != set(trained) or not written:
        raise IntegrityError(
            f"{folder} holds {len(written)} adapter tensors where {len(trained)} were trained.",
            next_step="Please report this; the checkpoint before it is unharmed.",
        )


def require_adapter_loads(adapter: Adapter, anatomy: Anatomy, parent: Path) -> None:
    """Write an adapter as it would be saved to a folder that is removed, and load it there with PEFT.

    Raises:
        UsageError: PEFT does not take all of it on the class that the checkpoint names.
        IntegrityError: what was written is not what is trained.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=".trial-") as folder:
        adapter.save(Path(folder))
        require_loadable(Path(folder), anatomy.home, adapter.named_tensors())


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors, from PEFT's files; nothing in them is executed.

    Raises:
        UsageError: the folder holds no adapter, or one that computes more than Drawplate does.
        IntegrityError: it is damaged, only a pickle, or of a kind that is not LoRA.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise IntegrityError(
            f"{folder} has no {WEIGHTS_NAME}; other formats can run code when read and are not opened.",
            next_step="Save the adapter again as safetensors.",
        )
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{path} is damaged ({reason_of(error)}).",
            safe="Nothing was loaded or written.",
            next_step="Save or fetch the adapter again.",
        ) from None


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
                wanted[_peft_name(f"{saved}.lora_A")] = (rank, module.in_features)
                wanted[_peft_name(f"{saved}.lora_B")] = (module.out_features, rank)
    biases = {name for name in state if name.endswith(".bias")} if config.bias != "none" else set()
    _require_same({name: tensor for name, tensor in state.items() if name not in biases}, wanted, origin)


def _require_same(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], origin: str) -> None:
    missing, surplus = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & state.keys() if tuple(state[name].shape) != wanted[name])
    if not missing and not surplus and not reshaped:
        return
    counts = [(missing, "it lacks"), (surplus, "the model has no place for"), (reshaped, "have another shape:")]
    said = "; ".join(f"{words} {len(names)} (the first {names[0]})" for names, words in counts if names)
    raise IntegrityError(
        f"{origin} does not fit this model: of {len(wanted)} tensors that the model's adapter has, {said}.",
        safe="Nothing was measured or written.",
        next_step="Use the adapter with the base model that its adapter_config.json names.",
    )


def _peft_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{PREFIX}{path}.{leaf}.weight" if leaf.startswith("lora_") else f"{PREFIX}{path}.base_layer.{leaf}"


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    if name.endswith("lora_A"):
        bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as PEFT and nn.Linear
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.zeros(shape)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
