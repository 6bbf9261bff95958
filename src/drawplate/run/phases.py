"""What each phase of a run does to its outcome: load, rehearse, measure, train, keep the best.

tune.py says in which order they come; what they have come to so far is the outcome's (outcome.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from drawplate.checkpoint.write import good
from drawplate.errors import StoppedSafely
from drawplate.evaluation.score import total
from drawplate.machine.memory import PeakMeter
from drawplate.machine.speed import forget_if_disturbed
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import read_adapter, save_adapter
from drawplate.model.load.assemble import assemble
from drawplate.model.load.self_check import check_bytes, in_words, self_check, warnings_of
from drawplate.model.placement import placement_of
from drawplate.model.support.targets import lora_config
from drawplate.recipe import expand
from drawplate.records import Evaluation, Sequence
from drawplate.run.folder import CHECKPOINTS_NAME, START_NAME, RunFolder
from drawplate.run.heldout import Scores, forgetting_warning, give_back_memory, score, score_deployed, score_general
from drawplate.run.journal import Journal
from drawplate.run.outcome import Outcome
from drawplate.run.prepare import Prepared, evaluation_cutting, train_cutting
from drawplate.run.rehearse import learn_overheads, rehearsed, room_for_check
from drawplate.run.resume import Reopened
from drawplate.run.saving import Saving, where
from drawplate.screen import screen
from drawplate.train.guards import StopRequested, Watchdog, leave_at_once, write_stacks
from drawplate.train.loop import INITIAL_LOSS_SCALE, make_optimizer, rate_groups, train
from drawplate.train.task import TrainTask, schedule_of

SELF_CHECK_TOKENS = 48, 16
"""Of the longest held-out window, and of the longest that is trained on."""


def assembled(prepared: Prepared, journal: Journal) -> CausalLM:
    """The model as the plan places it."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    return assemble(
        checkpoint,
        placement_of(prepared.plan, prepared.device),
        lambda anatomy: lora_config(recipe.lora, anatomy, checkpoint.loadable_name, checkpoint.revision),
        seed=recipe.train.seed,
        progress=lambda done, count: journal.show(done, count, "layers"),
        tell=journal.on_warning,
    )


def load_model(outcome: Outcome) -> CausalLM:
    """The model, checked against transformers' own loss and gradient where that was not done before."""
    model = assembled(outcome.prepared, outcome.journal)
    if outcome.self_check is None:
        check_model(outcome, outcome.prepared, model)
    return model


def check_model(outcome: Outcome, prepared: Prepared, model: CausalLM) -> None:
    """Compare its loss and gradient on two short texts, within what there is of the device; say what is wrong.

    Raises:
        NumericError: another model would be trained.
    """
    texts = [
        _short(max(tokens.sequences, key=len), length)
        for tokens, length in zip((prepared.heldout, prepared.train), SELF_CHECK_TOKENS, strict=True)
    ]
    with PeakMeter.apart() as meter:
        with room_for_check(prepared, check_bytes(model, texts), outcome.journal.message) as room_bytes:
            outcome.self_check = self_check(model, texts, packed=prepared.plan.packing, room_bytes=room_bytes)
        outcome.self_check_bytes = meter.device_peak_bytes
    for warning in warnings_of(model, outcome.self_check):
        outcome.journal.on_warning(warning)
    if said := in_words(outcome.self_check):
        outcome.journal.message(said)


def _short(text: Sequence, length: int) -> Sequence:
    """A part of it in which the loss counts tokens, if there is one."""
    counted = text.counted.nonzero()[0]
    start = max(0, min(int(counted[0]) - 1 if len(counted) else 0, len(text) - length))
    part = slice(start, start + length)
    return replace(text, input_ids=text.input_ids[part], counted=text.counted[part])


def rehearse_worst(outcome: Outcome, folder: RunFolder) -> None:
    """The worst batches first; where the plan has to be made anew, another model goes on."""
    assert outcome.model is not None
    models, outcome.model, journal = [outcome.model], None, outcome.journal
    outcome.prepared, outcome.rehearsal = rehearsed(
        outcome.prepared, models, folder.path, journal, lambda smaller: _checked(outcome, smaller)
    )
    outcome.model = models[0]
    folder.write_json("plan.json", outcome.prepared.plan)


def _checked(outcome: Outcome, prepared: Prepared) -> CausalLM:
    """A model for another plan, which may compute its gradient in another way."""
    model = assembled(prepared, outcome.journal)
    check_model(outcome, prepared, model)
    return model


def measure_heldout(outcome: Outcome, model: CausalLM, name: str, step: int) -> Evaluation:
    """The held-out documents; their scores are kept under that name."""
    with _stopping_safely(outcome):
        scores = _heldout_scores(outcome, model, outcome.journal)
    outcome.scores[name] = scores
    result = total(scores)
    outcome.journal.on_evaluation(step, result)
    return result


def measure_general(outcome: Outcome, model: CausalLM, name: str) -> None:
    """Text that is not of the domain; a rise beyond the recipe's limit is warned of."""
    with _stopping_safely(outcome):
        outcome.scores[name] = score_general(
            outcome.prepared, model, outcome.journal, look=outcome.stop.raise_if_requested
        )
    if warning := forgetting_warning(outcome.prepared.recipe, outcome.scores):
        outcome.journal.on_warning(warning)


def measure_deployed(outcome: Outcome, folder: RunFolder) -> None:
    """The unquantized base model with the adapter that was written for it: what a person has when the run is over.

    The run's own model is released for it. Nothing where the plan leaves it out, or where the unquantized model could
    not be measured before.
    """
    prepared, journal, before = outcome.prepared, outcome.journal, outcome.scores.get("unquantized")
    if not before:
        return
    if not prepared.plan.measures_deployed:
        journal.message(f"The unquantized base model with the adapter is {prepared.plan.reasons['measures_deployed']}.")
        return
    outcome.release_model()
    give_back_memory()
    adapter, documents = folder.path / outcome.deployed_adapter, {score.document for score in before}
    with _stopping_safely(outcome):
        look = outcome.stop.raise_if_requested
        outcome.scores["deployed"] = score_deployed(prepared, adapter, documents, journal, look=look)
    if scores := outcome.scores["deployed"]:
        journal.message(
            f"Held-out perplexity of the unquantized base model {total(before).perplexity:.2f}, with {adapter.name} "
            f"{total(scores).perplexity:.2f}"
        )


def _heldout_scores(outcome: Outcome, model: CausalLM, journal: Journal | None) -> Scores:
    prepared, look = outcome.prepared, outcome.stop.raise_if_requested
    return score(model, prepared.heldout.sequences, evaluation_cutting(prepared), journal, look=look)


def keep_the_best(outcome: Outcome, model: CausalLM) -> None:
    """Put back the adapter with the lowest held-out loss, if a measurement in between found a better one."""
    state, final = outcome.state, total(outcome.scores["final"])
    if state.best_adapter is None or state.best_loss is None or state.best_loss >= final.loss:
        state.best_step = state.step
        return
    step = state.best_step or 0
    model.adapter.load_state(state.best_adapter, f"the adapter of step {step}")
    outcome.journal.message(f"The adapter of step {step} was better on the held-out documents and is kept.")
    measure_heldout(outcome, model, "final", step=step)


def train_adapter(outcome: Outcome, model: CausalLM, folder: RunFolder, reopened: Reopened | None) -> None:
    """All optimizer steps that are left, with a checkpoint before the first and after the last."""
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
    _doubt_the_probe(outcome)
    learn_overheads(prepared, outcome.rehearsal)


def _doubt_the_probe(outcome: Outcome) -> None:
    """A run that was much faster than its plan is told, and the next plan measures the machine anew."""
    plan, state = outcome.prepared.plan, outcome.state
    if not plan.times or not state.step_seconds:
        return
    measured, predicted = state.tokens / state.step_seconds, plan.times.tokens_per_second
    dtype = getattr(torch, plan.compute_dtype)
    if forget_if_disturbed(outcome.prepared.device, dtype, predicted=predicted, measured=measured):
        outcome.journal.message(
            f"Training ran at {measured:,.0f} tokens/s where {predicted:,.0f} were predicted: this machine seems to "
            "have been busy when its speed was measured. The next plan measures it anew."
        )


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
    screen().write(f"\n{error}\n")
    screen().flush()
    leave_at_once(error.exit_code)


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
