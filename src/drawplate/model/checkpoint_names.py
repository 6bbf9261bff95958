"""The tensors that a model is made of, and how a checkpoint calls them; what is missing is refused before reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from drawplate.errors import IntegrityError
from drawplate.model.anatomy import Anatomy
from drawplate.model.frozen import FrozenLinear
from drawplate.model.tables import kept_buffers
from drawplate.model.weights import Checkpoint


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
    yield f"{anatomy.embedding_path}.weight"
    if not anatomy.tied:
        yield f"{anatomy.head_path}.weight"


class CheckpointNames:
    """Finds the skeleton's tensors in a checkpoint.

    It may have been saved with or without the `model.` prefix, inside a model for text and images, or with GPT-NeoX's
    old name of the head.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
        self.checkpoint = checkpoint
        self.skeleton: Any = anatomy.skeleton
        self.prefix = f"{anatomy.skeleton.base_model_prefix}."
        self.architecture = anatomy.architecture
        self._renamed: dict[str, str] | None = None

    def name_of(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, None where it has none."""
        bare = name.removeprefix(self.prefix)
        candidates = [name, bare, self.prefix + name]
        candidates += [f"language_model.{name}", f"model.language_model.{bare}", f"model.text_model.{bare}"]
        if name == "lm_head.weight":
            candidates += ["embed_out.weight"]
        found = next((candidate for candidate in candidates if candidate in self.checkpoint.files), None)
        return found or next((self._by_rule[c] for c in candidates if c in self._by_rule), None)

    @property
    def _by_rule(self) -> dict[str, str]:
        """transformers' own rules for names that changed (get_model_conversion_mapping): new name -> name on disk."""
        if self._renamed is None:
            rules = [rule for rule in get_model_conversion_mapping(self.skeleton) if type(rule) is WeightRenaming]
            self._renamed = {_renamed(name, rules): name for name in self.checkpoint.files}
        return self._renamed

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


def _renamed(name: str, rules: Sequence[WeightRenaming]) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name
