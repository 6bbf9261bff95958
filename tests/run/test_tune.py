"""Whole runs on a tiny model: what they leave behind, and how they end when they cannot finish."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import drawplate
import drawplate.run.phases as phases
import drawplate.run.tune as story
from drawplate import cli
from drawplate.errors import DataError, NumericError, StorageError
from drawplate.machine import speed
from drawplate.machine.device import machine
from drawplate.model.causal_lm import CausalLM
from drawplate.planner.seconds.gpus import typical_speed
from drawplate.recipe import load_recipe
from drawplate.records import Evaluation, Plan, Progress, RunRecord, from_json, to_json
from tests.tiny import read_lines, recipe_values, tiny_recipe, write_base, write_texts

HELD_OUT = {"heldout_fraction": 0.3}
EXAMPLE = Path(__file__).parents[2] / "examples" / "llama-3.2-3b-climate.yaml"


@pytest.fixture(scope="module")
def finished(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    """A run that ended well, with an evaluation after every third step; and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = tiny_recipe(
        base, corpus, folder, data=HELD_OUT, evaluation={"eval_steps": 3}, train={"effective_batch_size": 3}
    )
    return story.tune(recipe), folder


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def write_recipe(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def nats_of(model: torch.nn.Module, tokenizer: Any, text: str) -> tuple[float, int]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(ids, labels=ids).loss) * (ids.shape[1] - 1), ids.shape[1] - 1


# --- a run that ends well ----------------------------------------------------------------------------------------


def test_a_run_says_when_the_machine_was_busy_while_it_was_probed(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = speed.speed_path(machine(torch.device("cpu")), torch.float32)
    kept, typical = path.read_text(encoding="utf-8"), typical_speed("cpu")
    slow = dataclasses.replace(
        typical,
        memory_rate=typical.memory_rate / 1e5,
        product_rates=tuple((flops, rate / 1e5) for flops, rate in typical.product_rates),
    )
    speed.keep_speed(path, slow)
    said: list[str] = []
    monkeypatch.setattr(story.Journal, "message", lambda self, text: said.append(text))
    try:
        story.tune(tiny_recipe(base, corpus, tmp_path / "run", data=HELD_OUT, train={"max_steps": 2}))
        assert not path.exists()
    finally:
        path.write_text(kept, encoding="utf-8")
    assert any("The next plan measures it anew" in text for text in said)


def test_the_folder_holds_every_file_of_the_contract(finished: tuple[RunRecord, Path]) -> None:
    _, folder = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {
        *("recipe.yaml", "plan.json", "intake.jsonl", "metrics.jsonl", "record.json", "report.html"),
        "trained_on.txt",
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md"),
        *("adapter/tokenizer.json", "adapter/tokenizer_config.json"),
    }
    assert expected <= names
    assert not [name for name in names if name.startswith(("checkpoints", "adapter_start"))], "only while it runs"
    assert not [name for name in names if "tmp" in name or name.endswith(".lock")]
    assert (folder / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*.safetensors")), "others may read it"


def test_what_was_written_reads_back_as_what_was_returned(finished: tuple[RunRecord, Path]) -> None:
    record, folder = finished
    values = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert from_json(RunRecord, values) == from_json(RunRecord, to_json(record))
    assert from_json(Plan, json.loads((folder / "plan.json").read_text())) == record.plan
    assert load_recipe(folder / "recipe.yaml").model_dump(mode="json") == record.recipe


CONTRACT = {
    "": ["schema", "drawplate", "status", "model", "data", "evaluation", "training", "memory", "machine", "versions"],
    "model": ["name", "parameters", "precision", "sha256"],
    "data": [
        *("files", "documents", "train_documents", "heldout_documents"),
        *("train_tokens", "heldout_tokens", "heldout_bytes"),
    ],
    "evaluation": ["baseline", "final", "perplexity_change_percent", "change_ci95_percent"],
    "evaluation.baseline": ["nats", "tokens", "bytes", "loss", "perplexity", "bits_per_byte"],
    "evaluation.final": ["nats", "tokens", "bytes", "loss", "perplexity", "bits_per_byte"],
    "training": [
        *("optimizer_steps", "epochs", "tokens", "tokens_per_optimizer_step", "seconds", "tokens_per_second"),
        *("micro_batch_tokens", "gradient_accumulation_steps", "first_loss", "last_loss"),
    ],
    "memory": ["host_peak_predicted_bytes", "host_peak_bytes"],
}  # fmt: skip
MAY_BE_NOTHING = {
    *("model.revision", "evaluation.unquantized_baseline", "data.dropped_tokens", "data.duplicate_documents"),
    *("memory.device_peak_predicted_bytes", "memory.device_peak_bytes"),  # a CPU has no device
}


def test_the_record_has_every_field_of_the_contract_with_a_value(finished: tuple[RunRecord, Path]) -> None:
    values = json.loads((finished[1] / "record.json").read_text(encoding="utf-8"))
    for path, names in CONTRACT.items():
        part = values
        for key in filter(None, path.split(".")):
            part = part[key]
        assert all(part[name] not in (None, "", [], {}) for name in names), path
    for path in MAY_BE_NOTHING:
        section, _, name = path.partition(".")
        assert name in values[section], path
    assert values["schema"] == 1
    assert values["status"] == "finished"
    assert len(values["model"]["sha256"]) == 64
    assert values["versions"]["torch"] == torch.__version__


def test_the_numbers_of_the_record_agree_with_each_other(finished: tuple[RunRecord, Path], corpus: Path) -> None:
    record, folder = finished
    data, training = record.data, record.training
    assert data.documents == data.train_documents + data.heldout_documents == len(list(corpus.iterdir()))
    assert training.optimizer_steps == 2 * math.ceil(data.train_documents / 3) == len(record.steps)
    assert training.epochs == 2.0
    assert training.tokens == sum(step.tokens for step in record.steps) == 2 * data.train_tokens
    change = 100 * (record.evaluation.final.perplexity / record.evaluation.baseline.perplexity - 1)
    assert record.evaluation.perplexity_change_percent == pytest.approx(change)
    assert record.evaluation.final.tokens == record.evaluation.baseline.tokens
    assert sum(d.final_nats for d in record.documents) == pytest.approx(record.evaluation.final.nats)
    assert change < -10, "a random model learns which words there are"
    assert record.memory.host_peak_bytes >= max(point.sample.process_bytes for point in record.memory_curve)
    assert set(record.phase_seconds) == {"read", "load", "rehearse", "baseline", "train", "final", "save"}
    assert record.model.self_check_difference < 1e-5
    assert record.model.self_check.gradient_difference < 1e-4
    assert record.model.self_check.packed == record.plan.packing
    intake = read_lines(folder / "intake.jsonl")
    assert sum(line["documents"] for line in intake) == data.documents


def test_every_step_and_evaluation_is_in_the_metrics(finished: tuple[RunRecord, Path]) -> None:
    record, folder = finished
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["loss"] for line in lines if line["event"] == "step"] == [step.loss for step in record.steps]
    measured = [line for line in lines if line["event"] == "evaluation"]
    assert measured[0]["step"] == 0
    assert {line["step"] for line in measured} >= {3, 6, 9}
    assert [line["name"] for line in lines if line["event"] == "phase"] == [
        "load",
        "rehearse",
        "baseline",
        "train",
        "final",
        "save",
    ]


def test_the_adapter_gives_the_measured_perplexity_in_peft(
    finished: tuple[RunRecord, Path], base: Path, corpus: Path
) -> None:
    """What is on the disk, through other people's code, on the same documents: the honest number."""
    record, folder = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "adapter"
    )
    for model, want in ((plain, record.evaluation.baseline), (tuned, record.evaluation.final)):
        sums = [nats_of(model, tokenizer, (corpus / Path(d.document).name).read_text()) for d in record.documents]
        assert sum(tokens for _, tokens in sums) == want.tokens
        assert sum(nats for nats, _ in sums) == pytest.approx(want.nats, rel=1e-4)


def test_two_runs_of_one_seed_agree_bit_for_bit(
    finished: tuple[RunRecord, Path], base: Path, corpus: Path, tmp_path: Path
) -> None:
    record, folder = finished
    changes = {"data": HELD_OUT, "evaluation": {"eval_steps": 3}, "train": {"effective_batch_size": 3}}
    again = story.tune(tiny_recipe(base, corpus, tmp_path / "again", **changes))
    assert stable(again) == stable(record)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()
    changes["train"]["seed"] = 7
    other = story.tune(tiny_recipe(base, corpus, tmp_path / "other", **changes))
    assert stable(other)["steps"] != stable(record)["steps"]


def stable(record: RunRecord) -> dict[str, Any]:
    """The record without clocks, memory samples (which the ledger's predictions start from) and the folder's name."""
    values = to_json(record)
    for name in ("started", "memory", "memory_curve", "total_seconds", "phase_seconds", "times", "rehearsal"):
        del values[name]
    for part in (values["training"], *values["steps"]):
        del part["seconds"], part["tokens_per_second"]
    del values["plan"]["ledger"], values["plan"]["phases"], values["training"]["checkpoint_seconds"]
    del values["recipe"]["output_dir"]
    return values


def test_the_python_door_takes_a_dict_and_shows_progress(base: Path, corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    record = drawplate.tune(recipe_values(base, corpus, tmp_path / "run", train={"max_steps": 2}), seen.append)
    assert record.training.optimizer_steps == 2
    phases = list(dict.fromkeys(p.phase for p in seen if p.phase))
    assert phases == ["read", "load", "rehearse", "baseline", "train", "final", "save"]
    assert max(p.done for p in seen if p.phase == "train") == 100


def test_eval_measures_what_tune_recorded(
    finished: tuple[RunRecord, Path], base: Path, tmp_path: Path, corpus: Path
) -> None:
    record, folder = finished
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for document in record.documents:
        shutil.copy(corpus / Path(document.document).name, held_out)
    done = invoke("eval", "--model", str(base), "--adapter", str(folder / "adapter"), "--data", str(held_out), "--json")
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)
    for name, want in (("base model", record.evaluation.baseline), ("with adapter", record.evaluation.final)):
        assert results[name]["tokens"] == want.tokens
        assert results[name]["perplexity"] == pytest.approx(want.perplexity, rel=2e-2), "auto precision may be bf16"


def test_long_documents_are_measured_in_windows_with_the_context_that_the_record_states(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    counted, perplexities = {}, {}
    for context in (0, 1, 4, "auto"):
        sections = {"data": {**HELD_OUT, "max_length": 8}, "evaluation": {"context_tokens": context}}
        recipe = tiny_recipe(base, corpus, tmp_path / str(context), **sections, train={"max_steps": 1})
        record = story.tune(recipe)
        assert record.evaluation.context_tokens == (4 if context == "auto" else context)
        counted[context] = record.evaluation.baseline.tokens
        perplexities[context] = record.evaluation.baseline.perplexity
        heldout = (record.data.heldout_tokens, record.data.heldout_documents)
    assert counted[1] == counted[4] == heldout[0] - heldout[1] > counted[0]
    assert perplexities["auto"] == perplexities[4]
    assert len(set(perplexities.values())) == 3


def test_eval_of_documents_too_short_to_predict_says_so(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="too short"):
        story.evaluate(str(base), None, [str(tmp_path / "a.txt")])


def test_a_model_that_is_not_carried_out_right_is_not_trained(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CausalLM.embed
    monkeypatch.setattr(CausalLM, "embed", lambda self, ids: real(self, ids.flip(1)))
    recipe = tiny_recipe(base, corpus, tmp_path / "run", train={"max_steps": 1})
    with pytest.raises(NumericError, match=r"Self-check: .* would be trained wrongly"):
        story.tune(recipe)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(phases, "warnings_of", lambda model, found: [])  # without the guard it is trained
    assert story.tune(recipe).training.optimizer_steps == 1


def test_four_bits_and_their_tax_are_in_the_record(base: Path, corpus: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "nf4", "int8"):
        quantization = {"precision": precision, "bnb_4bit_compute_dtype": "float32"}
        recipe = tiny_recipe(base, corpus, tmp_path / precision, quantization=quantization, train={"max_steps": 1})
        record = story.tune(recipe)
        losses[precision] = record.evaluation.baseline.loss
        assert record.model.precision == precision
        assert record.model.self_check_difference < 1e-4
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["nf4"] != losses["fp32"]


def test_fp16_reports_a_skipped_step(base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "INITIAL_LOSS_SCALE", 2.0**28)
    quantization = {"precision": "fp32", "bnb_4bit_compute_dtype": "auto"}
    train = {"fp16": True, "max_steps": 8, "effective_batch_size": 3}
    record = story.tune(tiny_recipe(base, corpus, tmp_path / "r", quantization=quantization, train=train))
    assert record.training.skipped_steps > 0
    assert record.training.optimizer_steps == 8 - record.training.skipped_steps
    assert sum("overflowed fp16" in warning for warning in record.warnings) == record.training.skipped_steps


def test_conversations_need_a_template_and_plain_text_does_not(base: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no chat template"):
        story.plan(tiny_recipe(base, tmp_path / "chat.jsonl", tmp_path / "run"))
    assert not (AutoTokenizer.from_pretrained(base).chat_template), "and the other tests here use plain text"


# --- which adapter is kept ---------------------------------------------------------------------------------------


def script_evaluations(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """The held-out loss after each evaluation in between is what the script says; the last one is measured."""
    remaining, train = iter(losses), phases.train

    def scripted(task: Any, journal: Any, state: Any) -> Any:
        object.__setattr__(task, "evaluate", lambda: Evaluation(nats=next(remaining), tokens=1, bytes=1))
        return train(task, journal, state)

    monkeypatch.setattr(phases, "train", scripted)


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_adapter_is_saved_and_not_the_last(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_best: bool
) -> None:
    script_evaluations(monkeypatch, [0.5, 0.1, 0.3, 0.4])
    evaluation = {"eval_steps": 1, "load_best_model_at_end": keep_best}
    train = {"max_steps": 4, "save_steps": 1, "keep_checkpoints": True}
    record = story.tune(tiny_recipe(base, corpus, tmp_path / "run", data=HELD_OUT, evaluation=evaluation, train=train))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-000003", "step-000004"}, "the two newest"
    saved, last = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "run" / "adapter", checkpoints / "step-000004")
    )
    assert all(torch.equal(saved[name], last[name]) for name in saved) != keep_best
    assert (checkpoints / "step-000004" / "best_adapter.safetensors").is_file() == keep_best
    if keep_best:
        best = load_file(checkpoints / "step-000004" / "best_adapter.safetensors")
        assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert record.training.best_step == (2 if keep_best else 4)
    assert record.evaluations[-1].step == record.training.best_step
    assert record.evaluations[-1].result == record.evaluation.final, "what was saved is what was measured"


def test_early_stopping_ends_the_run_and_says_why(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_evaluations(monkeypatch, [0.1, 0.2, 0.3])
    evaluation = {"eval_steps": 1, "early_stopping_patience": 2}
    record = story.tune(tiny_recipe(base, corpus, tmp_path / "run", evaluation=evaluation, train={"max_steps": 8}))
    assert record.status == "finished"
    assert record.training.optimizer_steps == 3
    assert record.training.stopped_because == "held-out loss did not improve in 2 evaluations"


# --- a run that ends badly ---------------------------------------------------------------------------------------


def break_after(steps: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise inside the step that follows so many."""
    original = story.Journal.on_micro_batch

    def on_micro_batch(self: Any, step: int, *rest: Any) -> None:
        if step > steps:
            raise error
        original(self, step, *rest)

    monkeypatch.setattr(story.Journal, "on_micro_batch", on_micro_batch)


def poison_training(monkeypatch: pytest.MonkeyPatch, from_step: int) -> None:
    """From the given optimizer step on, the loss is NaN."""
    original, calls = CausalLM.sum_nats, []

    def sum_nats(self: CausalLM, batch: Any, **options: Any) -> Any:
        loss, nats = original(self, batch, **options)
        calls.extend([1] * bool(options))
        return (loss * math.nan, nats * math.nan) if options and len(calls) >= from_step else (loss, nats)

    monkeypatch.setattr(CausalLM, "sum_nats", sum_nats)


def test_a_nan_that_does_not_go_away_ends_the_run_with_the_adapter_before_it(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_training(monkeypatch, from_step=3)
    train = {"lr_scheduler_type": "constant", "save_steps": 1}
    values = recipe_values(base, corpus, tmp_path / "run", train=train, memory={"rehearsal": "off"})
    done = invoke("tune", write_recipe(tmp_path / "r.yaml", values))
    assert done.exit_code == 6
    assert "Traceback" not in done.stderr
    assert ".txt" in done.stderr, "documents are named"
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed"
    assert "is not a number. Documents in it: " in record["error"]
    assert record["training"]["optimizer_steps"] == 2
    assert record["evaluation"]["baseline"]["tokens"] > 0
    assert record["evaluation"]["final"] is None
    assert (tmp_path / "run" / "report.html").is_file()
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "**The run failed after 2 of " in card
    assert ".txt" not in card, "who publishes the adapter does not publish the names of documents"
    monkeypatch.undo()
    short = story.tune(tiny_recipe(base, corpus, tmp_path / "short", train={**train, "max_steps": 2}))
    assert short.training.optimizer_steps == 2
    saved, earlier = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "short"))
    assert all(torch.equal(saved[name], earlier[name]) for name in earlier)


def test_an_interrupt_in_training_keeps_record_and_adapter(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_after(2, KeyboardInterrupt(), monkeypatch)
    done = invoke("tune", write_recipe(tmp_path / "r.yaml", recipe_values(base, corpus, tmp_path / "run")))
    assert done.exit_code == 75
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["error"]) == ("stopped", "interrupted")
    assert record["training"]["optimizer_steps"] == 2
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "**The run was stopped after 2 of " in card.split("## Measured")[0]
    assert str(tmp_path) not in card
    assert not list((tmp_path / "run").glob("*.lock"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), NumericError("no", next_step="stop")])
def test_a_run_that_fails_before_its_first_step_leaves_nothing_behind(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    break_after(0, error, monkeypatch)
    recipe = tiny_recipe(base, corpus, tmp_path / "runs" / "run")
    with pytest.raises(type(error)):
        story.tune(recipe)
    assert not (tmp_path / "runs").exists()
    monkeypatch.undo()
    story.tune(recipe)


def test_an_output_folder_in_use_stops_the_run_before_the_model_is_opened(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    monkeypatch.setattr(story, "prepare", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(StorageError, match="is not empty"):
        story.tune(tiny_recipe(base, corpus, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- the command line and bad input ------------------------------------------------------------------------------


def test_the_command_ends_with_a_table_a_person_understands(base: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(base, corpus, tmp_path / "run", data=HELD_OUT))
    done = invoke("tune", recipe, "--set", "train.max_steps=3")
    assert done.exit_code == 0, done.stderr
    for word in ("erplexity", "before", "after", "%", "steps", "memory", "adapter", "report"):
        assert word in done.stdout.lower() + done.stdout, word
    assert "drawplate " in done.stdout, "the next command"


def case(name: str, code: int, words: list[str], **sections: Any) -> Any:
    return pytest.param(code, words, sections, id=name)


@pytest.mark.parametrize(
    ("code", "words", "sections"),
    [
        case("unknown key", 2, ["did you mean", "learning_rate"], train={"learning_rat": 1e-4}),
        case("a batch of nothing", 2, ["train.effective_batch_size"], train={"effective_batch_size": 0}),
        case("a window of one token", 2, ["data.max_length"], data={"max_length": 1}),
        case("a window longer than the model's", 2, ["128"], data={"max_length": 129}),
        case("no room beside the context", 2, ["below 64"], data={"max_length": 64}, evaluation={"context_tokens": 64}),
        case("an uneven step", 2, ["multiple"], train={"effective_batch_size": 6, "gradient_accumulation_steps": 4}),
        case("unknown target", 2, ["q_proj"], lora={"target_modules": ["query"]}),
        case("missing data", 4, ["nowhere.txt"], data={"files": ["nowhere.txt"]}),
        case("no cuda", 3, ["cuda"], model={"device_map": "cuda"}),
        case("no such folder", 9, ["/nowhere/model"], model={"name_or_path": "/nowhere/model"}),
    ],
)  # fmt: skip
def test_bad_input_is_three_lines_and_nothing_is_left_behind(
    base: Path, corpus: Path, tmp_path: Path, code: int, words: list[str], sections: dict[str, Any]
) -> None:
    if code == 3 and torch.cuda.is_available():
        pytest.skip("this machine has what the test needs missing")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(base, corpus, tmp_path / "run", **sections))
    expect_three_lines(invoke("tune", recipe), code, words)
    assert not (tmp_path / "run").exists()


def expect_three_lines(done: Any, code: int, words: list[str]) -> None:
    assert done.exit_code == code, done.stderr
    labels = [line.partition(":")[0].strip() for line in done.stderr.splitlines() if ": " in line]
    assert labels == ["what happened", "what is safe", "what to do next"], done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(("count", "name"), [(0, "empty folder"), (1, "one document")])
def test_too_few_documents_are_a_data_error(base: Path, tmp_path: Path, count: int, name: str) -> None:
    write_texts(tmp_path / "few", count)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(base, tmp_path / "few", tmp_path / "run"))
    expect_three_lines(invoke("tune", recipe), 4, [])
    assert not (tmp_path / "run").exists()


def test_the_missions_own_recipe_is_planned_and_its_batch_warned_of(base: Path, corpus: Path, tmp_path: Path) -> None:
    llama = write_base(tmp_path / "llama", num_hidden_layers=3)
    overrides = ["--set", f"model.name_or_path={llama}", "--set", f"data.files={corpus}", "--json"]
    done = invoke("plan", str(EXAMPLE), *overrides)
    assert done.exit_code == 0, done.stderr
    plan = from_json(Plan, json.loads(done.stdout))
    assert (plan.micro_batch_sequences, plan.gradient_accumulation_steps) == (7, 2048)
    assert plan.effective_batch_size == 14_336
    assert (plan.precision, plan.double_quant, plan.compute_dtype) == ("nf4", True, "float16")
    assert (plan.activations, plan.packing, plan.epochs) == ("recompute", False, 3.0)
    assert plan.eval_batch_sequences == 10
    assert plan.optimizer_steps == 3
    [warning] = plan.warnings
    assert "14,336 sequences" in warning
    assert "3 optimizer steps, which teach next to nothing" in warning
    assert "Set train.effective_batch_size=" in warning
