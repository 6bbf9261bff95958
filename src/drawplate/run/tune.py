"""The whole story on one page.

    read documents -> hold some out -> plan -> load -> measure -> fine-tune -> measure again -> write it all down

Each step is a call into a floor below (phases.py for those that need the model); what is handed over is a record.
`tune` is the story, `plan` its beginning, `evaluate` its middle alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from pathlib import Path

import torch

from drawplate.checkpoint.write import Position, finished
from drawplate.errors import StoppedSafely, UserError
from drawplate.machine.device import is_lost
from drawplate.machine.memory import PeakMeter
from drawplate.model.base.adapter_base import AdapterBase, write_base
from drawplate.model.base.adapter_config import CONFIG_NAME
from drawplate.model.footprint.measure import Tell, unheard
from drawplate.model.layer.adapter import require_adapter_loads, save_adapter
from drawplate.model.load.lora_init import without_start
from drawplate.recipe import Recipe, expand
from drawplate.records import AdapterFacts, ModelScore, Plan, RunRecord
from drawplate.report.card import CARD_NAME, model_card
from drawplate.report.html import render_report
from drawplate.run.evaluate import compare_models
from drawplate.run.folder import ADAPTER_NAME, RECIPE_NAME, UNQUANTIZED_NAME, RunFolder
from drawplate.run.forecast import forecast
from drawplate.run.heldout import score_unquantized
from drawplate.run.journal import Journal, Observer
from drawplate.run.launch import require_one_process
from drawplate.run.outcome import Outcome
from drawplate.run.phases import (
    assembled,
    keep_the_best,
    load_model,
    measure_deployed,
    measure_general,
    measure_heldout,
    rehearse_worst,
    train_adapter,
    train_task,
)
from drawplate.run.prepare import prepare
from drawplate.run.prove import Proof
from drawplate.run.prove import prove as replay
from drawplate.run.rehearse import enforce_cap
from drawplate.run.resume import Reopened, recipe_of, refuse_finished, reopen
from drawplate.run.trackers import open_trackers
from drawplate.run.trained_on import write_trained_on
from drawplate.screen import log_into
from drawplate.train.guards import Clock, StopSignals


def tune(recipe: Recipe, observer: Observer | None = None) -> RunRecord:
    """Measure, fine-tune, measure again; leaves the run folder and returns its record.

    Args:
        recipe: what the user wants.
        observer: told the progress, often.

    Raises:
        StoppedSafely: a signal came; what was trained is saved, and `resume` goes on with it.
        UserError: whatever a person can act on; the folder then holds what was safe to write.
    """
    require_one_process()
    folder = RunFolder(expand(recipe.output_dir))
    folder.check_free()
    return _run(recipe.located(), folder, observer)


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
    require_one_process()
    folder = RunFolder(expand(str(path)))
    folder.require_run()
    refuse_finished(folder)
    return _run(recipe_of(folder), folder, observer, accept)


def prove(path: str | Path, observer: Observer | None = None) -> Proof:
    """Replay a run from its last checkpoint but one to its last, and compare what is trained, byte for byte.

    Raises:
        UserError: as `resume`; the run's files are only read.
    """
    require_one_process()
    folder = RunFolder(expand(str(path)))
    with ExitStack() as stack:
        stack.callback(folder.release)
        folder.claim_again()
        journal = Journal(observer)
        return replay(
            folder,
            journal,
            lambda prepared: assembled(prepared, journal),
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
            prepared = reopened.prepared if reopened else prepare(recipe, journal.message)
        if resuming is None:
            folder.claim()
        stack.callback(journal.close)
        outcome = Outcome(prepared, journal, peak, started, stop=stop, clock=clock)
        try:
            return _tell(outcome, folder, reopened)
        except BaseException as error:
            _break_off(outcome, folder, error)
            raise


def plan(recipe: Recipe, gpu: str | None = None, tell: Tell = unheard) -> Plan:
    """What `tune` would do, need and take, here or on a card that is not here; see forecast.py."""
    return forecast(recipe, gpu, tell)


def evaluate(
    model: str | Path | Seq[str],
    adapter: str | Path | Seq[str] | None,
    files: str | Path | Seq[str],
    *,
    settings: str | Seq[str] = (),
    observer: Observer | None = None,
) -> dict[str, ModelScore]:
    """Perplexity and bits per byte of models and adapters on the same documents, each compared with the first.

    Args:
        model: folder or repository name of a base model, or several.
        adapter: folder of a PEFT LoRA adapter, or several, or None.
        files: a file or folder of documents, or several; all of them are measured.
        settings: recipe keys, one or several, like `quantization.precision=nf4`.
        observer: told the progress.

    Returns:
        name -> score: `base model` and `with adapter` for one model with at most one adapter, else their own names.

    Raises:
        UserError: whatever a person can act on.
    """
    require_one_process()
    adapters = _listed(adapter) if adapter is not None else []
    return compare_models(_listed(model), adapters, _listed(files), Journal(observer), _listed(settings))


def _listed(given: str | Path | Seq[str | Path]) -> list[str]:
    """One name is a list of one: a string's letters are no files."""
    return [str(given)] if isinstance(given, (str, Path)) else [str(one) for one in given]


def _tell(outcome: Outcome, folder: RunFolder, reopened: Reopened | None) -> RunRecord:
    """Load, measure, train, measure, write."""
    journal = outcome.journal
    _write_beginnings(outcome, folder, reopened)
    _train_and_measure(outcome, folder, reopened)
    with journal.in_phase("save"):
        _save_adapter(outcome, folder)
    measure_deployed(outcome, folder)
    record = outcome.record("finished")
    _write_cards(record, folder)
    return _write(record, folder)


def _train_and_measure(outcome: Outcome, folder: RunFolder, reopened: Reopened | None) -> None:
    """The model is loaded, measured, trained and measured again; the outcome alone holds it afterwards."""
    journal = outcome.journal
    if "baseline" not in outcome.scores:
        outcome.scores["unquantized"], outcome.start = score_unquantized(outcome.prepared, journal)
    with journal.in_phase("load"):
        enforce_cap(outcome.prepared)
        outcome.model = load_model(outcome)
        _require_an_ending(outcome, folder)
    if "baseline" not in outcome.scores:
        with journal.in_phase("rehearse"):
            rehearse_worst(outcome, folder)
    model = outcome.model
    if "baseline" not in outcome.scores:
        with journal.in_phase("baseline"):
            measure_heldout(outcome, model, "baseline", step=0)
            measure_general(outcome, model, "general baseline")
    with journal.in_phase("train"):
        train_adapter(outcome, model, folder, reopened)
    with journal.in_phase("final"):
        measure_heldout(outcome, model, "final", step=outcome.state.step)
        keep_the_best(outcome, model)
        measure_general(outcome, model, "general final")


def _require_an_ending(outcome: Outcome, folder: RunFolder) -> None:
    """What is written last is written once for nobody: what fails in it must fail before training."""
    assert outcome.model is not None
    record = outcome.record("stopped")
    render_report(record)
    facts = AdapterFacts(folder=ADAPTER_NAME, base_precision=record.model.precision)
    model_card(record, facts, outcome.model.adapter.config.to_dict())
    require_adapter_loads(outcome.model.adapter, outcome.model.anatomy, folder.path)


def _break_off(outcome: Outcome, folder: RunFolder, error: BaseException) -> None:
    """Write what is known of a run that ends before its time; leave nothing, if nothing of it was trained."""
    journal, state = outcome.journal, outcome.state
    saved = any(Position.of(path) != Position(0) for path in finished(folder.checkpoints))
    if not outcome.loaded or (state.step == 0 and not saved):
        folder.abandon()
        return
    stopped = isinstance(error, (KeyboardInterrupt, StoppedSafely))
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
    what = error.what if isinstance(error, UserError) else what
    try:
        if outcome.model is not None and not is_lost():
            _save_adapter(outcome, folder, state.best_adapter)
    except Exception as second:  # the error that ended the run is the one to tell of
        journal.on_warning(f"The adapter could not be written: {' '.join(str(second).splitlines())}")
    try:
        record = _write(outcome.record("stopped" if stopped else "failed", error=what), folder)
        _write_cards(record, folder)
    except Exception as second:
        journal.message(f"The record or the model card of this run could not be written: {second}")


def _save_adapter(outcome: Outcome, folder: RunFolder, state: dict[str, torch.Tensor] | None = None) -> None:
    """The adapter, as it is or as `state` has it, with the tokenizer beside it."""
    model = outcome.model
    assert model is not None
    name, sha256 = outcome.prepared.checkpoint.name, outcome.fingerprints["model"]
    base = AdapterBase(name=name, sha256=sha256, precision=outcome.prepared.plan.precision, bound=bool(outcome.start))

    def fill(partial: Path) -> None:
        model.adapter.save(partial, state)
        write_base(partial, base)
        outcome.prepared.tokenizer.save_pretrained(partial)

    folder.write_folder(ADAPTER_NAME, fill)
    if outcome.start:
        trained = state if state is not None else model.adapter.state()
        config, difference = without_start(model.adapter.config, trained, outcome.start)

        def fill_unquantized(partial: Path) -> None:
            save_adapter(partial, config, difference, trained)
            write_base(partial, AdapterBase(name=name, sha256=sha256))
            outcome.prepared.tokenizer.save_pretrained(partial)

        folder.write_folder(UNQUANTIZED_NAME, fill_unquantized)


def _write_cards(record: RunRecord, folder: RunFolder) -> None:
    for adapter in record.adapters:
        config = json.loads((folder.path / adapter.folder / CONFIG_NAME).read_text(encoding="utf-8"))
        folder.write_text(f"{adapter.folder}/{CARD_NAME}", model_card(record, adapter, config))


def _write(record: RunRecord, folder: RunFolder) -> RunRecord:
    folder.write_json("record.json", record)
    folder.write_text("report.html", render_report(record))
    if record.status == "finished" and not record.recipe["train"]["keep_checkpoints"]:
        folder.remove_checkpoints()
    return record


def _write_beginnings(outcome: Outcome, folder: RunFolder, reopened: Reopened | None) -> None:
    prepared, journal = outcome.prepared, outcome.journal
    folder.write_text(RECIPE_NAME, prepared.recipe.to_yaml())  # first: with it, the folder is a run's
    folder.tell = journal.on_warning
    log_into(folder.path)
    journal.open(folder.path, folder.make_room)
    folder.write_json("plan.json", prepared.plan)
    folder.write_lines("intake.jsonl", prepared.corpus.intake)
    write_trained_on(folder, prepared.split.train)
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
