"""Random models of the real shapes, assembled, and random documents for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.shapes import random_checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from drawplate.records import Sequence


def random_model(shape: str, placement: Placement, lora: dict[str, Any], *, layers: int | None = None) -> CausalLM:
    """A random model of a shape in its placement, the same at every call, with an adapter of the recipe's keys."""
    torch.manual_seed(0)
    checkpoint = random_checkpoint(shape, layers=layers, device=placement.device.type)
    section = LoraSection(**lora)
    return assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)  # type: ignore[arg-type]


def random_sequences(lengths: list[int], vocab: int) -> list[Sequence]:
    """Documents of random tokens, every one counted."""
    rng = np.random.default_rng(0)
    return [
        Sequence(
            index=i,
            document=str(i),
            input_ids=rng.integers(0, vocab, length).astype(np.int32),
            counted=np.ones(length, bool),
            text_bytes=length,
        )
        for i, length in enumerate(lengths)
    ]
