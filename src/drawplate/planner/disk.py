"""What a run has of the disk of its folder, phase by phase, when it holds most there.

    training           the start, and checkpoints: two are kept while another is written
    final evaluation   the start, the checkpoints that are kept, the adapter, and the one for the unquantized base

A checkpoint is the adapter, the optimizer's moments, and the best adapter so far where the held-out documents are
measured in between. The first, before any step, has no moments yet. The cache of prepared weights is on a disk of its
own choosing and is a line of every phase (planner/bytes/ledger.py).

Blind to what compilers and the hub keep, and to the gradient in a checkpoint that is written within a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from drawplate.layout.moments import moments_bytes
from drawplate.planner.bytes.ledger import Ledger
from drawplate.planner.bytes.stage import TRAINED_BYTES
from drawplate.recipe import Recipe
from drawplate.records import LedgerLine, Plan
from drawplate.units import KIB, MIB, format_bytes

RESERVE_BYTES = 8 * MIB
CHECKPOINTS_KEPT = 2
CHECKPOINTS_IN_A_RUN = 10
TRAINING_PHASES, LAST_PHASE = ("training", "checkpoint"), "final evaluation"
TEXT_BYTES, TEXT_BYTES_OF_A_STEP = 192 * KIB, KIB


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What decides how much a run writes.

    Attributes:
        trained_parameters: of the adapter.
        tokenizer_bytes: of the tokenizer's files, which lie beside each adapter.
    """

    trained_parameters: int
    tokenizer_bytes: int = 0


def save_steps_of(recipe: Recipe, optimizer_steps: int) -> int:
    """Optimizer steps between checkpoints: as asked, else a tenth of the run."""
    asked = recipe.train.save_steps
    return asked if asked != "auto" else math.ceil(optimizer_steps / CHECKPOINTS_IN_A_RUN)


def with_disk_lines(plan: Plan, recipe: Recipe, files: RunFiles) -> Plan:
    """The plan with the bytes that the run will have in its folder, as lines of its phases."""
    adapter = files.trained_parameters * TRAINED_BYTES
    best = adapter if recipe.evaluation.load_best_model_at_end and recipe.evaluation.eval_steps else 0
    moments = moments_bytes(recipe.train.optim, files.trained_parameters)
    written = _checkpoints_written(plan, recipe)
    start = [("adapter's start", adapter, "trained parameters x 4 bytes")] if plan.starts_from_error else []
    always = [
        ("reserve for the log", RESERVE_BYTES, "held until the disk is full or the run ends"),
        (
            "log, record and report",
            TEXT_BYTES + TEXT_BYTES_OF_A_STEP * plan.optimizer_steps,
            "192 KiB, and 1 KiB for each optimizer step",
        ),
        *start,
    ]

    def checkpoints(most: int) -> tuple[str, int, str]:
        whole = min(most, written)
        first = adapter if whole < most else 0  # the one before the first step
        parts = "adapter, 2 moments" + (", best adapter" if best else "")
        return "checkpoints", whole * (adapter + moments + best) + first, f"{whole} x ({parts})"

    saved = [("adapter", adapter + files.tokenizer_bytes, "trained parameters x 4 bytes, and the tokenizer")]
    if plan.starts_from_error:
        double = 2 * adapter + files.tokenizer_bytes
        saved.append(("adapter for the unquantized base", double, "twice the rank, and the tokenizer"))
    rows = {
        **{phase: [*always, checkpoints(CHECKPOINTS_KEPT + 1)] for phase in TRAINING_PHASES},
        LAST_PHASE: [*always, checkpoints(CHECKPOINTS_KEPT), *saved],
    }
    phases = tuple(
        replace(
            phase,
            lines=phase.lines
            + tuple(LedgerLine(name=n, where="disk", bytes=b, formula=f) for n, b, f in rows.get(phase.phase, [])),
        )
        for phase in plan.phases
    )
    return replace(plan, phases=phases, ledger=Ledger(phases=phases).lines if phases else plan.ledger)


def disk_warning(plan: Plan, free_bytes: int, folder: str) -> str:
    """What to say where the run's folder will need more than its disk has; empty where there is room."""
    needed = max(
        (
            sum(x.bytes for x in phase.lines if x.where == "disk" and x.name != "cache of prepared weights")
            for phase in plan.phases
        ),
        default=0,
    )
    if needed <= free_bytes:
        return ""
    return (
        f"The run will need {format_bytes(needed)} of the disk of {folder}, and {format_bytes(free_bytes)} are free. "
        "Set output_dir on another disk, or a smaller lora.r."
    )


def _checkpoints_written(plan: Plan, recipe: Recipe) -> int:
    """Those after a step."""
    steps = max(1, plan.optimizer_steps)
    by_steps = math.ceil(steps / save_steps_of(recipe, steps))
    seconds = plan.times.training_seconds if plan.times else 0.0
    return max(by_steps, int(seconds / (60 * recipe.train.save_minutes)) + 1)
