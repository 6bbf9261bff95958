"""Families that are not Llama: a whole run of a model for text and images, and adapters that PEFT would not load."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

import drawplate.run.tune as story
from bench.families import write
from drawplate.errors import UsageError
from drawplate.model.layer import adapter
from drawplate.model.layer.adapter import require_adapter_loads
from tests.faults.rows import shows
from tests.tiny import tiny_model, tiny_recipe, write_texts, write_tokenizer


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Gemma 3 for text and images, and documents."""
    folder = tmp_path_factory.mktemp("wrapped")
    vocab = write_tokenizer(folder / "base")
    write(folder / "base", "gemma3", vocab_size=vocab, num_hidden_layers=2)
    write_texts(folder / "texts", 8)
    return folder


def test_a_model_for_text_and_images_is_trained_and_its_adapter_loads_on_the_class_that_it_names(
    wrapped: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(wrapped / "base", wrapped / "texts", tmp_path / "run", train={"max_steps": 2})
    record = story.tune(recipe)
    assert record.model.layers == 2
    assert (tmp_path / "run" / "report.html").is_file()
    base = Gemma3ForConditionalGeneration.from_pretrained(wrapped / "base", dtype=torch.float32).eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(wrapped / "base")
    nats = tokens = 0.0
    for change in record.documents:
        ids = tokenizer((wrapped / "texts" / Path(change.document).name).read_text(), return_tensors="pt").input_ids
        with torch.no_grad():
            nats += float(loaded(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    final = record.evaluation.final
    assert final is not None
    assert math.exp(nats / tokens) == pytest.approx(final.perplexity, rel=1e-4)


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "control"])
def test_row_65_an_adapter_that_peft_would_drop_is_refused_before_training(
    dropped: bool, wrapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(wrapped / "base")
    if not dropped:
        require_adapter_loads(model.adapter, model.anatomy, tmp_path)
        return
    monkeypatch.setattr(adapter, "PREFIX", "base_model.model.text.")
    with pytest.raises(UsageError) as error:
        require_adapter_loads(model.adapter, model.anatomy, tmp_path)
    shows(65, str(error.value))


def test_what_is_written_last_fails_before_training(
    wrapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "model_card", lambda *_: 1 / 0)
    monkeypatch.setattr(story, "measure_heldout", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ZeroDivisionError):
        story.tune(tiny_recipe(wrapped / "base", wrapped / "texts", tmp_path / "run"))
