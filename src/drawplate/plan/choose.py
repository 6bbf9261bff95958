"""A recipe, a machine and a corpus -> a Plan: every `auto` decided, each with its reason, nothing the user set changed.

What memory is spent on is found by the search (plan/search.py) over predicted bytes and seconds. The best precision
wins whose predicted time is within a twentieth of the fastest; among choices of one precision the fastest wins. What
decides how well the model learns comes from `advise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from drawplate.errors import UsageError
from drawplate.plan.advise import Learner, advise
from drawplate.plan.cost import evaluation_seconds
from drawplate.plan.explain import activation_words, explain, weight_words
from drawplate.plan.frontier import does_not_fit, frontier_of
from drawplate.plan.gpus import typical_speed
from drawplate.plan.ledger import Choice, ModelShape, Surroundings
from drawplate.plan.search import Budget, Found, MicroBatch, Search, Space
from drawplate.plan.work import Cut, step_work
from drawplate.recipe import Recipe
from drawplate.records import DeviceSpeed, FrontierPoint, Machine, Plan, PlanTimes
from drawplate.units import format_count

LONGEST_DEFAULT_WINDOW = 2048
ROW_TOKENS = {
    "cpu": (512, 1024, 2048, 4096, 8192),
    "cuda": (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768),
}
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LARGEST_PADDED_TOKENS = {"cpu": 8192, "cuda": 32768}
WIDTHS_OF_ROWS = 8

PRECISION_TOLERANCE = 1.05
USABLE_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class CorpusShape:
    """Lengths of the training windows in tokens, and of the held-out ones where they are known."""

    lengths: tuple[int, ...]
    heldout_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Obstacles:
    """Why an architecture cannot take several documents in a row, or have its layers streamed and recomputed; empty
    where it can."""

    packing: str = ""
    streaming: str = ""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a choice rests on; with `frontier`, other budgets are looked at too."""

    recipe: Recipe
    machine: Machine
    model: ModelShape
    base_bytes: int = 0
    stored_precision: str | None = None
    stored_double_quant: bool | None = None
    speed: DeviceSpeed | None = None
    assumptions: tuple[str, ...] = ()
    frontier: bool = False
    obstacles: Obstacles = Obstacles()

    @property
    def budget(self) -> Budget:
        """What the run may use: as asked, else what the device has, and most of the machine's memory."""
        asked = self.recipe.memory
        ram = asked.ram or int(self.machine.ram_bytes * USABLE_SHARE)
        return Budget(device_bytes=asked.vram or self.machine.device_bytes, host_bytes=ram)

    @property
    def known_speed(self) -> DeviceSpeed:
        """As measured or published, else a typical device's."""
        return self.speed or typical_speed(self.machine.device)

    @property
    def double_quant(self) -> bool:
        """Whether 4-bit scales are quantized too: as asked, else as the checkpoint has it, else yes."""
        asked = self.recipe.quantization.bnb_4bit_use_double_quant
        if asked != "auto":
            return asked
        return True if self.stored_double_quant is None else self.stored_double_quant


def choose_max_length(recipe: Recipe, max_positions: int) -> int:
    """Tokens in a window.

    Raises:
        UsageError: more are asked for than the model was made for.
    """
    if recipe.data.max_length != "auto" and recipe.data.max_length > max_positions:
        raise UsageError(
            f"data.max_length: {recipe.data.max_length} exceeds the {max_positions} tokens the model was made for.",
            safe="Nothing was loaded or written.",
            next_step=f"Set data.max_length to {max_positions} or less; longer documents become several windows.",
        )
    if recipe.data.max_length != "auto":
        return recipe.data.max_length
    return min(LONGEST_DEFAULT_WINDOW, max_positions)


def choose_compute_dtype(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    """(float16, bfloat16 or float32, reason)."""
    asked = recipe.quantization.bnb_4bit_compute_dtype
    if recipe.train.fp16:
        return "float16", "train.fp16"
    if recipe.train.bf16:
        return "bfloat16", "train.bf16"
    if asked != "auto":
        return asked, "quantization.bnb_4bit_compute_dtype"
    if machine.bf16_native:
        return "bfloat16", "this device multiplies bf16 natively"
    if machine.device == "cuda":
        return "float16", "this GPU has no bf16"
    return "float32", "this CPU has no native bf16; fp32 is faster than emulation"


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
    advice = advise(situation.recipe, Learner(lengths=corpus.lengths, hidden=situation.model.hidden))
    situation = replace(situation, recipe=advice.recipe)
    recipe, machine, steps = situation.recipe, situation.machine, advice.optimizer_steps
    reasons = dict(advice.reasons)
    compute_dtype, reasons["compute_dtype"] = choose_compute_dtype(recipe, machine)
    batch = _batch(situation, corpus, reasons)
    search = search_of(situation, corpus, compute_dtype, batch)
    found = fastest(search, situation.budget)
    if found is None:
        raise does_not_fit(situation, search, lambda changed: _would_fit(changed, corpus))
    reasons |= explain(situation.recipe, search, found, situation.budget, stored=situation.stored_precision)
    if situation.obstacles.streaming:
        reasons["weights"] = (
            f"its layers stay on the device and keep their activations: {situation.obstacles.streaming}"
        )
    choice, model = found.choice, situation.model
    micro = found.batch.sequences
    return Plan(
        device=machine.device,
        precision=choice.precision,
        double_quant=choice.double_quant,
        compute_dtype=compute_dtype,
        weights=weight_words(choice, model.layers),
        activations=activation_words(choice, model.layers),
        compiled=choice.compiled,
        dequantize=choice.dequantize,
        graphs=choice.captured(model),
        packing=batch.packing,
        max_length=max_length,
        micro_batch_sequences=micro,
        micro_batch_tokens=choice.micro_batch_tokens,
        effective_batch_size=batch.effective,
        gradient_accumulation_steps=_accumulation(recipe, batch, found.batch, reasons),
        optimizer_steps=steps,
        epochs=advice.epochs,
        learning_rate=advice.learning_rate,
        lr_scheduler_type=advice.lr_scheduler_type,
        warmup_ratio=advice.warmup_ratio,
        eval_batch_sequences=_given(recipe.evaluation.per_device_eval_batch_size) or micro,
        reasons=reasons,
        warnings=advice.warnings + _idle_patience(recipe, steps),
        ledger=found.ledger.lines,
        phases=found.ledger.phases,
        dequantized_layers=choice.dequantized_layers,
        device_layers=choice.device_layers,
        host_layers=choice.host_layers(model.layers),
        kept_layers=choice.kept_layers,
        policy=choice.policy,
        slots=choice.slots,
        head_rows=choice.head_rows,
        adapter=choice.adapter,
        times=_times(situation, corpus, found, batch, steps),
        frontier=_frontier(situation, search),
        assumptions=situation.assumptions,
    )


def _frontier(situation: Situation, search: Search) -> tuple[FrontierPoint, ...]:
    return frontier_of(search, lambda budget: fastest(search, budget), situation.budget) if situation.frontier else ()


def search_of(situation: Situation, corpus: CorpusShape, compute_dtype: str, batch: _Batch) -> Search:
    """The search over what the recipe leaves open."""
    recipe, machine, model = situation.recipe, situation.machine, situation.model
    again = recipe.train.gradient_checkpointing
    compile_, activations = recipe.model.compile, recipe.memory.activations
    if activations == "auto" and again != "auto":
        activations = "again" if again else "keep"  # type: ignore[assignment]
    weights = recipe.memory.weights
    if situation.obstacles.streaming:
        weights = "device" if weights == "auto" else weights
        activations = "keep" if activations == "auto" else activations
    fixed = Choice(
        precision="",
        double_quant=situation.double_quant,
        compute_dtype=compute_dtype,
        device=machine.device,  # type: ignore[arg-type]
        dequantized_layers=0,
        device_layers=model.layers,
        kept_layers=0,
        policy="recompute",
        micro_batch_tokens=0,
        longest=max(corpus.lengths),
        packing=batch.packing,
        dropout=recipe.lora.lora_dropout,
        eval_rows=_given(recipe.evaluation.per_device_eval_batch_size),
        eval_tokens=(_given(recipe.evaluation.per_device_eval_batch_size) or 0) * batch.row_tokens or None,
        optimizer="adamw_8bit" if recipe.train.optim == "adamw_8bit" else "adamw",
        adapter="host" if recipe.memory.adapter == "host" and machine.device == "cuda" else "device",
    )
    space = Space(
        precisions=_precisions(situation, compute_dtype),
        batches=_micro_batches(situation, corpus, batch),
        weights=weights,
        activations=activations,
        compiled=False if compile_ == "auto" and batch.packing and _one_by_one(situation) else compile_,
        fixed=fixed,
    )
    speed = situation.known_speed
    around = Surroundings(
        base_bytes=situation.base_bytes,
        context_bytes=speed.context_bytes,
        trial_bytes=speed.l2_cache_bytes,
        dataset_bytes=5 * corpus.tokens,
        loading_host_bytes=speed.loading_host_bytes,
        runtime_host_bytes=speed.runtime_host_bytes,
    )
    return Search(model, speed, space, around)


def fastest(search: Search, budget: Budget) -> Found | None:
    """The fastest that fits, where a lesser precision has to be 5 % faster than a better one; None where none fits."""
    found: Found | None = None
    for precision in search.space.precisions:
        limit = found.seconds_per_token / PRECISION_TOLERANCE if found else math.inf
        found = search.best(precision, budget, limit=limit) or found
    if found is None:  # the estimate by which it searches may be too careful
        near = search.nearest(budget)
        return None if budget.excess(near.need) else near
    return found


def _would_fit(situation: Situation, corpus: CorpusShape) -> bool:
    compute_dtype, _ = choose_compute_dtype(situation.recipe, situation.machine)
    batch = _batch(situation, corpus, {})
    return fastest(search_of(situation, corpus, compute_dtype, batch), situation.budget) is not None


def _micro_batches(situation: Situation, corpus: CorpusShape, batch: _Batch) -> tuple[MicroBatch, ...]:
    """The ways to cut a step that are looked at: packed rows of some sizes, or some sequences at a time."""
    recipe, device = situation.recipe, situation.machine.device
    step_tokens = min(batch.effective, len(corpus.lengths)) * corpus.tokens / len(corpus.lengths)
    if batch.micro is not None:
        sizes = [(batch.micro, batch.micro * batch.row_tokens)]
    elif batch.packing:
        rows = {max(n, batch.row_tokens) for n in ROW_TOKENS[device]}
        enough = min((n for n in rows if n >= step_tokens), default=max(rows))
        sizes = [(batch.effective, n) for n in sorted(rows) if n <= enough]
    else:
        limit = max(LARGEST_PADDED_TOKENS[device], batch.row_tokens)
        counts = sorted({n for n in (*SEQUENCES, batch.effective) if n <= batch.effective})
        sizes = [(n, n * batch.row_tokens) for n in counts if n * batch.row_tokens <= limit]
    return tuple(
        MicroBatch(
            sequences=sequences,
            tokens=tokens,
            rows=1 if batch.packing else sequences,
            work=step_work(
                corpus.lengths,
                batch.effective,
                Cut(
                    packing=batch.packing,
                    tokens=tokens,
                    sequences=sequences,
                    multiple=_row_multiple(recipe, device, tokens, batch),
                ),
            ),
        )
        for sequences, tokens in sizes
    )


def _row_multiple(recipe: Recipe, device: str, tokens: int, batch: _Batch) -> int:
    """Rows are as wide as a multiple of this: the recipe's, or on a GPU an eighth of the widest (device_batch.py)."""
    multiple = recipe.data.pad_to_multiple_of
    if device != "cuda":
        return multiple
    widest = tokens if batch.packing else batch.row_tokens
    return max(1, widest // WIDTHS_OF_ROWS // multiple) * multiple


def _times(situation: Situation, corpus: CorpusShape, found: Found, batch: _Batch, steps: int) -> PlanTimes:
    """What the plan's steps and measurements take."""
    recipe, speed = situation.recipe, situation.known_speed
    seconds, cost = 0.0, found.cost
    if corpus.heldout_lengths:
        tokens = found.choice.eval_tokens or found.choice.micro_batch_tokens
        multiple = _row_multiple(recipe, situation.machine.device, tokens, batch)
        packing = batch.packing and found.choice.eval_rows is None
        cut = Cut(
            packing=packing, tokens=tokens, sequences=found.choice.eval_rows or found.batch.rows, multiple=multiple
        )
        work = step_work(corpus.heldout_lengths, len(corpus.heldout_lengths), cut)
        seconds = evaluation_seconds(situation.model, found.choice, work, speed)
    between = steps // recipe.evaluation.eval_steps if recipe.evaluation.eval_steps else 0
    an_epoch = math.ceil(len(corpus.lengths) / batch.effective) * cost.seconds
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


@dataclass(frozen=True)
class _Batch:
    """What a step consists of. `micro`: sequences of a micro-batch where they were asked for."""

    effective: int
    micro: int | None
    packing: bool
    row_tokens: int


def _given(value: Any) -> Any:
    return None if value == "auto" else value


def _batch(situation: Situation, corpus: CorpusShape, reasons: dict[str, str]) -> _Batch:
    """What an advised recipe says of a step."""
    recipe = situation.recipe
    micro, accumulation = (
        _given(recipe.train.per_device_train_batch_size),
        _given(recipe.train.gradient_accumulation_steps),
    )
    effective = int(recipe.train.effective_batch_size)
    multiple = recipe.data.pad_to_multiple_of
    row_tokens = -(-max(corpus.lengths) // multiple) * multiple
    packing = _packing(situation, micro, reasons)
    if micro is None and accumulation and not packing:
        micro = math.ceil(effective / accumulation)
        reasons["micro_batch"] = "the step's sequences over train.gradient_accumulation_steps"
    return _Batch(effective, micro, packing, row_tokens)


def _packing(situation: Situation, micro: int | None, reasons: dict[str, str]) -> bool:
    """Whether several documents share a row.

    Raises:
        UsageError: the recipe asks for it, and the model would mix them.
    """
    asked, why_not = situation.recipe.data.packing, situation.obstacles.packing
    if asked is True and why_not:
        raise UsageError(
            f"data.packing: this model cannot take several documents in a row: {why_not}.",
            safe="Nothing was loaded or written.",
            next_step="Set data.packing: false.",
        )
    if asked != "auto":
        return bool(asked)
    if not why_not and _one_by_one(situation):
        why_not = "packed, this device would attend to one document after the other, and compile every row anew"
    if why_not:
        reasons["packing"] = why_not
    elif micro is None:
        reasons["packing"] = "several documents share a row, so almost nothing is padding"
    else:
        reasons["packing"] = "train.per_device_train_batch_size counts sequences, so each has a row of its own"
    return micro is None and not why_not


def _one_by_one(situation: Situation) -> bool:
    """Whether the device would attend to the documents of a packed row one by one (model/attention.py)."""
    compute_dtype, _ = choose_compute_dtype(situation.recipe, situation.machine)
    return situation.machine.device == "cuda" and (situation.model.one_by_one or compute_dtype == "float32")


def _accumulation(recipe: Recipe, batch: _Batch, cut: MicroBatch, reasons: dict[str, str]) -> int:
    """Micro-batches in an optimizer step; packed, the expected number."""
    if not batch.packing:
        return math.ceil(batch.effective / cut.sequences)
    count = max(1, math.ceil(cut.work.micro_batches - 0.05))
    if recipe.train.gradient_accumulation_steps not in ("auto", count):
        reasons["gradient_accumulation_steps"] = (
            f"the step keeps its {format_count(batch.effective)} sequences, which packed make {format_count(count)} "
            "rows; with data.packing: false it keeps the number of micro-batches too"
        )
    return count


def _precisions(situation: Situation, compute_dtype: str) -> tuple[str, ...]:
    """Those to choose from, the best first.

    Raises:
        UsageError: the recipe asks for another than the checkpoint is quantized to.
    """
    asked, stored = situation.recipe.quantization.chosen, situation.stored_precision
    if stored and asked not in ("auto", stored):
        raise UsageError(
            f"quantization.precision: the checkpoint is already quantized to {stored}, and {asked} is asked for.",
            safe="Nothing was loaded or written.",
            next_step=f"Set quantization.precision: {stored} or auto, or start from the unquantized model.",
        )
    if asked != "auto" or stored:
        return (asked if asked != "auto" else str(stored),)
    return ({"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[compute_dtype], "int8", "nf4")


def _idle_patience(recipe: Recipe, steps: int) -> tuple[str, ...]:
    section = recipe.evaluation
    if section.early_stopping_patience is None or (section.eval_steps or steps) < steps:
        return ()
    return (
        "evaluation.early_stopping_patience does nothing here: the held-out documents are not measured before the end. "
        f"Set evaluation.eval_steps, for example to {max(1, steps // 10)}.",
    )
