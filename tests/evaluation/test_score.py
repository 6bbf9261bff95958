"""Held-out sums against transformers' own loss, however the windows are cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import drawplate.model.causal_lm as causal_lm
from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.data.tokens import load_tokenizer, tokenize
from drawplate.errors import NumericError
from drawplate.evaluation.score import score_documents, total
from drawplate.model.ends.loss import head_cross_entropy
from drawplate.records import Document, Sequence
from tests.model.conftest import random_sequences
from tests.tiny import texts, tiny_model, write_base


@pytest.fixture(scope="module")
def windows(base: Path) -> tuple[Sequence, ...]:
    """Real text, in windows of at most 16 tokens: most documents have several."""
    documents = [Document(name=f"t{i}", text=text, sha256=str(i)) for i, text in enumerate(texts(9))]
    return tokenize(documents, load_tokenizer(base), 16).sequences


def cuts(sequences: tuple[Sequence, ...]) -> dict[str, list[Batch]]:
    return {
        **{f"padded {n}": cut_padded(sequences, n, 16, 0) for n in (1, 2, 5, 100)},
        **{f"packed {n}": cut_packed(sequences, n, 16, 0) for n in (16, 64, 4096)},
    }


def test_every_micro_batch_size_gives_the_loss_that_transformers_gives(base: Path, windows) -> None:
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    want: dict[str, float] = {}
    with torch.no_grad():
        for window in windows:
            ids = torch.from_numpy(window.input_ids[None]).long()
            nats = float(reference(ids, labels=ids).loss) * (len(window) - 1)
            want[window.document] = want.get(window.document, 0.0) + nats
    model = tiny_model(base)
    for name, batches in cuts(windows).items():
        scores = score_documents(model, windows, batches)
        assert {s.document: s.nats for s in scores} == pytest.approx(want, rel=1e-5), name
        assert total(scores).loss == pytest.approx(sum(want.values()) / sum(len(w) - 1 for w in windows), rel=1e-5)
        assert [s.document for s in scores] == list(want), "in order of first appearance"
        assert sum(s.bytes for s in scores) == sum(w.text_bytes for w in windows)


def test_a_mean_over_micro_batches_would_differ(base: Path, windows) -> None:
    """The negative control: the mistake that sums prevent is larger than the tolerance above."""
    model = tiny_model(base)
    means = []
    with torch.no_grad():
        for batch in cut_padded(windows, 5, 16, 0):
            means.append(float(model.sum_nats(batch)[0]) / batch.counted_tokens)
    assert np.mean(means) != pytest.approx(
        total(score_documents(model, windows, cuts(windows)["padded 5"])).loss, rel=1e-4
    )


def test_tokens_that_are_not_counted_are_in_no_sum(base: Path) -> None:
    plain = random_sequences([20, 12])
    masked = [replace(s, counted=np.arange(len(s)) >= len(s) - 4) for s in plain]
    scores = score_documents(tiny_model(base), masked, cut_packed(masked, 64, 16, 0))
    assert [s.tokens for s in scores] == [4, 4]
    every = score_documents(tiny_model(base), plain, cut_packed(plain, 64, 16, 0))
    assert all(few.nats < all_.nats for few, all_ in zip(scores, every, strict=True))


def test_dropout_and_gradients_are_off(base: Path, windows) -> None:
    model = tiny_model(base)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.normal_(0, 0.1)
    batches = cuts(windows)["packed 64"]
    assert score_documents(model, windows, batches) == score_documents(model, windows, batches)
    assert all(parameter.grad is None for parameter in model.adapter.parameters())


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


VOCAB, TOKENS = 4096, 64 * 40
LOGITS_BYTES = VOCAB * TOKENS * 4


def largest_tensor(folder: Path) -> int:
    model = tiny_model(folder)
    sequences = random_sequences([64] * 40)
    with _Largest() as largest:
        score_documents(model, sequences, cut_packed(sequences, TOKENS, 16, 0))
    return largest.bytes


def test_the_logits_of_a_batch_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path, vocab_size=VOCAB, num_hidden_layers=1)
    assert largest_tensor(tmp_path) <= LOGITS_BYTES * 0.42
    monkeypatch.setattr(
        causal_lm, "head_cross_entropy", lambda *args, **kwargs: head_cross_entropy(*args, **kwargs, impl="reference")
    )
    assert largest_tensor(tmp_path) >= LOGITS_BYTES, "the test can tell"


def test_a_document_that_is_not_a_number_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, model = random_sequences([9, 7, 12]), tiny_model(base)
    original = model.sum_nats

    def sum_nats(batch: Batch, **options):
        loss, nats = original(batch, **options)
        return loss, torch.where(batch.sequence_ids_BT.reshape(-1) == 1, math.nan, nats)

    monkeypatch.setattr(model, "sum_nats", sum_nats)
    with pytest.raises(NumericError, match=r"1 held-out documents .* doc-1"):
        score_documents(model, sequences, cut_packed(sequences, 64, 16, 0))
