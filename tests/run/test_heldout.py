"""What a run measures beside its held-out documents: the quantization tax and forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import drawplate.run.heldout as measure
import drawplate.run.prepare as prepare
import drawplate.run.tune as story
from drawplate.errors import DoesNotFit, UsageError
from drawplate.model.layer.adapter import read_adapter
from drawplate.recipe import Recipe
from drawplate.records import DocumentScore, EvaluationFacts, RunRecord
from drawplate.report.wording import verdict
from drawplate.run.heldout import change_between, evaluation_facts, forgetting_warning
from tests.tiny import read_lines, tiny_recipe, write_base, write_texts

NF4 = {"precision": "nf4", "bnb_4bit_compute_dtype": "float32"}
HELD_OUT = {"heldout_fraction": 0.4}


def scores(*nats: float, tokens: int = 10) -> tuple[DocumentScore, ...]:
    return tuple(DocumentScore(document=f"d{i}", nats=n, tokens=tokens, bytes=40) for i, n in enumerate(nats))


@pytest.fixture
def recipe(base: Path, corpus: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(base, corpus, tmp_path / "run", quantization=NF4, data=HELD_OUT, train={"max_steps": 2})


def run_within(recipe: Recipe, folder: Path, **sections: dict[str, Any]) -> RunRecord:
    values = recipe.model_dump(mode="json")
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    return story.tune(Recipe.model_validate({**values, "output_dir": str(folder)}))


def test_the_tax_is_the_step_from_the_unquantized_models_own_baseline(recipe: Recipe, tmp_path: Path) -> None:
    record = run_within(recipe, tmp_path / "nf4")
    plain = run_within(recipe, tmp_path / "fp32", quantization={"precision": "fp32"})
    evaluation = record.evaluation
    assert evaluation.unquantized_baseline == plain.evaluation.baseline, "to the last bit"
    assert evaluation.quantized_baseline == evaluation.baseline
    ratio = evaluation.baseline.perplexity / evaluation.unquantized_baseline.perplexity
    assert evaluation.quantization_tax_percent == pytest.approx(100 * (ratio - 1))
    low, high = evaluation.quantization_tax_ci95_percent
    assert low <= evaluation.quantization_tax_percent <= high
    assert evaluation.quantization_tax_documents == record.data.heldout_documents
    assert record.plan.quantization_tax
    assert story.plan(recipe).quantization_tax, "drawplate plan says so too"
    assert list(record.phase_seconds)[:3] == ["read", "unquantized", "load"], "before the quantized model is loaded"
    assert plain.evaluation.unquantized_baseline is None
    assert plain.evaluation.quantization_tax_percent is None


def test_on_a_cpu_a_sample_bounds_the_time(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sample_tokens", lambda *_: 120)
    record = run_within(recipe, tmp_path / "run")
    evaluation = record.evaluation
    assert 0 < evaluation.quantization_tax_documents == evaluation.deployed_documents < record.data.heldout_documents
    assert evaluation.unquantized_baseline.tokens < 120 < evaluation.baseline.tokens
    assert evaluation.quantized_baseline.tokens == evaluation.unquantized_baseline.tokens
    assert evaluation.unquantized_final.tokens == evaluation.unquantized_baseline.tokens
    assert f"of {record.data.heldout_documents} held-out ones" in verdict(record).detail


def test_without_a_tax_the_log_says_why(recipe: Recipe, tmp_path: Path) -> None:
    messages: list[str] = []
    values = recipe.model_dump(mode="json")
    values["evaluation"]["quantization_tax"] = False
    record = story.tune(Recipe.model_validate(values), lambda progress: messages.append(progress.message))
    assert record.evaluation.unquantized_baseline is None
    assert record.evaluation.unquantized_final is None
    assert verdict(record).scores.endswith("on the 4-bit base model (nf4)")
    assert "not measured with an adapter: evaluation.quantization_tax is off." in verdict(record).detail
    assert "What quantization costs is not measured: evaluation.quantization_tax is off." in messages
    assert "unquantized" not in record.phase_seconds


def test_a_tax_that_does_not_fit_costs_a_warning_and_not_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DoesNotFit("The frozen layers need 16 GiB.", next_step="")

    monkeypatch.setattr(measure, "assemble", full)
    record = run_within(recipe, tmp_path / "run")
    assert record.status == "finished"
    assert "What quantization costs was not measured: The frozen layers need 16 GiB." in record.warnings


def test_forgetting_is_measured_on_the_same_general_text_before_and_after(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prepare.GENERAL_TOKENS, "cpu", 6000)
    record = run_within(recipe, tmp_path / "run", train={"learning_rate": 0.05, "max_steps": 8})
    evaluation = record.evaluation
    assert evaluation.general_text == "general English prose"
    assert evaluation.general_baseline.tokens == evaluation.general_final.tokens
    assert 3000 < evaluation.general_baseline.tokens <= 6000
    ratio = evaluation.general_final.perplexity / evaluation.general_baseline.perplexity
    assert evaluation.general_change_percent == pytest.approx(100 * (ratio - 1))
    low, high = evaluation.general_ci95_percent
    assert low < evaluation.general_change_percent < high
    first_measured = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["event"] == "evaluation" for line in first_measured) == len(record.evaluations), "no curve's point"


def test_general_files_of_ones_own_are_named_in_the_record(recipe: Recipe, tmp_path: Path) -> None:
    own = str(write_texts(tmp_path / "own", 6, seed=5))
    evaluation = run_within(recipe, tmp_path / "run", evaluation={"general_files": own}).evaluation
    assert (evaluation.general_text, evaluation.general_documents) == (own, 6)


def test_forgetting_can_be_left_out(recipe: Recipe, tmp_path: Path) -> None:
    evaluation = run_within(recipe, tmp_path / "run", evaluation={"forgetting": False}).evaluation
    assert (evaluation.general_text, evaluation.general_baseline, evaluation.general_final) == ("", None, None)


@pytest.mark.parametrize(
    ("after", "warned"),
    [
        ((31.0, 31.2, 30.9, 31.1, 31.0, 30.8), True),  # +10 %
        ((30.2, 30.1, 30.3, 30.2, 30.1, 30.2), False),  # +2 %, below the limit
        ((38.0, 26.0, 35.0, 29.0, 37.0, 22.0), False),  # +12 %, no measurable change
        ((29.0, 29.2, 28.9, 29.1, 29.0, 28.8), False),  # better
    ],
)
def test_a_warning_is_for_a_rise_above_the_limit_that_is_none_by_chance(
    recipe: Recipe, after: tuple[float, ...], warned: bool
) -> None:
    measured = {"general baseline": scores(*[30.0] * 6), "general final": scores(*after)}
    text = forgetting_warning(recipe, measured)
    assert bool(text) == warned
    if warned:
        assert "+10.5 % [" in text
        assert "lower train.learning_rate" in text


def test_only_documents_that_both_measured_are_compared(recipe: Recipe) -> None:
    measured = {"unquantized": scores(20.0, 21.0)[1:], "baseline": scores(30.0, 22.0, 40.0)}
    assert change_between(measured, "unquantized", "baseline", 0).percent == pytest.approx(10.517, rel=1e-3)
    facts = evaluation_facts(recipe, 64, measured)
    assert (facts.quantized_baseline.nats, facts.baseline.nats) == (22.0, 92.0)
    assert evaluation_facts(recipe, 64, {}) == EvaluationFacts(context_tokens=32)


def test_the_tax_runs_with_long_documents_and_padding(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    data = {**HELD_OUT, "max_length": 12, "packing": False}
    recipe = tiny_recipe(
        base, write_texts(tmp_path / "texts"), tmp_path / "run", quantization=NF4, data=data, train={"max_steps": 1}
    )
    evaluation = story.tune(recipe).evaluation
    assert evaluation.unquantized_baseline.tokens == evaluation.baseline.tokens


def test_a_model_whose_documents_would_mix_is_padded_wherever_it_is_measured(corpus: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", architecture="stablelm")
    train = {"max_steps": 1}
    recipe = tiny_recipe(base, corpus, tmp_path / "run", quantization=NF4, data=HELD_OUT, train=train)
    record = story.tune(recipe)
    assert not record.plan.packing
    assert record.evaluation.unquantized_baseline is not None
    settings = ["quantization.precision=nf4", "quantization.bnb_4bit_compute_dtype=float32"]
    measured = story.evaluate(str(base), str(tmp_path / "run" / "adapter"), [str(corpus)], settings=settings)
    assert measured["with adapter"].documents == record.data.documents


# --- a start from the quantization error ---------------------------------------------------------------------------


STARTED = {"init_lora_weights": "quantization_error"}


def test_an_adapter_that_starts_from_the_error_is_measured_against_the_base_without_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    plain = run_within(recipe, tmp_path / "plain", lora={"init_lora_weights": "default"})
    record = run_within(recipe, tmp_path / "run", lora=STARTED)
    assert record.evaluation.baseline == plain.evaluation.baseline, "to the last bit"
    assert record.evaluation.final != plain.evaluation.final
    assert (record.training.init_lora_weights, plain.training.init_lora_weights) == ("quantization_error", "default")
    config, adapter = read_adapter(tmp_path / "run" / "adapter")
    twice, difference = read_adapter(tmp_path / "run" / "adapter_unquantized")
    assert (config.r, twice.r) == (4, 8)
    assert adapter.keys() == difference.keys()
    assert not (tmp_path / "plain" / "adapter_unquantized").exists()


def test_eval_measures_it_on_the_weights_it_belongs_to(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    record = run_within(recipe, tmp_path / "run", lora=STARTED, evaluation={"general_files": []})
    adapter, base = str(tmp_path / "run" / "adapter"), recipe.model.name_or_path
    settings = ["model.device_map=cpu", "quantization.bnb_4bit_compute_dtype=float32"]
    results = story.evaluate(base, adapter, [str(corpus)], settings=settings)
    assert {score.precision for score in results.values()} == {record.model.precision}
    with pytest.raises(UsageError, match="belongs to weights in nf4"):
        story.evaluate(base, adapter, [str(corpus)], settings=["quantization.precision=fp32"])
    other = str(tmp_path / "run" / "adapter_unquantized")
    assert story.evaluate(base, other, [str(corpus)], settings=[*settings, "quantization.precision=fp32"])


def test_without_unquantized_weights_the_adapter_starts_at_zero_and_the_log_says_so(
    recipe: Recipe, tmp_path: Path
) -> None:
    messages: list[str] = []
    values = recipe.model_dump(mode="json")
    values["lora"] |= STARTED
    values["evaluation"]["quantization_tax"] = False
    record = story.tune(Recipe.model_validate(values), lambda progress: messages.append(progress.message))
    assert record.training.init_lora_weights == "default"
    assert any("The adapter starts from zero: evaluation.quantization_tax is off" in message for message in messages)


def test_a_run_that_was_stopped_goes_on_from_its_own_start(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_within(recipe, tmp_path / "whole", lora=STARTED)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(story, "keep_the_best", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_within(recipe, tmp_path / "cut", lora=STARTED)
    resumed = story.resume(tmp_path / "cut")
    assert resumed.evaluation == whole.evaluation
    for name in ("adapter", "adapter_unquantized"):
        files = [(tmp_path / run / name / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
        assert files[0] == files[1]
