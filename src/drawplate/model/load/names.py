"""The tensors that a model is made of, and how a checkpoint calls them.

What is missing, and what is left over, is refused by name before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from drawplate.errors import IntegrityError
from drawplate.model.base.tables import kept_buffers
from drawplate.model.base.weights import Checkpoint
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import FrozenLinear

COMPUTED = (
    r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)position_ids$",
    r"\.masked_bias$",
    r"(^|\.)mtp(\.|_|$)",
)
"""Names of tensors that code computes, or that only predicting several tokens at once needs."""
MASK, MASK_DIMENSIONS = re.compile(r"\.(attn|attention)\.bias$"), 4
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PREDICTS_MORE = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def wanted_names(anatomy: Anatomy) -> Iterator[str]:
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
            yield from (f"{prefix}.{name}" for name in kept_buffers(module))
    inside = {id(module) for layer in anatomy.layers for module in layer.modules()}
    head = anatomy.skeleton.get_submodule(anatomy.head_path)
    for path, module in anatomy.skeleton.named_modules():
        if id(module) not in inside:
            own = [*(name for name, _ in module.named_parameters(recurse=False)), *kept_buffers(module)]
            named = (name for name in own if not (anatomy.tied and module is head and name == "weight"))
            yield from (f"{path}.{name}".lstrip(".") for name in named)


class CheckpointNames:
    """Finds the skeleton's tensors in a checkpoint.

    It may have been saved with or without the `model.` prefix, inside a model for text and images, or with GPT-NeoX's
    old name of the head.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
        self.checkpoint, self.anatomy = checkpoint, anatomy
        self.skeleton: Any = anatomy.skeleton
        self.prefix = f"{anatomy.skeleton.base_model_prefix}."
        self.architecture = anatomy.architecture
        self._renamed: dict[str, str] | None = None
        self._known_rules: list[Any] | None = None

    def name_of(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, None where it has none; tied ones (Zamba 2) share one."""
        bare = name.removeprefix(self.prefix)
        candidates = [name, bare, self.prefix + name]
        candidates += [f"language_model.{name}", f"model.language_model.{bare}", f"model.text_model.{bare}"]
        if name == "lm_head.weight":
            candidates += ["embed_out.weight"]
        found = next((candidate for candidate in candidates if candidate in self.checkpoint.files), None)
        found = found or next((self._by_rule[c] for c in candidates if c in self._by_rule), None)
        source = None if found else getattr(self.skeleton, "all_tied_weights_keys", {}).get(name)
        return self.name_of(source) if source else found

    def _joined(self, name: str) -> tuple[list[str], int] | None:
        """(the checkpoint's tensors that transformers joins into this one, along which dimension), None without such
        a rule (OLMo hybrid: three convolutions that are one in the module)."""
        for rule in self._rules:
            if type(rule) is not WeightConverter or [type(step) for step in rule.operations] != [Concatenate]:
                continue
            target = rule.target_patterns[0]
            if name.endswith(target):
                parts = [self.name_of(name.removesuffix(target) + source) for source in rule.source_patterns]
                if all(parts):
                    return [part for part in parts if part], rule.operations[0].dim  # type: ignore[attr-defined]
        return None

    def _places(self, name: str) -> list[str]:
        """Every tensor of the checkpoint that this one is made of; empty where it lacks any."""
        found = self.name_of(name)
        if found is not None:
            return [found]
        joined = self._joined(name)
        return joined[0] if joined else []

    @property
    def _rules(self) -> list[Any]:
        """transformers' own rules for what a checkpoint calls and holds in another way than the module."""
        if self._known_rules is None:
            self._known_rules = list(get_model_conversion_mapping(self.skeleton))
        return self._known_rules

    @property
    def _by_rule(self) -> dict[str, str]:
        """For names that changed: new name -> name on disk."""
        if self._renamed is None:
            rules = [rule for rule in self._rules if type(rule) is WeightRenaming]
            self._renamed = {_renamed(name, rules): name for name in self.checkpoint.files}
        return self._renamed

    def require_all(self, wanted: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks tensors, before anything is read.

        Raises:
            IntegrityError: it lacks some; the first is named.
        """
        missing = [name for name in wanted if not self._places(name)]
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

    def require_accounted(self, wanted: Iterable[str]) -> None:
        """Refuse a checkpoint with tensors that the model does not read and that are not known to change nothing.

        Raises:
            IntegrityError: it does; they are counted and the first is named.
        """
        tied = [f"{self.anatomy.head_path}.weight"] if self.anatomy.tied else []
        places = {name: self._places(name) for name in (*wanted, *tied)}
        found = {name: keys[0] for name, keys in places.items() if len(keys) == 1}
        read = {key for keys in places.values() for key in keys}
        surplus = sorted(key for key in self.checkpoint.files if key not in read and not self._is_inert(key, read))
        surplus = [key for key in surplus if not self._is_beside_the_text(key, found)]
        if not surplus:
            return
        raise IntegrityError(
            f"{self.checkpoint.name} holds {len(surplus)} tensors that {self.architecture} with this config.json does"
            f" not read, the first {surplus[0]}: it is another model than its configuration says.",
            safe="Nothing was loaded or written.",
            next_step="Correct config.json (layers, biases, head). If the model is meant without these tensors, load"
            " and save it once with transformers' from_pretrained and save_pretrained.",
        )

    def _is_inert(self, key: str, read: set[str]) -> bool:
        """Whether a tensor is known to change nothing: tables and masks that are computed, what transformers itself
        leaves out, layers for predicting several tokens, what bitsandbytes keeps beside a weight."""
        theirs = getattr(self.skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        if any(re.search(pattern, key) for pattern in (*COMPUTED, *theirs)):
            return True
        weight = key.partition(".weight.")[0] + ".weight"
        beside = key.removesuffix("SCB").removesuffix("weight_format") + "weight"
        if weight in read or (key.endswith(("SCB", "weight_format")) and beside in read):
            return True
        config, layer = self.anatomy.config, LAYER.search(key)
        more = max((getattr(config, name, None) or 0) for name in PREDICTS_MORE)
        if layer and 0 <= int(layer[1]) - config.num_hidden_layers < more:
            return True
        return bool(MASK.search(key)) and self.checkpoint.dimensions(key) == MASK_DIMENSIONS

    def _is_beside_the_text(self, key: str, found: dict[str, str]) -> bool:
        """Whether a tensor of a model for text and images, or sound, is of a part that is not its text model."""
        if self.checkpoint.config.get_text_config() is self.checkpoint.config:
            return False
        bare = {name.removeprefix(self.prefix): where for name, where in found.items()}
        parts = {name.partition(".")[0] for name in bare}
        roots = {where.removesuffix(name) for name, where in bare.items() if where.endswith(name)}
        rest = (key.removeprefix(root) for root in roots if key.startswith(root))
        return not any(name.partition(".")[0] in parts for name in rest)

    def read(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """One tensor.

        Raises:
            IntegrityError: the checkpoint has none of that name, or of another shape than `shape`.
        """
        places = self._places(name)
        if not places:
            raise IntegrityError(
                f"{self.checkpoint.name} has no tensor {name}, which its configuration asks for.",
                safe="Nothing was trained or written.",
                next_step="Fetch the model again, or choose one in transformers' own format.",
            )
        joined = self._joined(name) if len(places) > 1 else None
        parts = [self.checkpoint.read(place) for place in places]
        tensor = torch.cat(parts, dim=joined[1]) if joined else parts[0]
        if tensor.element_size() == 1 and tensor.dtype != torch.bool:
            raise IntegrityError(
                f"{self.checkpoint.name}: {name} is stored as {tensor.dtype}: a code, and no weight.",
                safe="Nothing was trained or written.",
                next_step="Set quantization.precision: auto, or start from the unquantized model.",
            )
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


def _renamed(name: str, rules: Sequence[WeightRenaming]) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name
