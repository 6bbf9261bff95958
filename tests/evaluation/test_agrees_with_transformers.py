"""Held-out nats against an independent computation: plain transformers in fp32, one document at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.evaluation_agrees import TOLERANCE, document_nats, reference_nats
from drawplate.data.batches import cut_packed, cut_padded
from drawplate.data.tokens import Tokenizer, load_tokenizer, tokenize
from drawplate.model.base.precision import Storage
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from drawplate.records import Document
from tests.model.conftest import write_model
from tests.tiny import texts

WINDOWS = {"whole": (128, 64, 999), "windowed": (24, 10, 999), "without context to spare": (16, 15, 26)}
"""Tokens of a window, tokens of its context, and of the longest document: the last kind has a window a token."""
LAYERS = 3
"""One more than a weight ring has slots, and both kinds of the architectures that take turns."""


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """34 documents of 2 to some 90 tokens; of the windows above some are just filled, some by one token more."""
    long = " ".join(texts(3, seed=1))
    found = [*texts(30), long, "the sea", "ice melts", long[:60]]
    return [Document(name=f"d{i}", text=text, sha256=str(i)) for i, text in enumerate(found)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi", "olmo2", "cohere"])
def test_every_way_of_measuring_gives_the_independent_nats(
    name: str, documents: list[Document], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    checkpoint = write_model(tmp_path / name, name, vocab_size=len(tokenizer), num_hidden_layers=LAYERS)
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    models = {
        where: assemble(
            checkpoint,
            Placement(
                storage=Storage("fp32"), compute_dtype=torch.float32, weights=where, head_rows=rows, poison=bool(rows)
            ),
            lambda anatomy: lora_config(LoraSection(r=2), anatomy, "", None),
            seed=0,
        )
        for where, rows in (("device", 0), ("host", 64))
    }
    all_ids = {d.name: np.array(tokenizer(d.text)["input_ids"]) for d in documents}
    for max_length, context, longest in WINDOWS.values():
        ids = {document: row for document, row in all_ids.items() if len(row) <= longest}
        read = [d for d in documents if d.name in ids]
        sequences = tokenize(read, tokenizer, max_length, context_tokens=context).sequences
        want = {document: reference_nats(reference, row, max_length, context) for document, row in ids.items()}
        for size in (1, 8, 32):
            batches = cut_padded(sequences, size, 16, 0)
            assert document_nats(models["device"], sequences, batches) == pytest.approx(want, rel=TOLERANCE), size
        for model in models.values():
            batches = cut_packed(sequences, 256, 16, 0)
            assert document_nats(model, sequences, batches) == pytest.approx(want, rel=TOLERANCE)


def test_windows_without_context_give_other_nats(
    documents: list[Document], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The negative control: what context changes is larger than the tolerance above."""
    checkpoint = write_model(tmp_path / "llama", "llama", vocab_size=len(tokenizer))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    ids = np.array(tokenizer(documents[30].text)["input_ids"])
    nats = [reference_nats(reference, ids, 24, context) for context in (1, 10, 20)]
    assert len(ids) > 48
    assert min(abs(a / b - 1) for a, b in zip(nats, [*nats[1:], nats[0]], strict=True)) > 2 * TOLERANCE
