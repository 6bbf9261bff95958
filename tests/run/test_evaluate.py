"""Models and adapters on the same documents: one after another, each compared with the first."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import drawplate
import drawplate.run.evaluate as compare_models
from drawplate.errors import IntegrityError, NumericError, UsageError
from drawplate.records import ModelScore
from drawplate.run.journal import Journal
from tests.tiny import open_base, tiny_recipe, write_base, write_texts

FP32 = ["quantization.precision=fp32", "quantization.bnb_4bit_compute_dtype=float32"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("new") / "texts", 12, seed=9))


@pytest.fixture(scope="module")
def adapter(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    drawplate.tune(tiny_recipe(base, corpus, folder, evaluation={"forgetting": False}))
    return str(folder / "adapter")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return write_base(tmp_path_factory.mktemp("other"), hidden_size=32)


@pytest.fixture(scope="module")
def cuts_finer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that knows fewer merges."""
    folder = tmp_path_factory.mktemp("finer") / "base"
    shutil.copytree(base, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:10]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def measured(models: list[Path], adapters: list[str], documents: str, *settings: str) -> dict[str, ModelScore]:
    return drawplate.evaluate([str(m) for m in models], adapters, [documents], settings=[*FP32, *settings])


def test_each_is_compared_with_the_first(base: Path, other: Path, adapter: str, documents: str) -> None:
    scores = measured([base, other], [adapter], documents)
    assert list(scores) == [str(base), f"{base} + {adapter}", str(other)]
    first, tuned, rival = scores.values()
    assert (first.verdict, first.perplexity_change_percent) == ("", None)
    assert tuned.perplexity_change_percent == pytest.approx(100 * (tuned.perplexity / first.perplexity - 1))
    assert tuned.verdict.startswith("better: -")
    low, high = tuned.perplexity_ci95_percent
    assert low < tuned.perplexity_change_percent < high < 0
    assert rival.bits_per_byte_change_percent == pytest.approx(100 * (rival.bits_per_byte / first.bits_per_byte - 1))
    assert {s.documents for s in scores.values()} == {12}
    assert {s.precision for s in scores.values()} == {"fp32"}
    alone = drawplate.evaluate(str(base), adapter, [documents], settings=FP32)
    assert list(alone) == ["base model", "with adapter"]
    assert (alone["base model"].nats, alone["with adapter"].nats) == (first.nats, tuned.nats)


def test_other_tokenizers_are_compared_by_bits_per_byte(base: Path, cuts_finer: Path, documents: str) -> None:
    first, finer = measured([base, cuts_finer], [], documents).values()
    assert finer.tokens > first.tokens
    assert finer.perplexity_change_percent is None
    assert finer.bits_per_byte_ci95_percent is not None
    assert finer.verdict


def test_settings_are_a_recipes(base: Path, documents: str) -> None:
    whole = measured([base], [], documents)["base model"]
    cut = measured([base], [], documents, "data.max_length=8", "evaluation.context_tokens=1")["base model"]
    assert whole.tokens == cut.tokens
    assert whole.nats != cut.nats


def test_all_read_the_windows_of_the_shortest_reach(base: Path, documents: str, tmp_path: Path) -> None:
    short = write_base(tmp_path / "short", max_position_embeddings=16)
    together = measured([base, short], [], documents)
    assert together[str(base)].nats == measured([base], [], documents, "data.max_length=16")["base model"].nats
    assert together[str(short)].perplexity_change_percent is not None


def test_a_model_is_released_before_the_next_is_loaded(
    base: Path, other: Path, documents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    original = compare_models.assemble

    def watched(*arguments: Any, **options: Any) -> Any:
        assert not [model for model in alive if model() is not None]
        model = original(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(compare_models, "assemble", watched)
    measured([base, other], [], documents)
    assert len(alive) == 2
    gc.collect()


def test_an_adapter_whose_base_is_not_given_is_refused(
    base: Path, other: Path, adapter: str, documents: str, cuts_finer: Path
) -> None:
    with pytest.raises(UsageError, match="none of the models given"):
        measured([other, cuts_finer], [adapter], documents)
    with pytest.raises(UsageError, match="given twice"):
        measured([base, base], [], documents)


def warned(models: list[Path], adapters: list[str], documents: str, *settings: str) -> tuple[str, ...]:
    journal = Journal()
    compare_models.compare_models([str(m) for m in models], adapters, [documents], journal, [*FP32, *settings])
    return tuple(journal.warnings)


def test_other_weights_of_the_same_shape_are_said_with_both_names_and_hashes(
    base: Path, adapter: str, documents: str, tmp_path: Path
) -> None:
    assert warned([base], [adapter], documents) == ()
    stranger = write_base(tmp_path / "stranger")
    tensors = load_file(stranger / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, stranger / "model.safetensors", {"format": "pt"})
    (said,) = warned([stranger], [adapter], documents)
    for checkpoint in (open_base(base), open_base(stranger)):
        assert f"{checkpoint.name} (sha256 {checkpoint.sha256()[:12]})" in said
    foreign = tmp_path / "foreign"
    shutil.copytree(adapter, foreign)
    (foreign / "base.json").unlink()
    (said,) = warned([stranger], [str(foreign)], documents)
    assert f"was trained on {base} and is used on {stranger}" in said


def test_a_base_of_another_shape_is_refused_before_anything_is_measured(
    other: Path, adapter: str, documents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_models, "assemble", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(IntegrityError, match=r"does not fit this model: of 28 tensors .* have another shape: 22"):
        measured([other], [adapter], documents)


def test_an_adapter_of_weights_in_four_bits_is_said_to_be_on_others(
    base: Path, adapter: str, documents: str, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "four")
    facts = json.loads((tmp_path / "four" / "base.json").read_text())
    assert (facts["precision"], facts["bound"]) == ("fp32", False)
    (tmp_path / "four" / "base.json").write_text(json.dumps({**facts, "precision": "nf4"}))
    (said,) = warned([base], [str(tmp_path / "four")], documents)
    assert "trained on weights in nf4 and is measured on weights in fp32" in said
    (tmp_path / "four" / "base.json").write_text(json.dumps({**facts, "precision": "nf4", "bound": True}))
    with pytest.raises(UsageError, match="belongs to weights in nf4"):
        measured([base], [str(tmp_path / "four")], documents)
    (tmp_path / "four" / "base.json").unlink()
    (tmp_path / "four" / "base_precision.json").write_text('{"base_precision": "nf4"}')
    with pytest.raises(UsageError, match="belongs to weights in nf4"):
        measured([base], [str(tmp_path / "four")], documents)


def test_documents_that_an_adapter_was_trained_on_are_counted(
    base: Path, adapter: str, corpus: Path, documents: str
) -> None:
    """Those that its run held out are none of them, nor is anything that it has never seen."""
    record = json.loads((Path(adapter).parent / "record.json").read_text(encoding="utf-8"))
    trained, every = record["data"]["train_documents"], record["data"]["documents"]
    assert trained < every
    said = [line for line in warned([base], [adapter], str(corpus)) if "was trained on" in line]
    assert len(said) == 1
    assert f"{trained} of the {every} documents" in said[0]
    assert not [line for line in warned([base], [adapter], documents) if "was trained on" in line]


def test_files_that_are_left_out_are_said_once(base: Path, adapter: str, documents: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "two")
    shutil.copy(base / "model.safetensors", tmp_path / "two" / "backup.safetensors")
    said = warned([tmp_path / "two"], [adapter], documents)
    assert [line for line in said if "left out: backup.safetensors" in line] == list(said)


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_no_number_is_named(base: Path, documents: str, tmp_path: Path, where: str) -> None:
    shutil.copytree(base, tmp_path / "nan")
    tensors = load_file(base / "model.safetensors")
    tensors[where][0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=where) as error:
        measured([tmp_path / "nan"], [], documents)
    assert "Fetch" in error.value.next_step
