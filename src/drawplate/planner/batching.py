"""How an optimizer step is cut into micro-batches: what the recipe says, and the ways that the search looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from drawplate.data.steps import filling
from drawplate.errors import UsageError
from drawplate.layout.widths import WIDTHS
from drawplate.planner.seconds.work import Cut, step_work
from drawplate.planner.situation import CorpusShape, Situation, attends_one_by_one
from drawplate.planner.space import MicroBatch
from drawplate.recipe import Recipe
from drawplate.units import format_count

ROW_TOKENS = {
    "cpu": (512, 1024, 2048, 4096, 8192),
    "cuda": (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768),
}
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LARGEST_PADDED_TOKENS = {"cpu": 8192, "cuda": 32768}


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What a step consists of: `effective` sequences that fill it, `sequences` in all on average. `micro`: sequences of
    a micro-batch where they were asked for."""

    effective: int
    sequences: int
    steps_per_epoch: int
    micro: int | None
    packing: bool
    row_tokens: int


def given(value: Any) -> Any:
    """A recipe's value, None for auto."""
    return None if value == "auto" else value


def batch_of(situation: Situation, corpus: CorpusShape, reasons: dict[str, str]) -> StepBatch:
    """What an advised recipe says of a step."""
    recipe = situation.recipe
    micro, accumulation = (
        given(recipe.train.per_device_train_batch_size),
        given(recipe.train.gradient_accumulation_steps),
    )
    effective = int(recipe.train.effective_batch_size)
    multiple = recipe.data.pad_to_multiple_of
    row_tokens = -(-max(corpus.lengths) // multiple) * multiple
    packing = _packing(situation, micro, reasons)
    if micro is None and accumulation and not packing:
        micro = math.ceil(effective / accumulation)
        reasons["micro_batch"] = "the step's sequences over train.gradient_accumulation_steps"
    full = filling(corpus.targets, int(recipe.train.min_target_tokens))
    return StepBatch(
        effective=effective,
        sequences=round(min(1.0, effective / full) * len(corpus.lengths)),
        steps_per_epoch=math.ceil(full / effective),
        micro=micro,
        packing=packing,
        row_tokens=row_tokens,
    )


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
    if not why_not and attends_one_by_one(situation):
        why_not = "packed, this device would attend to one document after the other, and compile every row anew"
    if why_not:
        reasons["packing"] = why_not
    elif micro is None:
        reasons["packing"] = "several documents share a row, so almost nothing is padding"
    else:
        reasons["packing"] = "train.per_device_train_batch_size counts sequences, so each has a row of its own"
    return micro is None and not why_not


def micro_batches_of(situation: Situation, corpus: CorpusShape, batch: StepBatch) -> tuple[MicroBatch, ...]:
    """The ways to cut a step that are looked at: packed rows of some sizes, or some sequences at a time."""
    recipe, device = situation.recipe, situation.machine.device
    step_tokens = batch.sequences * corpus.tokens / len(corpus.lengths)
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
                batch.sequences,
                Cut(
                    packing=batch.packing,
                    tokens=tokens,
                    sequences=sequences,
                    multiple=row_multiple(recipe, device, tokens, batch),
                ),
            ),
        )
        for sequences, tokens in sizes
    )


def row_multiple(recipe: Recipe, device: str, tokens: int, batch: StepBatch) -> int:
    """Rows are as wide as a multiple of this: the recipe's, or on a GPU a quarter of the widest (device_batch.py)."""
    multiple = recipe.data.pad_to_multiple_of
    if device != "cuda":
        return multiple
    widest = tokens if batch.packing else batch.row_tokens
    return max(1, widest // WIDTHS // multiple) * multiple


def accumulation(recipe: Recipe, batch: StepBatch, cut: MicroBatch, reasons: dict[str, str]) -> int:
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
