"""Unsloth, through FastLanguageModel, in its own words; it is imported before transformers because it patches it.

It compiles each decoder layer by itself from torch 2.11 on, and picks its attention. With LoRA on q and v alone its
fused QKV product does not apply (it needs k too), as for any user with the mission's targets.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-compiled-"))

import unsloth  # noqa: I001 - before transformers and peft
import torch
from unsloth.models._utils import skip_checkpointing
from unsloth_zoo.block_swap import find_decoder_layers

from bench.peers.cases import Case, Setting
from bench.peers.fit import fit_kept_layers
from bench.peers.huggingface import PeftPeer
from bench.peers.material import load_lora
from bench.peers.memory import cap_allocator

LONGEST = 2048


class UnslothPeer(PeftPeer):
    """With Unsloth's own way to leave some layers out of its checkpointing."""

    setting: Setting

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(find_decoder_layers(self.model))

    def keep(self, count: int) -> None:
        """Keep the activations of `count` layers, evenly spaced, as `checkpoint_skip_layers=count` does."""
        for layer in find_decoder_layers(self.model):
            layer.__dict__.pop("_unsloth_skip_checkpoint", None)
        skip_checkpointing(self.model, count)

    def prepare(self, case: Case, two_steps: Any) -> dict[str, Any]:
        """Fit for a case, where the setting asks for it; what was decided."""
        if self.setting.options.get("keep") != "fit":
            return {}
        kept = fit_kept_layers(self, two_steps, lambda: cap_allocator(int((self.setting.budget_gib or 0) * 2**30)))
        return {"decided": {"kept_layers": kept}}


def load(folder: Path, setting: Setting) -> UnslothPeer:
    """A model with adapters, ready to train."""
    options: dict[str, Any] = setting.options
    checkpointing = options.get("checkpointing", "unsloth")
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=LONGEST,
        dtype=torch.bfloat16,
        load_in_4bit=options.get("bits", 4) == 4,
        load_in_16bit=options.get("bits", 4) == 16,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        local_files_only=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        **load_lora(folder),
        lora_dropout=setting.dropout,
        bias="none",
        use_gradient_checkpointing=checkpointing,
    )
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    peer = UnslothPeer(model, torch.device("cuda", 0), torch.bfloat16)
    peer.setting = setting
    return peer
