"""Text from a `CausalLM`, by transformers' own `generate` on transformers' own module.

The module's decoder layers are ExecutedLayers already, so each layer is called with its own weights, wherever they
live, and the cache passes through. Only its two ends are lent for the time of the call: an embedding that looks rows
up where the table is, and a head that goes chunk by chunk. Streamed weights cross the bus once for each new token.

Left out: prompts of different lengths in one call, because 'drawplate' attention knows no padding on the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.errors import UsageError
from drawplate.integrations.head_outputs import raw_logits
from drawplate.model.causal_lm import CausalLM


@torch.no_grad()
def generate(model: CausalLM, input_ids_BT: Tensor, **options: Any) -> Any:
    """What transformers' `generate` returns, on the model's device; dropout is off.

    Args:
        model: with whatever adapter it has now.
        input_ids_BT: prompts, all of the same length.
        **options: `generation_config`, `max_new_tokens`, `do_sample`, `temperature` and the like.

    Raises:
        UsageError: prompts that are padded.
    """
    skeleton = model.anatomy.skeleton
    mask_BT = options.pop("attention_mask", None)
    if mask_BT is None:
        mask_BT = _mask_of(input_ids_BT, options.get("generation_config") or skeleton.generation_config)
    if not bool(mask_BT.all()):
        raise UsageError(
            "The prompts are padded, which generation here does not know how to leave out.",
            next_step="Generate for one prompt at a time, or for prompts with the same number of tokens.",
        )
    model.runner.begin(None)
    device = model.placement.device
    options = {"use_cache": True, **options, "attention_mask": torch.ones_like(mask_BT).to(device)}
    with _ends_lent(model):
        return skeleton.generate(input_ids_BT.to(device), **options)  # type: ignore[operator]


def _mask_of(input_ids_BT: Tensor, config: Any) -> Tensor:
    """transformers' own guess: pad tokens in a prompt are padding, unless they also end texts."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(input_ids_BT)
    return input_ids_BT.ne(config.pad_token_id).long()


@contextmanager
def _ends_lent(model: CausalLM) -> Iterator[None]:
    anatomy = model.anatomy
    ends = {anatomy.embedding_path: _Embedding(model), anatomy.head_path: _Head(model)}
    own = {path: anatomy.skeleton.get_submodule(path) for path in ends}
    try:
        for path, module in ends.items():
            _put(anatomy.skeleton, path, module)
        yield
    finally:
        for path, module in own.items():
            _put(anatomy.skeleton, path, module)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


class _Embedding(nn.Module):
    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self._model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self._model.embed(ids_BT)


class _Head(nn.Module):
    """Scale and soft cap are left to the module around it.

    Its empty weight answers who asks a head for its dtype (Mamba 2), or the whole model for its device where it has no
    parameter of its own: norms without weights (NanoChat, OLMo 1).
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self._model = model
        place = model.placement
        self.weight = nn.Parameter(torch.empty(0, dtype=place.compute_dtype, device=place.device), requires_grad=False)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        logits_NV = raw_logits(hidden_BTH.flatten(0, -2), self._model.head)
        return logits_NV.unflatten(0, hidden_BTH.shape[:-1])
