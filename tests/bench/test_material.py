"""The comparison's random model: its first loss is that of knowing nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.peers import material

HIDDEN, VOCABULARY = 3072, 4096
"""As wide as the 3B, because a token's own logit grows with the width; the rest is small."""


def drawn(folder: Path, *, tied: bool) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(folder)
    material._save_weights(folder, config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance_from_knowing_nothing(folder: Path, *, tied: bool) -> float:
    ids = torch.randint(0, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return abs(float(drawn(folder, tied=tied)(ids, labels=ids).loss) - math.log(VOCABULARY))


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_that_of_knowing_nothing(tied: bool, tmp_path: Path) -> None:
    assert distance_from_knowing_nothing(tmp_path, tied=tied) < 0.3


def test_a_tied_head_that_sees_its_own_embedding_above_all_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(material, "LAST_NORM", 1.0)
    assert distance_from_knowing_nothing(tmp_path, tied=True) > 20
