"""Drawplate, with an explicit placement: the parts that a run uses, without the run's folder, journal and evaluation.

A setting's options are Placement's words; `keep: fit` keeps as many layers' activations as fit (fit.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers.cases import Setting
from bench.peers.material import load_lora
from bench.peers.stepping import Documents, Scale
from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.model.adapter import lora_config
from drawplate.model.assemble import assemble
from drawplate.model.causal_lm import CausalLM, Placement
from drawplate.model.frozen import Storage
from drawplate.model.weights import open_checkpoint
from drawplate.recipe import LoraSection, ModelSection
from drawplate.records import Sequence

PAD_MULTIPLE = 16


class DrawplatePeer:
    """An assembled CausalLM; `Peer` of stepping.py."""

    fp16 = False

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.device = model.placement.device
        self.adapter = model.adapter.named_tensors()
        self._lora_dropout = model.adapter.config.lora_dropout
        self._calls = 0

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.model.anatomy.layers)

    def keep(self, count: int) -> None:
        """Keep the activations of the last `count` layers and recompute the others."""
        self.model.runner.policies[:] = ["recompute"] * (self.layers - count) + ["keep"] * count

    def backward(
        self, documents: Documents, share: float, *, dropout: float, packed_tokens: int, scale: Scale
    ) -> Tensor:
        """As in Peer.

        Raises:
            ValueError: a dropout other than the adapter's or none.
        """
        if dropout not in (0.0, self._lora_dropout):
            raise ValueError(f"was loaded with dropout {self._lora_dropout:g}")
        self._calls += 1
        batches = cut(documents, packed_tokens)
        counted = sum(batch.counted_tokens for batch in batches)
        nats = torch.zeros((), device=self.device)
        for batch in batches:
            loss, nats_N = self.model.sum_nats(
                batch, scale=share * float(scale) / counted, dropout_seed=(0, self._calls) if dropout else None
            )
            loss.backward()
            nats = nats + nats_N.sum()
        return nats / counted


def cut(documents: Documents, packed_tokens: int) -> list[Batch]:
    """Drawplate's own micro-batches: one padded, or packed rows."""
    sequences = [
        Sequence(
            index=i,
            document=str(i),
            input_ids=ids.astype(np.int32),
            counted=np.ones(len(ids), bool),
            text_bytes=len(ids),
        )
        for i, ids in enumerate(documents)
    ]
    if packed_tokens:
        return cut_packed(sequences, packed_tokens, PAD_MULTIPLE, 0)
    return cut_padded(sequences, len(sequences), PAD_MULTIPLE, 0)


def load(folder: Path, setting: Setting) -> DrawplatePeer:
    """The model in its placement, with a fresh adapter."""
    os.environ.setdefault("DRAWPLATE_CACHE", str(folder / "cache"))
    options: dict[str, Any] = dict(setting.options)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(folder)))
    if options.pop("keep", ""):
        options["activations"] = "recompute"
    placement = Placement(
        device=device,
        storage=Storage(options.pop("precision", "bf16")),
        compute_dtype=getattr(torch, options.pop("compute", "bfloat16")),
        compiled=options.pop("compiled", device.type == "cuda"),
        **options,
    )
    section = LoraSection(**load_lora(folder), lora_dropout=setting.dropout)
    model = assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)
    return DrawplatePeer(model)
