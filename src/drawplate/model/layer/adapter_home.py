"""The class on which other programs load an adapter, and whether PEFT really takes what is written for it.

A checkpoint's configuration names its class. Of a model for text and images that is the whole of it, whose decoder
layers lie deeper (`model.language_model.layers`) and whose towers have layers of the same names: an adapter that is
named by the text model alone loads there without an error and without an effect. So names are those of the class that
the checkpoint names, and before training PEFT itself loads a written adapter on that class, built without memory on the
meta device, and every tensor is counted.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from drawplate.errors import UsageError, reason_of

NAMED = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Home:
    """Where adapters of a model are loaded.

    Attributes:
        config: of the checkpoint, towers included.
        kind: the class that it names.
        layers_path: of the decoder layers in that class.
        modules: names of all its modules; empty where it is the class that is trained here.
    """

    config: PretrainedConfig
    kind: Any
    layers_path: str
    modules: tuple[str, ...] = ()


_homes: dict[str, Home] = {}


def home_of(config: PretrainedConfig, skeleton: nn.Module, layers_path: str) -> Home:
    """Where adapters go for this checkpoint; the skeleton's own class where the checkpoint names no other."""
    kind = _named_class(config)
    if kind is None or kind is type(skeleton):
        return Home(config, type(skeleton), layers_path)
    key = f"{kind.__name__} {config.to_json_string(use_diff=False)}"
    if key not in _homes:
        layers = skeleton.get_submodule(layers_path)
        assert isinstance(layers, nn.ModuleList)
        _homes[key] = _home(kind, config, layers)
    return _homes[key]


def _home(kind: Any, config: PretrainedConfig, layers: nn.ModuleList) -> Home:
    module = _built(kind, config)
    same = [
        path
        for path, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) == len(layers) and type(found[0]) is type(layers[0])
    ]
    if len(same) != 1:
        raise UsageError(
            f"{kind.__name__}, which the checkpoint names, holds {len(same)} stacks of {len(layers)} "
            f"{type(layers[0]).__name__} where its text model has one, so an adapter cannot be named for it.",
            safe="Nothing was loaded or written.",
            next_step="Choose the text-only version of this model, or another base model.",
        )
    return Home(config, kind, same[0], tuple(name for name, _ in module.named_modules()))


def _named_class(config: PretrainedConfig) -> Any:
    """The class that the checkpoint names, else the one that transformers' own tables give; None without any."""
    known = {name for table in NAMED for name in table.values()}
    named = [name for name in config.architectures or () if name in known]
    tables = [table[config.model_type] for table in NAMED if config.model_type in table]
    return next((getattr(transformers, name) for name in [*named, *tables] if hasattr(transformers, name)), None)


def _built(kind: Any, config: PretrainedConfig) -> nn.Module:
    try:
        with torch.device("meta"):
            module: nn.Module = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # whatever an architecture's own code may raise, or lack
        raise UsageError(
            f"transformers cannot build {kind.__name__}, which the checkpoint names: {reason_of(error)}.",
            safe="Nothing was loaded or written.",
            next_step="Install what it asks for, or choose another base model.",
        ) from None
    return module


def pattern_for(names: Sequence[str], layers_path: str) -> str:
    """A pattern for PEFT's `target_modules` that fits these modules of the decoder layers and nothing else."""
    local = sorted({name.removeprefix(f"{layers_path}.").partition(".")[2] for name in names})
    return rf"{re.escape(layers_path)}\.\d+\.({'|'.join(map(re.escape, local))})"


def require_loadable(folder: Path, home: Home, trained: Mapping[str, Tensor]) -> None:
    """Load the adapter in `folder` with PEFT on the class that the checkpoint names, and count.

    Raises:
        UsageError: PEFT does not take every one of the tensors, or has room for others.
    """
    base = _built(home.kind, home.config)
    with torch.device("cpu"), _quiet() as said:
        try:
            model = PeftModel.from_pretrained(
                base, str(folder), low_cpu_mem_usage=True, torch_device="cpu", autocast_adapter_dtype=False
            )
        except Exception as error:  # whatever PEFT may raise of names and shapes
            raise _not_taken(home, str(error).partition("\n")[0][:300]) from None
    theirs = {name for name, _ in model.named_parameters()}
    named = [name for name in trained if _in_peft(name) in theirs]
    room, written = (sum(".lora_" in name for name in names) for names in (theirs, trained))
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    if len(named) < len(trained) or room != written or missing:
        raise _not_taken(home, f"of {len(trained)} tensors it knows {len(named)}, and it has room for {room}")


def _in_peft(name: str) -> str:
    """Of a saved tensor, the name of the parameter that holds it once it is loaded."""
    return re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name)


def _not_taken(home: Home, why: str) -> UsageError:
    return UsageError(
        f"PEFT does not load the adapter of this run on {home.kind.__name__}: {why}.",
        safe="Nothing was trained.",
        next_step="Name other layers in lora.target_modules, or choose another base model.",
    )


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """What PEFT and transformers say on the way, for the caller instead of the screen."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logging.disable(logging.WARNING)
        try:
            yield said
        finally:
            logging.disable(logging.NOTSET)
