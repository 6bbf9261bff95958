"""The verdict of a run with a quantized base: the base model as released, with the adapter that is for it.

One finished run in 4 bits, from a GGUF file, is asked for everything: figures, record, screen, page, cards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import drawplate.run.phases as phases
import drawplate.run.tune as story
from drawplate import cli
from drawplate.errors import StoppedSafely
from drawplate.model.causal_lm import CausalLM
from drawplate.recipe import Recipe
from drawplate.records import RunRecord
from drawplate.report.html import render_report
from drawplate.report.summary import summary_table
from drawplate.report.wording import verdict
from drawplate.run.outcome import Outcome
from drawplate.train.guards import StopRequested
from tests.report.test_summary import printed
from tests.tiny import read_lines, tiny_recipe, write_gguf

NF4 = {"precision": "nf4", "bnb_4bit_compute_dtype": "float32"}
GGUF = "tiny.F32.gguf"


def recipe_of(base: Path, corpus: Path, folder: Path, **sections: dict[str, Any]) -> Recipe:
    values = {
        "data": {"heldout_fraction": 0.4},
        "train": {"max_steps": 4},
        "quantization": NF4,
        "evaluation": {"forgetting": False},
        **sections,
    }
    return tiny_recipe(base, corpus, folder, **values)


@pytest.fixture(scope="module")
def run(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path, Path]:
    """A record, its folder, and the folder of the GGUF file that it began with."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(base, folder / GGUF)
    shutil.copy(folder / GGUF, folder / "another.gguf")  # so that the folder's name is not enough
    recipe = recipe_of(folder, corpus, folder.parent / "run", model={"gguf_file": GGUF})
    return story.tune(recipe), folder.parent / "run", folder


def loaded_as_the_card_says(folder: Path, base: Path) -> Any:
    """The model that the card's lines come to, given in the adapter's folder; the reader's path is put in."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace(f"PATH_TO/{base.name}", str(base))
    before, names = Path.cwd(), {}
    os.chdir(folder)
    try:
        exec(compile(code, "card", "exec"), names)
    finally:
        os.chdir(before)
    return names["model"], names["tokenizer"]


def nats_of(model: Any, tokenizer: Any, record: RunRecord, corpus: Path) -> float:
    total = 0.0
    for document in record.documents:
        ids = tokenizer((corpus / Path(document.document).name).read_text(), return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return total


def test_the_released_base_with_the_adapter_for_it_is_what_peft_measures(
    run: tuple[RunRecord, Path, Path], corpus: Path
) -> None:
    record, folder, gguf = run
    evaluation = record.evaluation
    model, tokenizer = loaded_as_the_card_says(folder / "adapter_unquantized", gguf)
    assert isinstance(model, PeftModel)
    assert nats_of(model, tokenizer, record, corpus) == pytest.approx(evaluation.unquantized_final.nats, rel=2e-4)
    with model.disable_adapter():
        nats = nats_of(model, tokenizer, record, corpus)
    assert nats == pytest.approx(evaluation.unquantized_baseline.nats, rel=2e-4)
    ratio = evaluation.unquantized_final.perplexity / evaluation.unquantized_baseline.perplexity
    assert evaluation.deployed_change_percent == pytest.approx(100 * (ratio - 1))
    low, high = evaluation.deployed_ci95_percent
    assert low < evaluation.deployed_change_percent < high
    assert evaluation.deployed_documents == record.data.heldout_documents
    assert (evaluation.deployed_adapter, evaluation.unquantized_precision) == ("adapter_unquantized", "fp32")
    for document in record.documents:
        assert math.isfinite(document.unquantized_nats + document.deployed_nats)
    assert sum(d.deployed_nats for d in record.documents) == pytest.approx(evaluation.unquantized_final.nats)


def test_the_card_of_the_adapter_for_4_bits_loads_it_on_4_bits(run: tuple[RunRecord, Path, Path], corpus: Path) -> None:
    record, folder, gguf = run
    model, tokenizer = loaded_as_the_card_says(folder / "adapter", gguf)
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj.base_layer")} == {"Linear4bit"}
    assert nats_of(model, tokenizer, record, corpus) == pytest.approx(record.evaluation.final.nats, rel=5e-4)
    with model.disable_adapter():
        assert nats_of(model, tokenizer, record, corpus) == pytest.approx(record.evaluation.baseline.nats, rel=5e-4)
    assert record.evaluation.baseline.nats != pytest.approx(record.evaluation.unquantized_baseline.nats, rel=1e-3)


def test_the_verdict_leads_with_it_and_names_what_stands_beside_it(run: tuple[RunRecord, Path, Path]) -> None:
    record, folder, _ = run
    evaluation = record.evaluation
    figures = [f"{evaluation.unquantized_baseline.perplexity:.2f}", f"{evaluation.unquantized_final.perplexity:.2f}"]
    ruling = verdict(record)
    assert ruling.scores == f"held-out perplexity {' -> '.join(figures)} on the base model as released (fp32)"
    assert f"{evaluation.deployed_change_percent:+.1f} % [" in ruling.headline
    lines = [" ".join(line.split()) for line in printed(summary_table(record, folder), width=200).splitlines()]
    assert lines[0] == f"{ruling.headline}, {ruling.scores}"
    beside = f"{evaluation.baseline.perplexity:.2f} -> {evaluation.final.perplexity:.2f}"
    for start in (
        f"Before perplexity {figures[0]} (the base model as released (fp32)",
        f"After perplexity {figures[1]} (with adapter_unquantized",
        f"Change {evaluation.deployed_change_percent:+.1f} % [",
        f"On the 4-bit base perplexity {beside}, {evaluation.perplexity_change_percent:+.1f} % [",
        f"Quantization tax {evaluation.quantization_tax_percent:+.1f} % [",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)
    page = render_report(record)
    assert f"{figures[0]}" in page
    assert "On 4-bit" not in page
    assert "on the base model as released (fp32), without and with adapter_unquantized" in page
    assert "on the 4-bit base model (nf4), without and with adapter" in page


def test_both_adapters_are_named_with_their_base_wherever_one_is(run: tuple[RunRecord, Path, Path]) -> None:
    record, folder, _ = run
    assert [dataclasses.astuple(adapter) for adapter in record.adapters] == [
        ("adapter", "nf4", False, 4),
        ("adapter_unquantized", "fp32", True, 8),
    ]
    text = printed(summary_table(record, folder), width=200)
    for name, words in (
        ("adapter", "for the 4-bit base model (nf4)"),
        ("adapter_unquantized", "for the base model as released (fp32)"),
    ):
        assert f"{folder}/{name}  ({words})" in text
        assert f"{words}:\n" in text.replace("documents of your own, ", "")
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        assert f"A LoRA adapter, {words}" in card.replace("\\_", "_")
    assert record.model.gguf_file == GGUF
    assert AutoTokenizer.from_pretrained(folder / "adapter_unquantized").vocab_size == 340


def test_the_first_command_that_is_printed_measures_what_the_verdict_says(
    run: tuple[RunRecord, Path, Path], corpus: Path, tmp_path: Path
) -> None:
    record, folder, _ = run
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for document in record.documents:
        shutil.copy(corpus / Path(document.document).name, held_out)
    printed_lines = printed(summary_table(record, folder), width=400)
    command = printed_lines[printed_lines.index("drawplate eval") :].partition("\n\n")[0].replace("\\\n", " ")
    words = [str(held_out) if word == "YOUR_DOCUMENTS" else word for word in shlex.split(command)]
    done = CliRunner().invoke(cli.app, [*words[1:], "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    want = record.evaluation.unquantized_final.perplexity
    assert results["with adapter"]["perplexity"] == pytest.approx(want, rel=1e-3)


def test_it_is_measured_last_with_the_model_of_the_run_released(run: tuple[RunRecord, Path, Path]) -> None:
    record, folder, _ = run
    assert list(record.phase_seconds)[-2:] == ["save", "deployed"]
    assert record.model.trainable_parameters > 0, "known although the model is gone"
    assert record.plan.phases[-1].phase == "unquantized with adapter"
    assert record.plan.measures_deployed
    assert len([line for line in read_lines(folder / "metrics.jsonl") if line["event"] == "evaluation"]) == len(
        record.evaluations
    ), "no point of the curve"


def test_one_adapter_that_fits_both_is_measured_on_both(base: Path, corpus: Path, tmp_path: Path) -> None:
    record = story.tune(recipe_of(base, corpus, tmp_path / "run", lora={"init_lora_weights": "default"}))
    evaluation = record.evaluation
    assert (evaluation.deployed_adapter, [a.folder for a in record.adapters]) == ("adapter", ["adapter"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter")
    nats = nats_of(tuned, AutoTokenizer.from_pretrained(base), record, corpus)
    assert nats == pytest.approx(evaluation.unquantized_final.nats, rel=2e-4)
    assert verdict(record).scores.endswith("on the base model as released (fp32)")
    assert "trained on the 4-bit base model (nf4)" in printed(summary_table(record, "runs/x"), width=200)


def test_a_stop_while_it_is_measured_can_be_resumed_and_comes_to_the_same(
    run: tuple[RunRecord, Path, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, gguf = run
    models: list[weakref.ref[CausalLM]] = []

    def remembered(outcome: Outcome) -> CausalLM:
        model = phases.load_model(outcome)
        models.append(weakref.ref(model))
        return model

    def stopped(*_: object, **__: object) -> None:
        assert [model() for model in models] == [None], "the run's own model is gone by then"
        raise StopRequested("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(story, "load_model", remembered)
        patch.setattr(phases, "score_deployed", stopped)
        with pytest.raises(StoppedSafely):
            story.tune(recipe_of(gguf, corpus, tmp_path / "run", model={"gguf_file": GGUF}))
    assert (tmp_path / "run" / "adapter_unquantized").is_dir(), "the adapters were written before"
    cut = story.resume(tmp_path / "run")
    assert cut.evaluation == whole.evaluation
    assert cut.adapters == whole.adapters
    assert cut.model == whole.model


def test_an_unquantized_model_has_one_comparison_and_no_base_to_name(base: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, corpus, tmp_path / "run", quantization={"precision": "fp32"}, train={"max_steps": 1})
    record = story.tune(recipe)
    assert "released" not in printed(summary_table(record, "runs/x"))
    assert "released" not in render_report(record)
    assert [dataclasses.astuple(adapter) for adapter in record.adapters] == [("adapter", "fp32", True, 4)]


def test_speeds_have_one_name_each_on_screen_and_page(run: tuple[RunRecord, Path, Path]) -> None:
    record, _, _ = run
    assert 0 < record.times.first_step_seconds < record.total_seconds
    rates = sorted(step.tokens_per_second for step in record.steps)
    assert record.times.tokens_per_second == rates[2], "of four steps the third: the first compiles"
    text, page = printed(summary_table(record, "runs/x"), width=200), render_report(record)
    for name in ("First step", "Speed once warm", "Speed of all steps"):
        assert name in text
        assert name in page
