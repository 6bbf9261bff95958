"""The whole story on one page.

    read documents -> hold some out -> plan -> load -> measure -> fine-tune -> measure again -> write it all down

Each step is a call into a floor below; what is handed over is a record. `tune` is the story, `plan` its beginning,
`evaluate` its middle alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from drawplate.checkpoint import save_checkpoint, write_folder
from drawplate.data.batches import cut_padded
from drawplate.data.documents import read_documents
from drawplate.data.tokens import Tokenized, load_tokenizer, tokenize
from drawplate.device import PeakMeter, pick_device
from drawplate.errors import StorageError, UserError
from drawplate.evaluate import score_documents, total
from drawplate.integrations.trackers import open_trackers
from drawplate.journal import Journal, Observer
from drawplate.model.adapter import lora_config, read_adapter
from drawplate.model.anatomy import build_anatomy
from drawplate.model.assemble import assemble
from drawplate.model.causal_lm import CausalLM
from drawplate.model.self_check import self_check
from drawplate.model.weights import open_checkpoint
from drawplate.outcome import Outcome
from drawplate.plan.choose import choose_max_length
from drawplate.prepare import (
    Prepared,
    choose_context_tokens,
    choose_plan,
    evaluation_cutting,
    max_positions,
    pad_id,
    placement_of,
    prepare,
    renderer_of,
    require_predictable,
    train_cutting,
)
from drawplate.recipe import DataSection, ModelSection, Recipe, expand
from drawplate.records import DocumentScore, Evaluation, Plan, RunRecord
from drawplate.report.card import model_card
from drawplate.report.html import render_report
from drawplate.run_folder import RunFolder
from drawplate.train import INITIAL_LOSS_SCALE, Cutting, TrainState, TrainTask, schedule_of, train

CHECKPOINTS_IN_A_RUN = 10
SELF_CHECK_TOKENS = 64
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def tune(recipe: Recipe, observer: Observer | None = None) -> RunRecord:
    """Measure, fine-tune, measure again; leaves the run folder and returns its record.

    Args:
        recipe: what the user wants.
        observer: told the progress, often.

    Raises:
        UserError: whatever a person can act on; the folder then holds what was safe to write.
    """
    folder, started = RunFolder(expand(recipe.output_dir)), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    folder.check_free()
    with ExitStack() as stack:
        stack.callback(folder.release)
        peak = stack.enter_context(PeakMeter())
        journal = Journal(observer, log_frequency=recipe.memory.log_frequency)
        journal.trackers = stack.enter_context(open_trackers(recipe, journal.on_warning))
        with journal.in_phase("read"):
            prepared = prepare(recipe)
        folder.claim()
        stack.callback(journal.close)
        outcome = Outcome(prepared, journal, peak, started)
        try:
            return _tell(outcome, folder)
        except BaseException as error:
            _break_off(outcome, folder, error)
            raise


def plan(recipe: Recipe) -> Plan:
    """What `tune` would do and need; loads no weights. Raises as `tune`."""
    return prepare(recipe).plan


def evaluate(
    model: str, adapter: str | None, files: Seq[str], *, observer: Observer | None = None
) -> dict[str, Evaluation]:
    """Perplexity of a model on documents, and with an adapter beside it.

    Args:
        model: folder or repository name of the base model.
        adapter: folder of a PEFT LoRA adapter, or None.
        files: files or folders of documents; all of them are measured.
        observer: told the progress.

    Raises:
        UserError: whatever a person can act on.
    """
    recipe = Recipe(model=ModelSection(name_or_path=model), data=DataSection(files=list(files)))
    config, state = read_adapter(expand(adapter)) if adapter else (None, {})
    journal = Journal(observer)
    with journal.in_phase("read"):
        checkpoint = open_checkpoint(recipe.model)
        tokenizer = load_tokenizer(checkpoint.folder)
        corpus = read_documents(recipe.data, recipe.data.files, renderer_of(tokenizer))
        max_length = choose_max_length(recipe, max_positions(checkpoint))
        context = choose_context_tokens(recipe, max_length)
        tokens = tokenize(corpus.documents, tokenizer, max_length, context_tokens=context)
        require_predictable(tokens, "given")
        chosen = choose_plan(recipe, checkpoint, build_anatomy(checkpoint.config), tokens, None, max_length)
    with journal.in_phase("load"):
        loaded = assemble(
            checkpoint,
            placement_of(chosen, pick_device(recipe.model.device_map)),
            config or (lambda anatomy: lora_config(recipe.lora, anatomy, model, None)),
            seed=0,
            progress=lambda done, count: journal.show(done, count, "layers"),
            tell=journal.on_warning,
        )
    cutting = Cutting(packing=True, tokens=chosen.micro_batch_tokens, pad_id=pad_id(tokenizer))
    results = {}
    with journal.in_phase("baseline"):
        results["base model"] = total(_scores(loaded, tokens, cutting, journal))
    if adapter:
        loaded.adapter.load_state(state, adapter)
        with journal.in_phase("evaluate"):
            results["with adapter"] = total(_scores(loaded, tokens, cutting, journal))
    return results


def _tell(outcome: Outcome, folder: RunFolder) -> RunRecord:
    """Load, measure, train, measure, write."""
    journal = outcome.journal
    _write_beginnings(outcome, folder)
    with journal.in_phase("load"):
        model = outcome.model = _load(outcome)
    with journal.in_phase("baseline"):
        _measure(outcome, model, "baseline", step=0)
    with journal.in_phase("train"):
        _train(outcome, model, folder)
    with journal.in_phase("final"):
        _measure(outcome, model, "final", step=outcome.state.step)
        _keep_the_best(outcome, model)
    with journal.in_phase("save"):
        _save_adapter(outcome, folder)
    record = outcome.record("finished")
    folder.write_text("adapter/README.md", model_card(record, model.adapter.config.to_dict()))
    return _write(record, folder)


def _break_off(outcome: Outcome, folder: RunFolder, error: BaseException) -> None:
    """Write what is known of a run that ends before its time; leave nothing, if it had not begun to train."""
    journal, state = outcome.journal, outcome.state
    if state.step == 0 or outcome.model is None:
        folder.abandon()
        return
    stopped = isinstance(error, KeyboardInterrupt)
    what = "interrupted" if stopped else error.what if isinstance(error, UserError) else type(error).__name__
    try:
        _save_adapter(outcome, folder, state.best_adapter)
        _write(outcome.record("stopped" if stopped else "failed", error=what), folder)
    except (OSError, UserError) as second:
        journal.message(f"The record of this run could not be written: {second}")


def _save_adapter(outcome: Outcome, folder: RunFolder, state: dict[str, torch.Tensor] | None = None) -> None:
    """The adapter, as it is or as `state` has it, with the tokenizer beside it."""
    model = outcome.model
    assert model is not None

    def fill(partial: Path) -> None:
        model.adapter.save(partial, state)
        outcome.prepared.tokenizer.save_pretrained(partial)

    write_folder(folder.path / "adapter", fill)


def _write(record: RunRecord, folder: RunFolder) -> RunRecord:
    folder.write_json("record.json", record)
    folder.write_text("report.html", render_report(record))
    return record


def _write_beginnings(outcome: Outcome, folder: RunFolder) -> None:
    prepared = outcome.prepared
    outcome.journal.open(folder.path)
    folder.write_text("recipe.yaml", prepared.recipe.to_yaml())
    folder.write_json("plan.json", prepared.plan)
    folder.write_lines("intake.jsonl", prepared.corpus.intake)
    for warning in prepared.plan.warnings:
        outcome.journal.on_warning(warning)


def _load(outcome: Outcome) -> CausalLM:
    prepared, journal = outcome.prepared, outcome.journal
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    model = assemble(
        checkpoint,
        placement_of(prepared.plan, prepared.device),
        lambda anatomy: lora_config(recipe.lora, anatomy, checkpoint.loadable_name, checkpoint.revision),
        seed=recipe.train.seed,
        progress=lambda done, count: journal.show(done, count, "layers"),
        tell=journal.on_warning,
    )
    sample = max(prepared.heldout.sequences, key=len)
    start = slice(0, SELF_CHECK_TOKENS)
    short = replace(sample, input_ids=sample.input_ids[start], counted=sample.counted[start])
    difference = outcome.self_check_difference = self_check(model, cut_padded([short], 1, 1, 0)[0])
    if difference is not None and not difference <= SELF_CHECK_TOLERANCE[model.placement.compute_dtype]:  # NaN too
        journal.on_warning(
            f"Self-check: the loss on a short text differs from transformers' own by {100 * difference:.2f} %. "
            "Results may not carry over to other programs."
        )
    return model


def _measure(outcome: Outcome, model: CausalLM, name: str, step: int) -> Evaluation:
    prepared = outcome.prepared
    scores = _scores(model, prepared.heldout, evaluation_cutting(prepared), outcome.journal)
    outcome.scores[name] = scores
    result = total(scores)
    outcome.journal.on_evaluation(step, result)
    return result


def _train(outcome: Outcome, model: CausalLM, folder: RunFolder) -> None:
    prepared, recipe = outcome.prepared, outcome.prepared.recipe
    fp16 = prepared.plan.compute_dtype == "float16"
    outcome.state.loss_scale = INITIAL_LOSS_SCALE if fp16 else 1.0
    task = TrainTask(
        model=model,
        sequences=prepared.train.sequences,
        cutting=train_cutting(prepared),
        effective_batch=prepared.plan.effective_batch_size,
        schedule=schedule_of(recipe.train, prepared.plan),
        section=recipe.train,
        fp16=fp16,
        evaluate=lambda: total(_scores(model, prepared.heldout, evaluation_cutting(prepared), None)),
        eval_steps=recipe.evaluation.eval_steps,
        patience=recipe.evaluation.early_stopping_patience,
        keep_best=recipe.evaluation.load_best_model_at_end,
        save=lambda state: _save_checkpoint(outcome, model, folder.path / "checkpoints", state),
        save_steps=_save_steps(prepared),
    )
    train(task, outcome.journal, outcome.state)


def _save_steps(prepared: Prepared) -> int:
    """Optimizer steps between checkpoints: as asked, else a tenth of the run."""
    asked = prepared.recipe.train.save_steps
    return asked if asked != "auto" else math.ceil(prepared.plan.optimizer_steps / CHECKPOINTS_IN_A_RUN)


def _save_checkpoint(outcome: Outcome, model: CausalLM, checkpoints: Path, state: TrainState) -> None:
    """A checkpoint that cannot be written costs a warning and not the run: the one before is still there."""
    facts = {"tokens": state.tokens, "seconds": state.seconds, "loss": state.last_loss}
    facts |= {"best_step": state.best_step, "best_heldout_loss": state.best_loss}
    try:
        save_checkpoint(checkpoints, state.step, model.adapter, facts, best_step=state.best_step)
    except StorageError as error:
        outcome.journal.on_warning(f"{error.what} {error.safe}")


def _keep_the_best(outcome: Outcome, model: CausalLM) -> None:
    """Put back the adapter with the lowest held-out loss, if a measurement in between found a better one."""
    state, final = outcome.state, total(outcome.scores["final"])
    if state.best_adapter is None or state.best_loss is None or state.best_loss >= final.loss:
        state.best_step = state.step
        return
    step = state.best_step or 0
    model.adapter.load_state(state.best_adapter, f"the adapter of step {step}")
    outcome.journal.message(f"The adapter of step {step} was better on the held-out documents and is kept.")
    _measure(outcome, model, "final", step=step)


def _scores(model: CausalLM, tokens: Tokenized, cutting: Cutting, journal: Journal | None) -> tuple[DocumentScore, ...]:
    batches = cutting(tokens.sequences)
    done = 0

    def show(_: object) -> None:
        nonlocal done
        done += 1
        if journal:
            journal.show(done, len(batches), "micro-batches")

    return score_documents(model, tokens.sequences, batches, on_batch=show)
