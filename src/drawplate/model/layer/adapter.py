"""LoRA: the trained tensors, in PEFT's names, PEFT's file format and with PEFT's own rule of which layers are targets.

PEFT decides what `target_modules` means and writes adapter_config.json; the tensors are ours, one dict a layer, in fp32
on the device. What is saved loads with `peft.PeftModel.from_pretrained`, and the number of tensors is checked at every
save, because an adapter that is silently empty costs a whole run.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drawplate.errors import IntegrityError, reason_of
from drawplate.model.base.adapter_config import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from drawplate.model.layer.adapter_home import require_loadable
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.host_adapter import HostAdapter

PREFIX = "base_model.model."


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
            peft_name(f"{self.layers_path}.{i}.{name}"): tensor
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
        require_same(state, {name: tuple(tensor.shape) for name, tensor in own.items()}, origin)
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


def require_same(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Refuse tensors that are not exactly those wanted, given as name -> shape.

    Raises:
        IntegrityError: tensors are missing, left over, or of another shape; their counts are named.
    """
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


def peft_name(name: str) -> str:
    """The name in PEFT's file of a trained tensor, like `...q_proj.lora_A` or `...q_proj.bias`."""
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
