"""The nouns of training: how a step is cut, how long to train and at which rate, who listens, what is carried along.

`TrainTask` is what does not change while a run trains, `TrainState` what does: with the adapter and the optimizer's
moments, the state is all that has to be kept for going on bit for bit (checkpoint/snapshot.py writes it).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from drawplate.data.batches import Batch, Cutting
from drawplate.data.steps import StepOrder, target_tokens_of
from drawplate.errors import StoppedSafely
from drawplate.model.causal_lm import CausalLM
from drawplate.recipe import TrainSection
from drawplate.records import Evaluation, LedgerLine, Plan, Sequence, StepRecord
from drawplate.train.guards import Clock, StopSignals, Watchdog


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


def schedule_of(section: TrainSection, plan: Plan) -> Schedule:
    """The schedule that a recipe and its plan describe."""
    return Schedule(
        steps=plan.optimizer_steps,
        peak_rate=plan.learning_rate,
        kind=plan.lr_scheduler_type,
        warmup_ratio=plan.warmup_ratio,
        max_seconds=section.max_minutes * 60 if section.max_minutes else None,
    )


def order_of(sequences: Seq[Sequence], effective_batch: int, section: TrainSection) -> StepOrder:
    """The steps that a plan's batch and an advised recipe make of some sequences."""
    least = section.min_target_tokens
    return StepOrder(
        target_tokens=target_tokens_of(sequences),
        effective_batch=effective_batch,
        seed=section.seed,
        min_target_tokens=0 if least == "auto" else least,
    )


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
    """What the loop carries from step to step, beside adapter and optimizer; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps done, skipped ones among them.
        micro_batches: of the step after that which are done; their gradient is in the parameters' `grad`.
        step_nats: sum over those micro-batches; brought up to date when a checkpoint is written.
        rate: learning rate of a step that is under way, decided at its beginning.
        seconds_in_step: that a step which is under way has taken.
        seconds: time since training began, which the schedule follows.
        step_seconds: the part of it spent in optimizer steps, without the evaluations and checkpoints between them.
        evaluated_step: of the newest evaluation in between.
        cutting, policies: where memory forced something smaller than the plan's; None for the plan's.
        corrections: what memory forced, in words.
        recent_losses: of the last steps, to tell a spike.
        strikes: steps that were not a number and are not forgotten yet.
        good_since_strike: steps since the last of them.
        saving_seconds: spent on checkpoints.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    micro_batches: int = 0
    step_nats: float = 0.0
    rate: float | None = None
    seconds_in_step: float = 0.0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    best_adapter: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    evaluations_without_gain: int = 0
    evaluated_step: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    stopped_because: str = ""
    cutting: Cutting | None = None
    policies: list[str] | None = None
    corrections: list[str] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    strikes: int = 0
    good_since_strike: int = 0
    saving_seconds: float = 0.0
    mark: float | None = field(default=None, repr=False)

    def pass_time(self, now: float, *, in_step: bool = False) -> None:
        """Count the seconds since the last call; `mark` is where the clock stood then and is in no checkpoint."""
        passed = now - self.mark if self.mark is not None else 0.0
        self.mark = now
        self.seconds += passed
        self.seconds_in_step += passed if in_step else 0.0

    def begin_step_again(self) -> None:
        """Forget the micro-batches of the step that is under way."""
        self.micro_batches, self.step_nats = 0, 0.0

    def go_back_to(self, earlier: TrainState) -> None:
        """Become an earlier state; time that passed stays, and what was learnt of memory and of bad steps."""
        for name in vars(earlier):
            if name not in (
                "seconds",
                "mark",
                "saving_seconds",
                "cutting",
                "policies",
                "corrections",
                "strikes",
                "good_since_strike",
            ):
                setattr(self, name, getattr(earlier, name))


class Keeper(Protocol):
    """Writes checkpoints for the loop, and reads the newest back."""

    def due(self, state: TrainState) -> bool:
        """Whether a checkpoint should be written now."""

    def save(self, state: TrainState) -> None:
        """Write one. A disk that is full for the moment is no error."""

    def rewind(self, state: TrainState) -> bool:
        """Put adapter, optimizer and state back to the newest good checkpoint; False where there is none."""

    def stopped(self, why: str) -> StoppedSafely:
        """The error that ends a run which can go on from its newest checkpoint."""

    def where(self) -> str:
        """Names the newest good checkpoint, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What to train on and how: the recipe's and the plan's words, resolved.

    Attributes:
        model: carries the adapter that is trained.
        sequences: the training windows.
        cutting: micro-batches.
        effective_batch: sequences that fill an optimizer step.
        schedule: steps and rates.
        section: the recipe's train section.
        fp16: scale the loss.
        optimizer: None for the one that `section` and `loraplus_lr_ratio` describe.
        loraplus_lr_ratio: the B matrices' learning rate over that of everything else.
        evaluate: measures the held-out documents; None for never in between.
        eval_steps: steps between evaluations.
        patience: evaluations without gain before stopping; None for never.
        keep_best: remember the adapter of the lowest held-out loss.
        keeper: writes checkpoints; None for none.
        stop: whether somebody asked the run to stop.
        watchdog: notices a hang; None for nobody watching.
        clock: seconds in which this process was not suspended.
        ledger: the plan's lines, of which an error names the one that was wrong.
        until: stop without an error after so many steps and micro-batches (a replay).
        rates: step -> learning rate, instead of the schedule's (a replay).
    """

    model: CausalLM
    sequences: Seq[Sequence]
    cutting: Cutting
    effective_batch: int
    schedule: Schedule
    section: TrainSection
    fp16: bool = False
    optimizer: torch.optim.Optimizer | None = None
    loraplus_lr_ratio: float = 1.0
    evaluate: Callable[[], Evaluation] | None = None
    eval_steps: int | None = None
    patience: int | None = None
    keep_best: bool = True
    keeper: Keeper | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    watchdog: Watchdog | None = None
    clock: Clock = field(default_factory=Clock)
    ledger: tuple[LedgerLine, ...] = ()
    until: tuple[int, int] | None = None
    rates: dict[int, float] = field(default_factory=dict)

    @functools.cached_property
    def order(self) -> StepOrder:
        """Which sequences each optimizer step reads."""
        return order_of(self.sequences, self.effective_batch, self.section)
