"""The check that every run makes of its own loss and gradient: it agrees where nothing is wrong, and sees what is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from drawplate.errors import NumericError, UsageError
from drawplate.model.base.precision import Storage
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load import assemble as assembling
from drawplate.model.load import self_check as module
from drawplate.model.load.self_check import in_words, self_check, warnings_of
from drawplate.model.load.twin import Twin
from drawplate.records import SelfCheck
from tests.model.conftest import ARCHITECTURES, random_sequences, write_model
from tests.model.support.test_walk import GEMMA_4
from tests.tiny import tiny_model

TEXTS = random_sequences([25, 11])
MOVED = {"activations": "recompute", "weights": "host"}


def check(model: CausalLM, *, packed: bool = True, **room: int) -> SelfCheck:
    return self_check(model, TEXTS, packed=packed, **room)


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp32", "bf16"])
@pytest.mark.parametrize("weights", ["device", "dequantized", "host"])
def test_it_agrees_with_transformers_on_the_stored_weights(base: Path, precision: str, weights: str) -> None:
    model = tiny_model(base, storage=Storage(precision), weights=weights)
    found = check(model)
    assert found.loss_difference < 1e-5
    assert found.gradient_difference < 1e-4
    assert found.tensor_difference < 1e-4
    assert warnings_of(model, found) == []
    assert "36 tokens, packed" in in_words(found)


@pytest.mark.parametrize("activations", ["host", "recompute", "offload", ("recompute", "keep")])
@pytest.mark.parametrize("adapter", ["device", "host"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_policy_agrees(base: Path, activations: str, adapter: str, packed: bool) -> None:
    model = tiny_model(base, activations=activations, adapter=adapter, weights="host", poison=True, head_rows=64)
    found = check(model, packed=packed)
    assert (found.packed, found.missing, found.left_out) == (packed, (), "")
    assert found.gradient_difference < 1e-4


@pytest.mark.parametrize(
    ("dtype", "precision", "loss", "gradient"),
    [
        (torch.bfloat16, "bf16", 1e-2, 0.1),
        (torch.bfloat16, "nf4", 1e-2, 0.1),
        (torch.float16, "nf4", 2e-3, 2e-2),
        (torch.float32, "fp8", 1e-2, 0.5),
    ],
)
def test_it_follows_the_compute_dtype(
    base: Path, dtype: torch.dtype, precision: str, loss: float, gradient: float
) -> None:
    model = tiny_model(base, storage=Storage(precision), compute_dtype=dtype, **MOVED)
    found = check(model)
    assert found.loss_difference < loss
    assert 1e-5 < found.gradient_difference < gradient
    assert found.kept_difference == 0.0, "the same products in another order of time"
    assert warnings_of(model, found) == []


@pytest.mark.parametrize("name", ["gemma2", "qwen2", "cohere", "granite", "phi"])
def test_other_architectures_agree_too(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / name, name)
    found = check(tiny_model(tmp_path / name, storage=Storage("nf4"), activations="recompute"))
    assert found.loss_difference < 1e-5
    assert found.gradient_difference < 1e-4


def test_layers_that_share_keys_agree_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 E2B in small: heads of two sizes, shared keys and values, an embedding for each layer. In full size it is
    refused, because its body would look for each embedding in the whole table."""
    monkeypatch.setattr(assembling, "require_practical", lambda anatomy: None)
    monkeypatch.setitem(ARCHITECTURES, "gemma4_text", {**GEMMA_4, "global_head_dim": 16})
    write_model(tmp_path / "e2b", "gemma4_text")
    found = check(tiny_model(tmp_path / "e2b"))
    assert found.loss_difference < 1e-5
    assert found.gradient_difference < 1e-4
    with pytest.raises(UsageError, match="layer 0 changes shared_kv_states"):
        tiny_model(tmp_path / "e2b", activations="recompute")


def test_the_adapter_and_the_generators_are_as_before(base: Path) -> None:
    model = tiny_model(base)
    before, generator = model.adapter.state(), torch.random.get_rng_state()
    check(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.adapter.state().items())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.adapter.parameters())


def test_a_layer_that_reads_wrong_weights_is_seen(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base, storage=Storage("nf4"))
    other = model.residency.acquire
    monkeypatch.setattr(model.residency, "acquire", lambda layer, **walk: other(0, **walk))
    with pytest.raises(NumericError, match="the loss on a short text differs"):
        warnings_of(model, check(model))


def test_transformers_module_that_fails_leaves_the_gradient_with_kept_activations(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise TypeError("forward() got an unexpected argument")

    monkeypatch.setattr(Twin, "gradients", fails)
    found = check(tiny_model(base, **MOVED))
    assert found.kept_difference == 0.0
    assert found.left_out == "transformers' own module: forward() got an unexpected argument"


def test_documents_that_would_mix_are_checked_in_rows_of_their_own(base: Path) -> None:
    model = tiny_model(base)
    model.unpackable = "layer 0 carries state"
    assert not check(model).packed


def test_a_loss_that_is_not_a_number_is_as_far_as_can_be(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base)
    own = model.sum_nats

    def none(batch: Any, **_: Any) -> Any:
        loss, nats_N = own(batch)
        return loss * math.nan, nats_N

    monkeypatch.setattr(model, "sum_nats", none)
    found = check(model)
    assert (found.loss_difference, found.gradient_difference) == (math.inf, math.inf)
    half = tiny_model(base, compute_dtype=torch.float16)
    monkeypatch.setattr(module, "_finite", lambda tensors: False)
    assert "fp16" in check(half).left_out


def test_a_difference_is_let_pass_warned_of_or_refused(base: Path) -> None:
    model = tiny_model(base)
    for name in ("loss_difference", "gradient_difference"):
        tolerance = 1e-3
        for difference in (None, 0.0, tolerance):
            assert warnings_of(model, SelfCheck(**{name: difference})) == []
        for difference in (1.01 * tolerance, 5 * tolerance):
            assert warnings_of(model, SelfCheck(**{name: difference}))[0].startswith("Self-check: the ")
        for difference in (5.01 * tolerance, math.inf):
            with pytest.raises(
                NumericError, match=r"LlamaForCausalLM \(model type llama\) .* trained wrongly"
            ) as caught:
                warnings_of(model, SelfCheck(**{name: difference}))
            assert (caught.value.safe, caught.value.exit_code) == ("Nothing was trained.", 6)
        # transformers' own is not a number
        assert warnings_of(model, SelfCheck(**{name: math.nan})) != []
