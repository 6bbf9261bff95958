"""The loop: optimizer steps over micro-batches, an adapter and step records out.

What a step sees is a function of (seed, step); how it is cut is the plan's business and changes no sum
(step.py). The learning rate is a function of progress, which is steps done over steps planned, or minutes over
minutes allowed where a time limit comes first.

A step whose loss or gradient is not finite is never applied. In fp16 an overflowing gradient only halves the loss scale
and is reported as skipped. Anything else is a strike: the first step is skipped and its documents are named, the second
sends training back to the last good checkpoint, the third ends the run. A strike is forgotten after many good steps.

A stop that is asked for ends the run where nothing is lost: after the step, or in a long one after the micro-batch; an
evaluation in between is left and made again. Left out: more than one GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from drawplate.errors import NumericError, StoppedSafely
from drawplate.machine import device
from drawplate.model.layer.adapter import Adapter
from drawplate.recipe import TrainSection
from drawplate.records import Evaluation, StepRecord
from drawplate.train.guards import StopRequested, is_spike
from drawplate.train.step import StepOutcome, StepStopped, gradient_within_memory
from drawplate.train.task import Listener, TrainState, TrainTask

INITIAL_LOSS_SCALE = 2.0**12
SMALLEST_LOSS_SCALE = 2.0**-8
SCALE_GROWTH_STEPS = 200
STRIKE_FORGOTTEN_STEPS = 100
LOSSES_REMEMBERED = 50


def train(task: TrainTask, listener: Listener, state: TrainState) -> TrainState:
    """Train the model's adapter from `state` on, which is kept up to date; returns it.

    Raises:
        NumericError: losses or gradients that are not finite, again and again.
        DoesNotFit: out of memory with the smallest micro-batch.
        StoppedSafely: a signal came, or the device is lost.
    """
    groups = rate_groups(task.model.adapter, task.loraplus_lr_ratio)
    optimizer = task.optimizer or make_optimizer(groups, task.section)
    try:
        _loop(task, optimizer, listener, state)
    except torch.AcceleratorError as error:
        device.lost()
        raise _stopped(task, f"The device was lost ({str(error).partition(chr(10))[0]}).") from None
    finally:
        if task.watchdog:
            task.watchdog.rest()
    task.model.forget_graphs()
    if not state.micro_batches:
        task.model.adapter.drop_gradients()
    return state


def rate_groups(adapter: Adapter, loraplus_lr_ratio: float) -> list[dict[str, Any]]:
    """The adapter's tensors by the factor on their learning rate: `loraplus_lr_ratio` for the B matrices, else 1.

    B starts at zero and is read through A, so that equal rates move it too little in wide layers (LoRA+, Hayou, Ghosh
    and Yu 2024). One group where the ratio is 1.
    """
    if loraplus_lr_ratio == 1:
        return [{"params": adapter.parameters(), "rate_factor": 1.0}]
    named = adapter.named_tensors()
    fast = [tensor for name, tensor in named.items() if ".lora_B." in name]
    slow = [tensor for name, tensor in named.items() if ".lora_B." not in name]
    return [{"params": slow, "rate_factor": 1.0}, {"params": fast, "rate_factor": loraplus_lr_ratio}]


def make_optimizer(
    parameters: list[torch.nn.Parameter] | list[dict[str, Any]], section: TrainSection
) -> torch.optim.Optimizer:
    """AdamW over tensors, or groups of them; `adamw_8bit` keeps its moments in 8 bits (bitsandbytes)."""
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "weight_decay": section.weight_decay,
    }
    if section.optim == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def _loop(task: TrainTask, optimizer: torch.optim.Optimizer, listener: Listener, state: TrainState) -> None:
    state.mark = task.clock.now()
    _between_steps(task, state, listener)
    while state.step < task.schedule.steps and not state.stopped_because:
        if task.until == (state.step, 0):
            return
        began = task.clock.now()
        try:
            _take_step(task, optimizer, state, listener)
        except StepStopped:
            if task.until:
                return
            raise _stopped(
                task, f"The run was stopped by {task.stop.requested} within step {state.step + 1}."
            ) from None
        _between_steps(task, state, listener)
        state.pass_time(task.clock.now())
        limit, last_seconds = task.schedule.max_seconds, task.clock.now() - began
        if limit and state.seconds + last_seconds > limit:
            state.stopped_because = f"train.max_minutes: {limit / 60:g} minutes were used"


def _take_step(task: TrainTask, optimizer: torch.optim.Optimizer, state: TrainState, listener: Listener) -> None:
    state.pass_time(task.clock.now())
    if state.rate is None:
        state.rate = task.rates.get(state.step + 1, task.schedule.rate(state.step, state.seconds))
    for group in optimizer.param_groups:
        group["lr"] = state.rate * group.get("rate_factor", 1.0)
    if task.watchdog:
        task.watchdog.begin()
    outcome = gradient_within_memory(task, state, listener)
    problem, norm = _apply(task, optimizer, outcome, state)
    if task.watchdog:
        task.watchdog.beat()
        task.watchdog.rest()
    state.pass_time(task.clock.now(), in_step=True)
    if problem and _strike(task, problem, outcome, state, listener):
        return
    _account(task, outcome, state, norm, listener)
    if norm is None and not problem:
        listener.on_warning(
            f"Step {state.step} overflowed fp16 and was skipped; loss scale is now {state.loss_scale:g}."
        )


def _apply(
    task: TrainTask, optimizer: torch.optim.Optimizer, outcome: StepOutcome, state: TrainState
) -> tuple[str, float | None]:
    """Take the optimizer's step. What was not a number, if anything; and the gradient's norm, None if skipped."""
    parameters = [p for p in task.model.adapter.parameters() if p.grad is not None]
    if not math.isfinite(outcome.loss):
        return "loss", None
    if not parameters or outcome.counted == 0:
        return "", 0.0
    if state.loss_scale != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / state.loss_scale)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, task.section.max_grad_norm))
    if not math.isfinite(norm):
        if task.fp16 and state.loss_scale > SMALLEST_LOSS_SCALE:
            state.loss_scale, state.good_steps = state.loss_scale / 2, 0
            return "", None
        return "gradient", None
    optimizer.step()
    state.good_steps += 1
    if task.fp16 and state.good_steps % SCALE_GROWTH_STEPS == 0:
        state.loss_scale *= 2
    return "", norm


def _strike(task: TrainTask, problem: str, outcome: StepOutcome, state: TrainState, listener: Listener) -> bool:
    """What becomes of a step that is not a number; True where training went back, False where the step is skipped.

    Raises:
        NumericError: it happened before, and going back did not help.
    """
    state.strikes, state.good_since_strike = state.strikes + 1, 0
    what = f"The {problem} of step {state.step + 1} is not a number. Documents in it: {outcome.names}."
    if state.strikes == 1:
        listener.on_warning(f"{what} The step is skipped.")
        return False
    if state.strikes == 2 and task.keeper and task.keeper.rewind(state):
        listener.on_warning(f"{what} It is not the first: training goes back to step {state.step}.")
        return True
    raise NumericError(
        what,
        safe=f"The step was not applied; the adapter is that of step {state.step}."
        + (f" {task.keeper.where()}" if task.keeper else ""),
        next_step="Lower train.learning_rate, use bf16 or fp32 arithmetic, or look at the documents named.",
    )


def _account(task: TrainTask, outcome: StepOutcome, state: TrainState, norm: float | None, listener: Listener) -> None:
    loss, rate, seconds = outcome.loss, state.rate or 0.0, state.seconds_in_step
    state.begin_step_again()
    state.rate, state.seconds_in_step = None, 0.0
    state.step += 1
    state.tokens += outcome.tokens
    state.step_seconds += seconds
    state.skipped_steps += norm is None
    if math.isfinite(loss):
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.last_loss = loss
        _look_for_spike(outcome, state, listener)
    record = StepRecord(
        step=state.step,
        epoch=state.step / task.order.steps_per_epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm if norm is not None else 0.0,
        tokens=outcome.tokens,
        counted_tokens=outcome.counted,
        seconds=seconds,
        skipped=norm is None,
    )
    listener.on_step(record, task.schedule.progress(state.step, state.seconds))


def _look_for_spike(outcome: StepOutcome, state: TrainState, listener: Listener) -> None:
    if is_spike(state.recent_losses, outcome.loss):
        listener.on_warning(
            f"The loss of step {state.step} jumped to {outcome.loss:.2f}. Documents in it: {outcome.names}."
        )
    state.recent_losses = [*state.recent_losses, outcome.loss][-LOSSES_REMEMBERED:]
    state.good_since_strike += 1
    if state.good_since_strike >= STRIKE_FORGOTTEN_STEPS:
        state.strikes = 0


def _between_steps(task: TrainTask, state: TrainState, listener: Listener) -> None:
    """Evaluate and save where it is time; leave if somebody asked."""
    if state.micro_batches or task.until:
        return
    try:
        if not task.stop.requested:
            _evaluate_if_due(task, state, listener)
    except StopRequested:
        pass  # the evaluation is still due when the run goes on
    if task.keeper and (task.stop.requested or task.keeper.due(state)):
        task.keeper.save(state)
    if task.stop.requested:
        raise _stopped(task, f"The run was stopped by {task.stop.requested} after step {state.step}.")


def _evaluate_if_due(task: TrainTask, state: TrainState, listener: Listener) -> None:
    if task.evaluate is None or not task.eval_steps or state.step % task.eval_steps:
        return
    if state.step == state.evaluated_step:
        return
    task.model.forget_graphs()
    result = task.evaluate()
    state.evaluated_step = state.step
    listener.on_evaluation(state.step, result)
    note_evaluation(task, state, result)
    if task.patience and state.evaluations_without_gain >= task.patience:
        state.stopped_because = f"held-out loss did not improve in {task.patience} evaluations"


def note_evaluation(task: TrainTask, state: TrainState, result: Evaluation) -> None:
    """Compare a held-out measurement with the best so far, and remember the adapter if it is better."""
    if state.best_loss is not None and result.loss >= state.best_loss:
        state.evaluations_without_gain += 1
        return
    state.best_loss, state.best_step, state.evaluations_without_gain = result.loss, state.step, 0
    if task.keep_best:
        state.best_adapter = task.model.adapter.state()


def _stopped(task: TrainTask, why: str) -> StoppedSafely:
    if task.keeper:
        return task.keeper.stopped(why)
    return StoppedSafely(why, next_step="Start again.")
