"""The loop: optimizer steps over micro-batches, an adapter and step records out.

What a step sees is a function of (seed, step); how it is cut is the plan's business and changes no sum: each
micro-batch's nats are scaled by 1 / (tokens of the whole step) before they are added up. The learning rate is a
function of progress, which is steps done over steps planned, or minutes over minutes allowed where a time limit comes
first.

A step whose loss or gradient is not finite is never applied. In fp16 an overflowing gradient only halves the loss scale
and is reported as skipped; anything else ends the run with the documents' names. A step that runs out of memory is done
again from its beginning with micro-batches half as large.

Left out: more than one GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from drawplate.data.batches import Batch, cut_packed, cut_padded, step_indices, steps_per_epoch
from drawplate.errors import DoesNotFit, NumericError
from drawplate.model.adapter import Adapter
from drawplate.model.causal_lm import CausalLM
from drawplate.recipe import TrainSection
from drawplate.records import Evaluation, Plan, Sequence, StepRecord

INITIAL_LOSS_SCALE = 2.0**12
SMALLEST_LOSS_SCALE = 2.0**-8
SCALE_GROWTH_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How sequences become micro-batches: packed rows of at most `tokens`, or padded rows of `sequences`."""

    packing: bool
    tokens: int
    sequences: int = 1
    pad_to_multiple_of: int = 16
    pad_id: int = 0

    def __call__(self, sequences: Seq[Sequence]) -> list[Batch]:
        """The micro-batches of some sequences, in a fixed order."""
        if self.packing:
            return cut_packed(sequences, self.tokens, self.pad_to_multiple_of, self.pad_id)
        return cut_padded(sequences, self.sequences, self.pad_to_multiple_of, self.pad_id)

    def halved(self) -> Cutting | None:
        """Micro-batches half as large, None where that is impossible."""
        if self.packing:
            return replace(self, tokens=self.tokens // 2) if self.tokens // 2 >= self.pad_to_multiple_of else None
        return replace(self, sequences=self.sequences // 2) if self.sequences > 1 else None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train, and at which rate."""

    steps: int
    peak_rate: float
    kind: str
    warmup_ratio: float
    max_seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 at the end; whichever of steps and time is further."""
        by_time = seconds / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of the step about to be taken: linear warm-up, then constant, linear or cosine to zero."""
        progress = self.progress(step + 1, seconds)
        if self.kind != "constant" and progress < self.warmup_ratio:
            return self.peak_rate * progress / self.warmup_ratio
        if self.kind.startswith("constant"):
            return self.peak_rate
        left = (1 - self.progress(step, seconds)) / (1 - self.warmup_ratio)
        share = left if self.kind == "linear" else 0.5 * (1 - math.cos(math.pi * min(left, 1.0)))
        return self.peak_rate * max(min(share, 1.0), 0.0)


class Listener(Protocol):
    """Who is told what the loop does. All methods may do nothing."""

    def on_micro_batch(self, step: int, done: int, total: int, batch: Batch) -> None:
        """A micro-batch of `step` is done."""

    def on_step(self, record: StepRecord, progress: float) -> None:
        """An optimizer step is done (or was skipped)."""

    def on_evaluation(self, step: int, result: Evaluation) -> None:
        """The held-out documents were measured in between."""

    def on_warning(self, message: str) -> None:
        """Something a person should read."""


@dataclass
class TrainState:
    """What the loop carries from step to step, beside adapter and optimizer.

    `seconds` is wall time since training began, which the schedule follows; `step_seconds` is the part of it spent in
    optimizer steps, without the evaluations between them.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    best_adapter: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    stopped_because: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What to train on and how: the recipe's and the plan's words, resolved.

    Attributes:
        model: carries the adapter that is trained.
        sequences: the training windows.
        cutting: micro-batches.
        effective_batch: sequences in an optimizer step.
        schedule: steps and rates.
        section: the recipe's train section.
        fp16: scale the loss.
        evaluate: measures the held-out documents; None for never in between.
        eval_steps: steps between evaluations.
        patience: evaluations without gain before stopping; None for never.
        keep_best: remember the adapter of the lowest held-out loss.
        save: writes a checkpoint; None for none.
        save_steps: steps between checkpoints; the best evaluation so far is saved besides.
        loraplus_lr_ratio: the B matrices' learning rate over that of everything else.
    """

    model: CausalLM
    sequences: Seq[Sequence]
    cutting: Cutting
    effective_batch: int
    schedule: Schedule
    section: TrainSection
    fp16: bool = False
    evaluate: Callable[[], Evaluation] | None = None
    eval_steps: int | None = None
    patience: int | None = None
    keep_best: bool = True
    save: Callable[[TrainState], None] | None = None
    save_steps: int | None = None
    loraplus_lr_ratio: float = 1.0


def train(task: TrainTask, listener: Listener, state: TrainState) -> TrainState:
    """Train the model's adapter from `state` on, which is kept up to date; returns it.

    Raises:
        NumericError: a loss or gradient that is not finite.
        DoesNotFit: out of memory with the smallest micro-batch.
    """
    optimizer = make_optimizer(rate_groups(task.model.adapter, task.loraplus_lr_ratio), task.section)
    cutting, started = task.cutting, time.monotonic() - state.seconds
    while state.step < task.schedule.steps and not state.stopped_because:
        step_started = time.monotonic()
        rate = task.schedule.rate(state.step, state.seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        outcome, cutting = _step_within_memory(task, cutting, state, listener)
        applied = _apply(task, optimizer, outcome, state)
        state.seconds = time.monotonic() - started
        _account(task, outcome, state, applied, rate, time.monotonic() - step_started, listener)
        _evaluate_if_due(task, state, listener)
        _save_if_due(task, state)
        last_step_seconds = time.monotonic() - step_started
        limit = task.schedule.max_seconds
        if limit and state.seconds + last_step_seconds > limit:
            state.stopped_because = f"train.max_minutes: {limit / 60:g} minutes were used"
    optimizer.zero_grad(set_to_none=True)
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


@dataclass
class _StepOutcome:
    """Gradients of one optimizer step have been added up; nothing is applied yet."""

    nats: torch.Tensor
    counted: int
    tokens: int
    documents: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Nats per counted token; waits for the device."""
        return float(self.nats) / self.counted if self.counted else 0.0


def _step_within_memory(
    task: TrainTask, cutting: Cutting, state: TrainState, listener: Listener
) -> tuple[_StepOutcome, Cutting]:
    """One step's gradients; on running out of memory the step begins again with smaller micro-batches."""
    while True:
        try:
            return _accumulate(task, cutting, state, listener), cutting
        except torch.OutOfMemoryError as error:
            smaller = cutting.halved()
            reason = str(error).partition("\n")[0]
        # Outside the handler, which would keep the failed step's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if smaller is None:
            raise DoesNotFit(
                f"Step {state.step + 1} runs out of memory with a micro-batch of one sequence. {reason}",
                safe="Steps before it are complete.",
                next_step="Set memory.activations: offload, memory.weights: host, or a shorter data.max_length.",
            )
        size = f"{smaller.tokens:,} tokens" if smaller.packing else f"{smaller.sequences} sequences"
        listener.on_warning(f"Out of memory in step {state.step + 1}: it is done again with micro-batches of {size}.")
        cutting = smaller


def _accumulate(task: TrainTask, cutting: Cutting, state: TrainState, listener: Listener) -> _StepOutcome:
    parameters = task.model.adapter.parameters()
    for parameter in parameters:
        parameter.grad = None
    indices = step_indices(state.step, len(task.sequences), task.effective_batch, task.section.seed)
    epoch = state.step // steps_per_epoch(len(task.sequences), task.effective_batch)
    batches = cutting([task.sequences[i] for i in indices])
    counted = sum(batch.counted_tokens for batch in batches)
    nats = torch.zeros((), dtype=torch.float64)
    nats = nats.to(task.model.placement.device)
    for done, batch in enumerate(batches, 1):
        if batch.counted_tokens:
            scale = state.loss_scale / counted
            loss, nats_N = task.model.sum_nats(batch, scale=scale, dropout_seed=(task.section.seed, epoch))
            loss.backward()
            nats += nats_N.sum(dtype=torch.float64)
        listener.on_micro_batch(state.step + 1, done, len(batches), batch)
    documents = tuple(dict.fromkeys(name for batch in batches for name in batch.documents))
    return _StepOutcome(nats, counted, sum(batch.tokens for batch in batches), documents)


def _apply(task: TrainTask, optimizer: torch.optim.Optimizer, outcome: _StepOutcome, state: TrainState) -> float | None:
    """Take the optimizer's step; returns the gradient's norm, None where the step was skipped."""
    parameters = [p for p in task.model.adapter.parameters() if p.grad is not None]
    if not math.isfinite(outcome.loss):
        raise _not_finite("loss", outcome, state)
    if not parameters:
        return 0.0
    if state.loss_scale != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / state.loss_scale)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, task.section.max_grad_norm))
    if not math.isfinite(norm):
        if task.fp16 and state.loss_scale > SMALLEST_LOSS_SCALE:
            state.loss_scale, state.good_steps = state.loss_scale / 2, 0
            return None
        raise _not_finite("gradient", outcome, state)
    optimizer.step()
    state.good_steps += 1
    if task.fp16 and state.good_steps % SCALE_GROWTH_STEPS == 0:
        state.loss_scale *= 2
    return norm


def _not_finite(what: str, outcome: _StepOutcome, state: TrainState) -> NumericError:
    names = ", ".join(outcome.documents[:5]) + (" ..." if len(outcome.documents) > 5 else "")
    return NumericError(
        f"The {what} of step {state.step + 1} is not a number. Documents in it: {names}.",
        safe=f"The step was not applied; the adapter is that of step {state.step}.",
        next_step="Lower train.learning_rate, use bf16 or fp32 arithmetic, or look at the documents named.",
    )


def _account(  # noqa: PLR0913 - one line of the log has this many origins
    task: TrainTask,
    outcome: _StepOutcome,
    state: TrainState,
    norm: float | None,
    rate: float,
    seconds: float,
    listener: Listener,
) -> None:
    state.step += 1
    state.tokens += outcome.tokens
    state.step_seconds += seconds
    state.skipped_steps += norm is None
    state.first_loss = outcome.loss if state.first_loss is None else state.first_loss
    state.last_loss = outcome.loss
    if norm is None:
        listener.on_warning(
            f"Step {state.step} overflowed fp16 and was skipped; loss scale is now {state.loss_scale:g}."
        )
    record = StepRecord(
        step=state.step,
        epoch=state.step / steps_per_epoch(len(task.sequences), task.effective_batch),
        loss=outcome.loss,
        learning_rate=rate,
        grad_norm=norm if norm is not None else 0.0,
        tokens=outcome.tokens,
        counted_tokens=outcome.counted,
        seconds=seconds,
        skipped=norm is None,
    )
    listener.on_step(record, task.schedule.progress(state.step, state.seconds))


def _evaluate_if_due(task: TrainTask, state: TrainState, listener: Listener) -> None:
    if task.evaluate is None or not task.eval_steps or state.step % task.eval_steps:
        return
    result = task.evaluate()
    listener.on_evaluation(state.step, result)
    note_evaluation(task, state, result)
    if task.patience and state.evaluations_without_gain >= task.patience:
        state.stopped_because = f"held-out loss did not improve in {task.patience} evaluations"


def _save_if_due(task: TrainTask, state: TrainState) -> None:
    by_count = task.save_steps is not None and state.step % task.save_steps == 0
    if task.save is not None and (by_count or state.best_step == state.step):
        task.save(state)


def note_evaluation(task: TrainTask, state: TrainState, result: Evaluation) -> None:
    """Compare a held-out measurement with the best so far, and remember the adapter if it is better."""
    if state.best_loss is not None and result.loss >= state.best_loss:
        state.evaluations_without_gain += 1
        return
    state.best_loss, state.best_step, state.evaluations_without_gain = result.loss, state.step, 0
    if task.keep_best:
        state.best_adapter = task.model.adapter.state()


def schedule_of(section: TrainSection, plan: Plan) -> Schedule:
    """The schedule that a recipe and its plan describe."""
    return Schedule(
        steps=plan.optimizer_steps,
        peak_rate=plan.learning_rate,
        kind=section.lr_scheduler_type,
        warmup_ratio=section.warmup_ratio,
        max_seconds=section.max_minutes * 60 if section.max_minutes else None,
    )
