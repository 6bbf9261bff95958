"""The whole story on one page.

    read documents -> hold some out -> plan -> load -> measure -> fine-tune -> measure again -> write it all down

Each step is a call into a floor below; what is handed over is a record. `tune` is the story, `plan` its beginning,
`evaluate` its middle alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from drawplate.checkpoint import Position, finished, good
from drawplate.compare_models import compare_models
from drawplate.data.batches import cut_padded
from drawplate.device import PeakMeter, is_lost
from drawplate.errors import StoppedSafely, UserError
from drawplate.evaluate import total
from drawplate.forecast import forecast
from drawplate.guards import Clock, StopRequested, StopSignals, Watchdog, leave_at_once, write_stacks
from drawplate.integrations.trackers import open_trackers
from drawplate.journal import Journal, Observer
from drawplate.measure import Scores, forgetting_warning, score, score_general, score_unquantized
from drawplate.model.adapter import lora_config, read_adapter, save_adapter, write_base_precision
from drawplate.model.assemble import assemble
from drawplate.model.causal_lm import CausalLM
from drawplate.model.error_start import without_start
from drawplate.model.self_check import self_check, warning_of
from drawplate.outcome import Outcome
from drawplate.prepare import (
    Prepared,
    evaluation_cutting,
    placement_of,
    prepare,
    train_cutting,
)
from drawplate.prove import Proof
from drawplate.prove import prove as replay
from drawplate.recipe import Recipe, expand
from drawplate.records import Evaluation, ModelScore, Plan, RunRecord
from drawplate.rehearse import enforce_cap, rehearsed
from drawplate.reopen import Reopened, recipe_of, refuse_finished, reopen
from drawplate.report.card import model_card
from drawplate.report.html import render_report
from drawplate.run_folder import CHECKPOINTS_NAME, RECIPE_NAME, START_NAME, UNQUANTIZED_NAME, RunFolder
from drawplate.saving import Saving, where
from drawplate.train import INITIAL_LOSS_SCALE, TrainTask, make_optimizer, rate_groups, schedule_of, train

SELF_CHECK_TOKENS = 64


def tune(recipe: Recipe, observer: Observer | None = None) -> RunRecord:
    """Measure, fine-tune, measure again; leaves the run folder and returns its record.

    Args:
        recipe: what the user wants.
        observer: told the progress, often.

    Raises:
        StoppedSafely: a signal came; what was trained is saved, and `resume` goes on with it.
        UserError: whatever a person can act on; the folder then holds what was safe to write.
    """
    folder = RunFolder(expand(recipe.output_dir))
    folder.check_free()
    return _run(recipe, folder, observer)


def resume(path: str | Path, observer: Observer | None = None, *, accept: Collection[str] = ()) -> RunRecord:
    """Go on with a run that ended early, from its newest good checkpoint, as if it had never stopped.

    Args:
        path: the run's folder.
        observer: told the progress, often.
        accept: keys of what was changed since and is accepted: recipe keys, `model`, `data`.

    Raises:
        IntegrityError: no checkpoint is good, or the base model or the data changed.
        UsageError: there is no run, it is finished, or its recipe changed.
        UserError: as `tune`.
    """
    folder = RunFolder(expand(str(path)))
    refuse_finished(folder)
    return _run(recipe_of(folder), folder, observer, accept)


def prove(path: str | Path, observer: Observer | None = None) -> Proof:
    """Replay a run from its last checkpoint but one to its last, and compare what is trained, byte for byte.

    Raises:
        UserError: as `resume`; the run's files are only read.
    """
    folder = RunFolder(expand(str(path)))
    with ExitStack() as stack:
        stack.callback(folder.release)
        folder.claim_again()
        journal = Journal(observer)
        return replay(
            folder,
            journal,
            lambda prepared: _assembled(prepared, journal),
            lambda prepared, model: train_task(prepared, model, None),
        )


def _run(
    recipe: Recipe, folder: RunFolder, observer: Observer | None, resuming: Collection[str] | None = None
) -> RunRecord:
    """Both of them; `resuming` holds the accepted changes of a run that is taken up again."""
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), Clock()
    with ExitStack() as stack:
        stack.callback(folder.release)
        stop = stack.enter_context(StopSignals(clock))
        peak = stack.enter_context(PeakMeter())
        journal = Journal(observer, log_frequency=recipe.memory.log_frequency)
        journal.trackers = stack.enter_context(open_trackers(recipe, journal.on_warning))
        if resuming is not None:
            folder.claim_again()
        with journal.in_phase("read"):
            reopened = reopen(folder, recipe, resuming) if resuming is not None else None
            prepared = reopened.prepared if reopened else prepare(recipe)
        if resuming is None:
            folder.claim()
        stack.callback(journal.close)
        outcome = Outcome(prepared, journal, peak, started, stop=stop, clock=clock)
        try:
            return _tell(outcome, folder, reopened)
        except BaseException as error:
            _break_off(outcome, folder, error)
            raise


def plan(recipe: Recipe, gpu: str | None = None) -> Plan:
    """What `tune` would do, need and take, here or on a card that is not here; see forecast.py."""
    return forecast(recipe, gpu)


def evaluate(
    model: str | Seq[str],
    adapter: str | Seq[str] | None,
    files: Seq[str],
    *,
    settings: Seq[str] = (),
    observer: Observer | None = None,
) -> dict[str, ModelScore]:
    """Perplexity and bits per byte of models and adapters on the same documents, each compared with the first.

    Args:
        model: folder or repository name of a base model, or several.
        adapter: folder of a PEFT LoRA adapter, or several, or None.
        files: files or folders of documents; all of them are measured.
        settings: recipe keys, like `quantization.precision=nf4`.
        observer: told the progress.

    Returns:
        name -> score: `base model` and `with adapter` for one model with at most one adapter, else their own names.

    Raises:
        UserError: whatever a person can act on.
    """
    models = [model] if isinstance(model, str) else list(model)
    adapters = [adapter] if isinstance(adapter, str) else list(adapter or ())
    return compare_models(models, adapters, files, Journal(observer), settings)


def _tell(outcome: Outcome, folder: RunFolder, reopened: Reopened | None) -> RunRecord:
    """Load, measure, train, measure, write."""
    journal = outcome.journal
    _write_beginnings(outcome, folder, reopened)
    if "baseline" not in outcome.scores:
        outcome.scores["unquantized"], outcome.start = score_unquantized(outcome.prepared, journal)
    with journal.in_phase("load"):
        enforce_cap(outcome.prepared)
        outcome.model = _load(outcome)
    if "baseline" not in outcome.scores:
        with journal.in_phase("rehearse"):
            _rehearse(outcome, folder)
    model = outcome.model
    if "baseline" not in outcome.scores:
        with journal.in_phase("baseline"):
            _measure(outcome, model, "baseline", step=0)
            _measure_general(outcome, model, "general baseline")
    with journal.in_phase("train"):
        _train(outcome, model, folder, reopened)
    with journal.in_phase("final"):
        _measure(outcome, model, "final", step=outcome.state.step)
        _keep_the_best(outcome, model)
        _measure_general(outcome, model, "general final")
    with journal.in_phase("save"):
        _save_adapter(outcome, folder)
    record = outcome.record("finished")
    folder.write_text("adapter/README.md", model_card(record, model.adapter.config.to_dict()))
    return _write(record, folder)


def _break_off(outcome: Outcome, folder: RunFolder, error: BaseException) -> None:
    """Write what is known of a run that ends before its time; leave nothing, if nothing of it was trained."""
    journal, state = outcome.journal, outcome.state
    saved = any(Position.of(path) != Position(0) for path in finished(folder.checkpoints))
    if outcome.model is None or (state.step == 0 and not saved):
        folder.abandon()
        return
    stopped = isinstance(error, (KeyboardInterrupt, StoppedSafely))
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    what = error.what if isinstance(error, UserError) else what
    try:
        if not is_lost():
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
        if outcome.start:
            write_base_precision(partial, outcome.prepared.plan.precision)
        outcome.prepared.tokenizer.save_pretrained(partial)

    folder.write_folder("adapter", fill)
    if outcome.start:
        trained = state if state is not None else model.adapter.state()
        config, difference = without_start(model.adapter.config, trained, outcome.start)
        folder.write_folder(UNQUANTIZED_NAME, lambda partial: save_adapter(partial, config, difference, trained))


def _write(record: RunRecord, folder: RunFolder) -> RunRecord:
    folder.write_json("record.json", record)
    folder.write_text("report.html", render_report(record))
    return record


def _write_beginnings(outcome: Outcome, folder: RunFolder, reopened: Reopened | None) -> None:
    prepared, journal = outcome.prepared, outcome.journal
    folder.write_text(RECIPE_NAME, prepared.recipe.to_yaml())  # first: with it, the folder is a run's
    journal.open(folder.path, folder.make_room)
    folder.write_json("plan.json", prepared.plan)
    folder.write_lines("intake.jsonl", prepared.corpus.intake)
    if reopened is None:
        for warning in prepared.plan.warnings:
            journal.on_warning(warning)
        return
    outcome.take_up(reopened.about, measured=reopened.measured)
    outcome.resumed.append(f"after {Position.of(reopened.checkpoint)}")
    journal.write("resumed", {"checkpoint": reopened.checkpoint.name})
    journal.message(f"The run goes on after {Position.of(reopened.checkpoint)}.")
    for note in reopened.notes:
        journal.on_warning(note)


def _assembled(prepared: Prepared, journal: Journal) -> CausalLM:
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    return assemble(
        checkpoint,
        placement_of(prepared.plan, prepared.device),
        lambda anatomy: lora_config(recipe.lora, anatomy, checkpoint.loadable_name, checkpoint.revision),
        seed=recipe.train.seed,
        progress=lambda done, count: journal.show(done, count, "layers"),
        tell=journal.on_warning,
    )


def _load(outcome: Outcome) -> CausalLM:
    prepared, journal = outcome.prepared, outcome.journal
    model = _assembled(prepared, journal)
    if outcome.self_check_difference is not None:
        return model
    sample = max(prepared.heldout.sequences, key=len)
    start = slice(0, SELF_CHECK_TOKENS)
    short = replace(sample, input_ids=sample.input_ids[start], counted=sample.counted[start])
    outcome.self_check_difference = self_check(model, cut_padded([short], 1, 1, 0)[0])
    if warning := warning_of(model, outcome.self_check_difference):
        journal.on_warning(warning)
    return model


def _rehearse(outcome: Outcome, folder: RunFolder) -> None:
    """The worst batches first; where the plan has to be made anew, another model goes on."""
    assert outcome.model is not None
    models, outcome.model, journal = [outcome.model], None, outcome.journal
    outcome.prepared, outcome.rehearsal = rehearsed(
        outcome.prepared, models, folder.path, journal, lambda smaller: _assembled(smaller, journal)
    )
    outcome.model = models[0]
    folder.write_json("plan.json", outcome.prepared.plan)


def _measure(outcome: Outcome, model: CausalLM, name: str, step: int) -> Evaluation:
    with _stopping_safely(outcome):
        scores = _heldout_scores(outcome, model, outcome.journal)
    outcome.scores[name] = scores
    result = total(scores)
    outcome.journal.on_evaluation(step, result)
    return result


def _train(outcome: Outcome, model: CausalLM, folder: RunFolder, reopened: Reopened | None) -> None:
    prepared, recipe, state = outcome.prepared, outcome.prepared.recipe, outcome.state
    optimizer = make_optimizer(rate_groups(model.adapter, recipe.lora.loraplus_lr_ratio), recipe.train)
    saving = Saving(folder, outcome, optimizer)
    if reopened:
        saving.take_up(reopened.checkpoint, state, same=reopened.same)
        outcome.start = read_adapter(folder.path / START_NAME)[1] if (folder.path / START_NAME).is_dir() else {}
    else:
        _take_start(outcome, model, folder)
        state.loss_scale = INITIAL_LOSS_SCALE if prepared.plan.compute_dtype == "float16" else 1.0
    task = replace(
        train_task(prepared, model, optimizer),
        evaluate=lambda: total(_heldout_scores(outcome, model, None)),
        keeper=saving,
        stop=outcome.stop,
        clock=outcome.clock,
    )
    with Watchdog(outcome.clock, lambda waited, usual: _leave_hung(outcome, folder, saving, waited)) as watchdog:
        saving.save(state)
        outcome.stop.graceful = True
        train(replace(task, watchdog=watchdog), outcome.journal, state)
        saving.save(state)


def _take_start(outcome: Outcome, model: CausalLM, folder: RunFolder) -> None:
    """The adapter as it is to start, after the base model was measured without it; kept for the end of the run."""
    if not outcome.start:
        return
    start = model.adapter.state() | outcome.start
    model.adapter.load_state(start, "the start")
    folder.write_folder(
        START_NAME, lambda partial: save_adapter(partial, model.adapter.config, outcome.start, outcome.start)
    )
    outcome.journal.message(
        f"The adapter starts from what {outcome.prepared.plan.precision} loses of the weights, not from zero."
    )


def train_task(prepared: Prepared, model: CausalLM, optimizer: torch.optim.Optimizer | None) -> TrainTask:
    """What a prepared run trains on and how; nobody saves, measures or watches yet."""
    recipe, chosen = prepared.recipe, prepared.plan
    return TrainTask(
        model=model,
        sequences=prepared.train.sequences,
        cutting=train_cutting(prepared),
        effective_batch=chosen.effective_batch_size,
        schedule=schedule_of(recipe.train, chosen),
        section=recipe.train,
        fp16=chosen.compute_dtype == "float16",
        optimizer=optimizer,
        loraplus_lr_ratio=recipe.lora.loraplus_lr_ratio,
        eval_steps=recipe.evaluation.eval_steps,
        patience=recipe.evaluation.early_stopping_patience,
        keep_best=recipe.evaluation.load_best_model_at_end,
        ledger=chosen.ledger,
    )


def _leave_hung(outcome: Outcome, folder: RunFolder, saving: Saving, waited_seconds: float) -> None:
    """The thread that trains does not answer: say where it hangs and leave without it."""
    stacks = folder.path / "stacks.txt"
    with suppress(OSError):
        write_stacks(stacks)
    error = saving.stopped(
        f"Step {outcome.state.step + 1} hangs: nothing came of it for {waited_seconds:.0f} s. What every thread was "
        f"doing is in {stacks}."
    )
    sys.stderr.write(f"\n{error}\n")
    sys.stderr.flush()
    leave_at_once(error.exit_code)


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


def _heldout_scores(outcome: Outcome, model: CausalLM, journal: Journal | None) -> Scores:
    prepared, look = outcome.prepared, outcome.stop.raise_if_requested
    return score(model, prepared.heldout.sequences, evaluation_cutting(prepared), journal, look=look)


def _measure_general(outcome: Outcome, model: CausalLM, name: str) -> None:
    """Text that is not of the domain; a rise beyond the recipe's limit is warned of."""
    with _stopping_safely(outcome):
        outcome.scores[name] = score_general(
            outcome.prepared, model, outcome.journal, look=outcome.stop.raise_if_requested
        )
    if warning := forgetting_warning(outcome.prepared.recipe, outcome.scores):
        outcome.journal.on_warning(warning)


@contextmanager
def _stopping_safely(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except StopRequested as signal_name:
        folder = outcome.prepared.recipe.output_dir
        raise StoppedSafely(
            f"The run was stopped by {signal_name} while the held-out documents were measured.",
            safe=where(good(expand(folder) / CHECKPOINTS_NAME, 1)),
            next_step=f"drawplate resume {folder}",
        ) from None
