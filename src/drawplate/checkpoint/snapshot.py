"""The training state as a checkpoint's files, and back.

    adapter_model.safetensors, adapter_config.json   PEFT's format: a checkpoint is an adapter that other programs load
    optimizer.safetensors                            the moments and step of every trained tensor, as the optimizer
                                                     keeps them (8-bit moments stay 8-bit)
    best_adapter.safetensors                         of the lowest held-out loss so far, if there is one
    gradient.safetensors                             the sum so far, where a step is under way
    state.json                                       TrainState, and whatever the run adds about itself

Tensors are written and put back one at a time and go straight where they live, so that going on needs no more memory
than the run did.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from drawplate.checkpoint.write import Pieces, json_pieces, safetensors_pieces
from drawplate.data.batches import Cutting
from drawplate.errors import IntegrityError
from drawplate.model.base.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import Adapter
from drawplate.records import to_json
from drawplate.train.task import TrainState

OPTIMIZER_NAME = "optimizer.safetensors"
BEST_NAME = "best_adapter.safetensors"
GRADIENT_NAME = "gradient.safetensors"
STATE_NAME = "state.json"
NOT_WRITTEN = ("best_adapter", "mark")


def snapshot_files(
    adapter: Adapter, optimizer: torch.optim.Optimizer, state: TrainState, about: dict[str, Any]
) -> dict[str, Pieces]:
    """Everything that going on needs, file by file; tensors are fetched when they are written."""
    moments, scalars = optimizer_state(adapter, optimizer)
    values = {f.name: to_json(getattr(state, f.name)) for f in dataclasses.fields(state) if f.name not in NOT_WRITTEN}
    files: dict[str, Pieces] = {
        WEIGHTS_NAME: safetensors_pieces(adapter.named_tensors()),
        CONFIG_NAME: json_pieces(json.loads(json.dumps(adapter.config.to_dict(), sort_keys=True, default=sorted))),
        OPTIMIZER_NAME: safetensors_pieces(moments),
        STATE_NAME: json_pieces({"train": values, "optimizer_scalars": scalars, **about}),
    }
    if state.best_adapter is not None:
        files[BEST_NAME] = safetensors_pieces(state.best_adapter)
    if state.micro_batches:
        files[GRADIENT_NAME] = safetensors_pieces(gradients(adapter))
    return files


def optimizer_state(
    adapter: Adapter, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """What the optimizer keeps: tensors as `adapter name/key`, and plain numbers by adapter name and key."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in adapter.named_tensors().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The sum so far of a step that is under way, by adapter name."""
    return {name: p.grad for name, p in adapter.named_tensors().items() if p.grad is not None}


def read_about(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that was verified."""
    values: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
    return values


def restore(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put adapter, optimizer and gradients back as a verified checkpoint has them; its TrainState.

    Raises:
        IntegrityError: it belongs to another adapter.
    """
    about, adapter = read_about(folder), model.adapter
    adapter.load_state(load_file(folder / WEIGHTS_NAME), str(folder))
    model.forget_graphs()  # they were captured with the gradients that are let go here
    named = adapter.named_tensors()
    optimizer.state.clear()
    for name, scalars in about["optimizer_scalars"].items():
        optimizer.state[named[name]].update(scalars)
    for path, tensor in _tensors(folder / OPTIMIZER_NAME):
        name, _, key = path.rpartition("/")
        if name not in named:
            raise IntegrityError(f"{folder} has moments of {name}, which is not trained.", next_step="Start over.")
        optimizer.state[named[name]][key] = tensor.to(named[name].device)
    for parameter in named.values():
        parameter.grad = None
    if (folder / GRADIENT_NAME).is_file():
        for name, tensor in _tensors(folder / GRADIENT_NAME):
            named[name].grad = tensor.to(named[name].device)
    values = about["train"]
    cutting = Cutting(**values.pop("cutting")) if values["cutting"] else values.pop("cutting")
    best = load_file(folder / BEST_NAME) if (folder / BEST_NAME).is_file() else None
    state = TrainState(**values, cutting=cutting, best_adapter=best)
    if state.policies:
        model.set_policies(state.policies)
    return state


def _tensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            yield name, file.get_tensor(name)
