"""The check that every run makes of its own loss: it agrees where nothing is wrong, and sees what is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from drawplate.data.batches import Batch, cut_padded
from drawplate.errors import NumericError
from drawplate.model import self_check as module
from drawplate.model.self_check import REFUSED_TIMES, TOLERANCE, self_check, warning_of
from drawplate.model.storage import Storage
from tests.model.conftest import random_sequences, write_model
from tests.tiny import tiny_model


def one_row() -> Batch:
    return cut_padded(random_sequences([25]), 1, 1, 0)[0]


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp32", "bf16"])
@pytest.mark.parametrize("weights", ["device", "dequantized", "host"])
def test_it_agrees_with_transformers_on_the_stored_weights(base: Path, precision: str, weights: str) -> None:
    model = tiny_model(base, storage=Storage(precision), weights=weights)
    assert self_check(model, one_row()) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_it_follows_the_compute_dtype(base: Path, dtype: torch.dtype, tolerance: float) -> None:
    assert self_check(tiny_model(base, compute_dtype=dtype), one_row()) < tolerance
    assert self_check(tiny_model(base, compute_dtype=dtype, storage=Storage("nf4")), one_row()) < tolerance


@pytest.mark.parametrize("name", ["gemma2", "qwen2", "cohere", "granite", "phi"])
def test_other_architectures_agree_too(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / name, name)
    assert self_check(tiny_model(tmp_path / name, storage=Storage("nf4")), one_row()) < 1e-5


def test_a_layer_that_reads_wrong_weights_is_seen(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base, storage=Storage("nf4"))
    other = model.residency.acquire
    monkeypatch.setattr(model.residency, "acquire", lambda layer, **walk: other(0, **walk))
    assert self_check(model, one_row()) > 1e-3


def test_an_adapter_that_is_not_zero_is_seen(base: Path) -> None:
    model = tiny_model(base)
    with torch.no_grad():
        model.adapter.parameters()[1].fill_(0.5)
    assert self_check(model, one_row()) > 1e-3


def test_a_model_too_large_to_be_held_twice_is_not_checked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 1000)
    assert self_check(tiny_model(base), one_row()) is None


def test_a_loss_that_is_not_a_number_is_as_far_as_can_be(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base)
    monkeypatch.setattr(model, "sum_nats", lambda batch: (torch.tensor(math.nan), None))
    assert self_check(model, one_row()) == math.inf


def test_a_difference_is_let_pass_warned_of_or_refused(base: Path) -> None:
    model = tiny_model(base)
    tolerance = TOLERANCE[torch.float32]
    for difference in (None, 0.0, tolerance):
        assert warning_of(model, difference) == ""
    for difference in (1.01 * tolerance, REFUSED_TIMES * tolerance, math.nan):  # NaN: transformers' own is none
        assert warning_of(model, difference).startswith("Self-check: the loss on a short text differs")
    for difference in (1.01 * REFUSED_TIMES * tolerance, math.inf):
        with pytest.raises(NumericError, match=r"LlamaForCausalLM \(model type llama\) .* trained wrongly") as caught:
            warning_of(model, difference)
        assert (caught.value.safe, caught.value.exit_code) == ("Nothing was trained.", 6)
