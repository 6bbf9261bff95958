"""A recipe, a machine and a corpus -> a Plan: every `auto` decided, each with its reason, nothing the user set changed.

What memory is spent on is found by the search (planner/search.py) over predicted bytes and seconds. The best precision
wins that comes within a twentieth of the fastest; among choices of one precision the fastest wins. What
decides how well the model learns comes from `advise`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from drawplate.errors import UsageError
from drawplate.planner.advise import Advice, Learner, advise
from drawplate.planner.batching import StepBatch, accumulation, batch_of, given, micro_batches_of, row_multiple
from drawplate.planner.budget import Budget
from drawplate.planner.explain import activation_words, explain, weight_words
from drawplate.planner.fit import Fit
from drawplate.planner.frontier import does_not_fit, frontier_of
from drawplate.planner.search import Found, Search, Won
from drawplate.planner.seconds.cost import evaluation_seconds
from drawplate.planner.seconds.work import Cut, step_work
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.planner.situation import (
    CorpusShape,
    Situation,
    attends_one_by_one,
    choose_compute_dtype,
    precisions_of,
)
from drawplate.planner.space import Space
from drawplate.recipe import Recipe
from drawplate.records import FrontierPoint, Plan, PlanTimes

PRECISION_TOLERANCE = 1.03
"""Times the fastest's predicted seconds that a better precision may take. Predictions are good to two percent (the
middle of 22 in bench/results/plan-sweeps-h100.json), and a better precision may cost a twentieth of the time."""


def choose(situation: Situation, corpus: CorpusShape, max_length: int) -> Plan:
    """Decide everything the recipe left open.

    Args:
        situation: recipe, machine and model.
        corpus: lengths of the training windows.
        max_length: of a window, from `choose_max_length`.

    Raises:
        UsageError: the recipe asks for another precision than the checkpoint is quantized to.
        DoesNotFit: nothing fits; the nearest miss and one change that mends it are named.
    """
    advice = advise(
        situation.recipe,
        Learner(lengths=corpus.lengths, target_tokens=corpus.targets, hidden=situation.model.hidden),
    )
    situation = replace(situation, recipe=advice.recipe)
    recipe, machine = situation.recipe, situation.machine
    reasons = dict(advice.reasons)
    compute_dtype, reasons["compute_dtype"] = choose_compute_dtype(recipe, machine)
    batch = batch_of(situation, corpus, reasons)
    search = search_of(situation, corpus, compute_dtype, batch)
    found = fastest(search, situation.budget)
    if found is None:
        raise does_not_fit(situation, search, lambda changed: _would_fit(changed, corpus))
    reasons |= explain(situation.recipe, search, found, situation.budget, stored=situation.stored_precision)
    if situation.obstacles.streaming:
        reasons["weights"] = (
            f"its layers stay on the device and keep their activations: {situation.obstacles.streaming}"
        )
    micro = found.batch.sequences
    return Plan(
        **_of_choice(found.choice, situation.model),
        **_of_advice(advice),
        max_length=max_length,
        micro_batch_sequences=micro,
        effective_batch_size=batch.effective,
        gradient_accumulation_steps=accumulation(recipe, batch, found.batch, reasons),
        eval_batch_sequences=given(recipe.evaluation.per_device_eval_batch_size) or micro,
        reasons=reasons,
        warnings=advice.warnings + _idle_patience(recipe, advice.optimizer_steps),
        ledger=found.ledger.lines,
        phases=found.ledger.phases,
        times=_times(situation, corpus, found, batch, advice.optimizer_steps),
        frontier=_frontier(situation, search),
        assumptions=situation.assumptions,
    )


def _of_choice(choice: Choice, model: ModelShape) -> dict[str, Any]:
    """What a plan says of where things are and how they are computed."""
    return choice.shared() | {
        "weights": weight_words(choice, model.layers),
        "activations": activation_words(choice, model.layers),
        "graphs": choice.captured(model),
        "host_layers": choice.host_layers(model.layers),
        "host_kept_layers": choice.on_host(model.layers),
    }


def _of_advice(advice: Advice) -> dict[str, Any]:
    """What a plan says of how the model learns."""
    names = ("epochs", "optimizer_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio")
    return {name: getattr(advice, name) for name in names}


def _frontier(situation: Situation, search: Search) -> tuple[FrontierPoint, ...]:
    if not situation.frontier:
        return ()
    rough = search.unmeasured()
    return frontier_of(rough, lambda budget: fastest(rough, budget), situation.budget)


def _uncompiled(situation: Situation, asked: bool | Literal["auto"]) -> Literal[False]:
    """Layers that hand one another tensors run as transformers wrote them: a compiler takes each by itself.

    Raises:
        UsageError: the recipe asks for compiled ones.
    """
    if asked is True:
        raise UsageError(
            f"model.compile: true, but the layers of this model are not compiled: {situation.obstacles.streaming}.",
            safe="Nothing was loaded or written.",
            next_step="Set model.compile: auto.",
        )
    return False


def search_of(situation: Situation, corpus: CorpusShape, compute_dtype: str, batch: StepBatch) -> Search:
    """The search over what the recipe leaves open."""
    recipe, model = situation.recipe, situation.model
    again = recipe.train.gradient_checkpointing
    compile_, activations = recipe.model.compile, recipe.memory.activations
    if activations == "auto" and again != "auto":
        activations = "again" if again else "keep"  # type: ignore[assignment]
    weights = recipe.memory.weights
    if situation.obstacles.streaming:
        weights = "device" if weights == "auto" else weights
        activations = "keep" if activations == "auto" else activations
        compile_ = _uncompiled(situation, compile_)
    space = Space(
        precisions=precisions_of(situation, compute_dtype),
        batches=micro_batches_of(situation, corpus, batch),
        weights=weights,
        activations=activations,
        compiled=False if compile_ == "auto" and batch.packing and attends_one_by_one(situation) else compile_,
        fixed=_fixed(situation, corpus, compute_dtype, batch),
    )
    speed = situation.known_speed
    around = Surroundings(
        base_bytes=situation.base_bytes,
        context_bytes=speed.context_bytes,
        trial_bytes=speed.l2_cache_bytes,
        dataset_bytes=5 * corpus.tokens,
        starts_adapter=recipe.lora.filled().init_lora_weights == "quantization_error"
        and recipe.evaluation.quantization_tax is not False
        and not situation.stored_precision,
        loading_host_bytes=speed.loading_host_bytes,
        runtime_host_bytes=speed.runtime_host_bytes,
    )
    return Search(model, speed, space, Fit(model, around))


def _fixed(situation: Situation, corpus: CorpusShape, compute_dtype: str, batch: StepBatch) -> Choice:
    """What does not vary, in a choice's words."""
    recipe, machine = situation.recipe, situation.machine
    eval_rows = given(recipe.evaluation.per_device_eval_batch_size)
    return Choice(
        precision="",
        double_quant=situation.double_quant,
        compute_dtype=compute_dtype,
        device=machine.device,
        dequantized_layers=0,
        device_layers=situation.model.layers,
        kept_layers=0,
        policy="recompute",
        micro_batch_tokens=0,
        longest=max(corpus.lengths),
        packing=batch.packing,
        dropout=recipe.lora.lora_dropout,
        eval_rows=eval_rows,
        eval_tokens=(eval_rows or 0) * batch.row_tokens or None,
        optim=recipe.train.optim,
        adapter="host" if recipe.memory.adapter == "host" and machine.device == "cuda" else "device",
        launched=situation.launched,
    )


def fastest(search: Search, budget: Budget) -> Found | None:
    """The fastest that fits, where a lesser precision has to be 3 % faster than a better one; None where none fits."""
    if found := search.settled(budget, lambda: _preferred(search, budget)):
        return found
    near = search.nearest(budget)  # the estimate by which it searches may be too careful
    return None if budget.excess(near.need) else near


def _preferred(search: Search, budget: Budget) -> Won | None:
    won: Won | None = None
    for precision in search.space.precisions:
        limit = won.seconds / PRECISION_TOLERANCE if won else math.inf
        won = search.promising(precision, budget, limit=limit) or won
    return won


def _would_fit(situation: Situation, corpus: CorpusShape) -> bool:
    compute_dtype, _ = choose_compute_dtype(situation.recipe, situation.machine)
    batch = batch_of(situation, corpus, {})
    return fastest(search_of(situation, corpus, compute_dtype, batch), situation.budget) is not None


def _times(situation: Situation, corpus: CorpusShape, found: Found, batch: StepBatch, steps: int) -> PlanTimes:
    """What the plan's steps and measurements take."""
    recipe, speed = situation.recipe, situation.known_speed
    seconds, cost = 0.0, found.cost
    if corpus.heldout_lengths:
        tokens = found.choice.eval_tokens or found.choice.micro_batch_tokens
        multiple = row_multiple(recipe, situation.machine.device, tokens, batch)
        packing = batch.packing and found.choice.eval_rows is None
        cut = Cut(
            packing=packing, tokens=tokens, sequences=found.choice.eval_rows or found.batch.rows, multiple=multiple
        )
        work = step_work(corpus.heldout_lengths, len(corpus.heldout_lengths), cut)
        seconds = evaluation_seconds(situation.model, found.choice, work, speed)
    between = steps // recipe.evaluation.eval_steps if recipe.evaluation.eval_steps else 0
    an_epoch = batch.steps_per_epoch * cost.seconds
    training = steps * cost.seconds
    if recipe.train.max_minutes:
        training = min(training, recipe.train.max_minutes * 60)
    return PlanTimes(
        step_seconds=cost.seconds,
        tokens_per_second=cost.tokens_per_second,
        epoch_seconds=an_epoch,
        training_seconds=training,
        evaluation_seconds=seconds,
        evaluations=2 + between,
        lines=cost.lines,
        speed=f"{speed.name}, {speed.source}",
    )


def _idle_patience(recipe: Recipe, steps: int) -> tuple[str, ...]:
    section = recipe.evaluation
    if section.early_stopping_patience is None or (section.eval_steps or steps) < steps:
        return ()
    return (
        "evaluation.early_stopping_patience does nothing here: the held-out documents are not measured before the end. "
        f"Set evaluation.eval_steps, for example to {max(1, steps // 10)}.",
    )
