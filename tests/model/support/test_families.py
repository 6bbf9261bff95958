"""Families that are not Llama give the numbers of transformers and PEFT, or are refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from bench import families
from drawplate.errors import IntegrityError, UsageError
from drawplate.integrations.generation import generate
from drawplate.model.base.foreign import refusing
from drawplate.model.base.rotary import document_lengths
from drawplate.model.base.weights import open_checkpoint
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.self_check import self_check
from drawplate.model.support.walk import require_practical
from drawplate.recipe import ModelSection
from tests.model.conftest import COMMON, random_sequences

REFUSED = {
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


@pytest.mark.parametrize(
    ("name", "ways"), [("olmo_hybrid", {"keep padded", "recompute padded"}), ("zamba2", {"keep padded"})]
)
def test_weights_that_are_stored_otherwise_than_the_module_holds_them_are_read(
    name: str, ways: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tensors that the module holds as one; one tensor that two layers share."""
    monkeypatch.setattr(families, "WITH_PLAN", False)
    found = families.examine(name, tmp_path)
    assert found["outcome"] == "right", found
    assert set(found["differences"]) == ways, "its state goes from token to token, and shared layers are kept"


def test_a_part_that_transformers_would_join_is_missed_by_name(tmp_path: Path) -> None:
    families.write(tmp_path, "olmo_hybrid")
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(tmp_path)))
    del checkpoint.files["model.layers.1.linear_attn.k_conv1d.weight"]
    with pytest.raises(IntegrityError, match=r"lacks 1 tensors .* first model\.layers\.1\.linear_attn\.conv1d\.weight"):
        families.executor(checkpoint)


@pytest.mark.parametrize(
    ("name", "weights"), [("nanochat", "host"), ("olmo", "host"), ("mamba2", "host"), ("zamba2", "device")]
)
def test_text_is_what_transformers_generates(name: str, weights: str, tmp_path: Path) -> None:
    """No weight outside of the layers but embedding and head; a body that asks the head for its dtype; a cache of
    state."""
    kind = families.write(tmp_path, name)
    model = families.executor(open_checkpoint(ModelSection(name_or_path=str(tmp_path))), weights=weights, poison=True)
    base = kind.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids_BT = torch.randint(3, families.VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids_BT), "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(generate(model, ids_BT, **options), base.generate(ids_BT, **options))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_out_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[name]):
        require_practical(build_anatomy(families.tiny_config(name)))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("zaya", "ZayaExperts keeps a mixture of experts"),
        ("phimoe", "PhimoeExperts keeps a mixture of experts"),
        ("gemma3n_text", "Gemma3nTextDecoderLayer takes hidden states of 4 dimensions"),
    ],
)
def test_what_a_walk_shows_is_named(name: str, why: str, tmp_path: Path) -> None:
    families.write(tmp_path, name)
    with pytest.raises(UsageError, match=why) as refused:
        families.executor(open_checkpoint(ModelSection(name_or_path=str(tmp_path))))
    assert "Nothing was loaded or written." in str(refused.value)


def test_rows_of_the_layers_own_table_are_looked_up_by_token(tmp_path: Path) -> None:
    """Gemma 4 E2B and E4B with all the tokens that they have: from embeddings their body would search the table."""
    tokens = {"vocab_size": 2**18, "vocab_size_per_layer_input": 2**18}
    families.write(tmp_path, "gemma4_text", **tokens, hidden_size=16)
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(tmp_path)))
    found = self_check(families.executor(checkpoint), random_sequences([25, 11]), packed=True)
    assert (found.packed, found.missing, found.left_out) == (True, (), "")
    assert found.loss_difference is not None
    assert found.loss_difference < 1e-5
    assert found.gradient_difference is not None
    assert found.gradient_difference < 1e-3, "transformers' own gradient in float32 and in float64 differ by 4e-5"
    with pytest.raises(UsageError, match=r"neither streamed nor recomputed .* layer 0 changes shared_kv_states"):
        families.executor(checkpoint, activations="recompute")


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
