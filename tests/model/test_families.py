"""Families that are not Llama give the numbers of transformers and PEFT, or are refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from bench import families
from drawplate.errors import UsageError
from drawplate.model.anatomy import build_anatomy
from drawplate.model.foreign import refusing
from drawplate.model.rotary import document_lengths
from drawplate.model.support import require_practical
from tests.model.conftest import COMMON

REFUSED = {
    "gemma4_text": "look embeddings of their own up by token",
    "mamba": "one token at a time",
    "bart": "decoder of an encoder-decoder model",
}


@pytest.mark.parametrize("name", ["phi3-longrope", "olmo", "smolvlm"])
def test_losses_and_gradients_are_those_of_transformers_and_peft(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables by document; outputs that are clipped in place; a text model under another name."""
    monkeypatch.setattr(families, "WITH_PLAN", False)
    found = families.examine(name, tmp_path)
    assert found["outcome"] == "right", found
    assert len(found["differences"]) == 4, "kept and recomputed, padded and packed"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_out_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[name]):
        require_practical(build_anatomy(families.tiny_config(name, vocab_size=2**16)))


def test_a_table_is_chosen_by_the_length_of_each_document() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    want = [[3, 3, 3, 2, 2, 4, 4, 4, 4], [7, 7, 7, 7, 7, 7, 7, 2, 2]]
    assert document_lengths(positions).tolist() == want


def test_an_error_in_a_librarys_code_refuses_the_architecture_and_ours_does_not() -> None:
    with (
        pytest.raises(UsageError, match=r"Nonesuch cannot be used: transformers's own code .*ValueError"),
        refusing("Nonesuch"),
    ):
        AutoConfig.for_model("nonesuch")
    with pytest.raises(ZeroDivisionError), refusing("Nonesuch"):
        1 / 0  # noqa: B018


def test_logits_that_are_multiplied_are_not_divided() -> None:
    scales = [
        build_anatomy(AutoConfig.for_model(name, **COMMON, logits_scaling=4.0)).logit_scale
        for name in ("hyperclovax", "granite")
    ]
    assert scales == [4.0, 0.25]
