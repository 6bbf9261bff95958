"""Tiny random models of many architectures, saved as checkpoints, and batches for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.recipe import ModelSection
from drawplate.records import Sequence

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "llama-untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window_pattern": 2,
    },
    "phi": {"num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
}


def write_model(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Checkpoint:
    """A random model of an architecture, saved and opened again as a checkpoint."""
    config = AutoConfig.for_model(name.removesuffix("-untied"), **{**COMMON, **ARCHITECTURES[name], **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return open_checkpoint(ModelSection(name_or_path=str(folder)))


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    return write_model(tmp_path / "llama", "llama")


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences([17, 5, 30, 9, 2, 23])


def random_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [
        Sequence(
            index=i,
            document=f"doc-{i}",
            input_ids=rng.integers(3, VOCAB, n).astype(np.int32),
            counted=np.ones(n, dtype=bool),
            text_bytes=3 * n,
        )
        for i, n in enumerate(lengths)
    ]
