"""The rehearsal: in a run's first minute its worst real batches go through everything, and the plan's bytes are proved.

The fullest micro-batch of the longest documents is trained on and thrown away, the fullest held-out one is measured,
and the adapter is saved to a folder that is removed. Each phase's measured peak is set beside the plan's. Where the
budget does not hold, the run stops here and not hours later, or is planned anew for as much less as the plan was wrong
by (memory.rehearsal: replan).

The run that follows is the same bit for bit with or without it: the adapter's values are put back, no gradient and no
moment stays, and nothing in a step draws from a generator. What it compiles is compiled once and used by the run.

A cap below the device's size (memory.vram) is enforced by torch's allocator, with the CUDA context counted, so that a
large card rehearses a small one. Left out: memory that other programs take later.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from drawplate.data.batches import Batch, Cutting
from drawplate.errors import DoesNotFit
from drawplate.machine.memory import PeakMeter, measure_context
from drawplate.machine.speed import keep_overheads
from drawplate.model.causal_lm import CausalLM
from drawplate.planner.budget import DEVICE_MARGIN, HOST_MARGIN
from drawplate.planner.bytes.host import CONTEXT_OF_KERNELS, RUNTIME
from drawplate.records import Plan, RehearsedPhase, Sequence
from drawplate.run.journal import Journal
from drawplate.run.planning import corpus_shape, plan_for_lengths
from drawplate.run.prepare import Prepared, evaluation_cutting, train_cutting
from drawplate.train.loop import make_optimizer
from drawplate.train.step import is_out_of_memory
from drawplate.units import MIB, format_bytes, format_percent

CHECKED_ABOVE_BYTES = 256 * MIB
"""A prediction that is off by less than this is not worth a word, whatever the share."""
MOST_ATTEMPTS = 3


def enforce_cap(prepared: Prepared) -> None:
    """Let torch's allocator hold no more than memory.vram less the CUDA context; without a cap, all of the device."""
    if prepared.device.type == "cuda":
        _let_hold(prepared, prepared.recipe.memory.vram)


@contextmanager
def room_for_check(prepared: Prepared, wanted_bytes: int, tell: Callable[[str], None]) -> Iterator[int | None]:
    """For a check before training; yields how many bytes of the device it may take, None on a CPU.

    What the plan needs at its peak is room. Where that is too little, and nobody has set a cap (memory.vram), so is
    whatever is free.

    Args:
        prepared: with the plan that the model was loaded by.
        wanted_bytes: what the check would take.
        tell: told where the check takes more than the plan.
    """
    if prepared.device.type != "cuda":
        yield None
        return
    _let_go(prepared.device)
    asked, planned = prepared.recipe.memory.vram, prepared.plan.predicted_bytes("device")
    try:
        room = _room_within(prepared, min(asked or sys.maxsize, planned))
        if room < wanted_bytes and not asked:
            room = _room_within(prepared, None)
            if room >= wanted_bytes:
                tell(
                    f"The self-check takes about {format_bytes(wanted_bytes)} of free device memory, more than "
                    "training will. The record counts it apart."
                )
        yield room
    finally:
        enforce_cap(prepared)


def _room_within(prepared: Prepared, device_bytes: int | None) -> int:
    """Bytes that may still be taken where the process holds so many; None for all of the device."""
    most = _let_hold(prepared, device_bytes)
    free = torch.cuda.mem_get_info(prepared.device)[0]
    return max(0, min(free, most - torch.cuda.memory_reserved(prepared.device)))


def _let_hold(prepared: Prepared, device_bytes: int | None) -> int:
    """Bytes that torch's allocator may hold, of so many on the device; None for all of it."""
    total = torch.cuda.get_device_properties(prepared.device).total_memory
    bound = total if not device_bytes else max(0, device_bytes - measure_context(prepared.device).bytes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound / total), prepared.device)
    return min(bound, total)


def rehearsed(
    prepared: Prepared,
    models: list[CausalLM],
    folder: Path,
    journal: Journal,
    load: Callable[[Prepared], CausalLM],
) -> tuple[Prepared, tuple[RehearsedPhase, ...]]:
    """Rehearse, and plan and load anew while that is asked for and needed; the plan that holds, and its peaks.

    Args:
        prepared: with the plan that the model was loaded by.
        models: the model alone, held by nobody else: it is let go before another takes its place here.
        folder: the run's, for the trial save.
        journal: told each phase's peaks.
        load: a model for another plan.

    Raises:
        DoesNotFit: the budget does not hold and memory.rehearsal does not say replan, or no smaller plan is left.
    """
    asked = prepared.recipe.memory.rehearsal
    for attempt in range(1, MOST_ATTEMPTS + 1):
        phases, failed = rehearse(prepared, models[0], folder) if asked != "off" else ((), "")
        for line in described(phases):
            journal.message(line)
        over = [phase for phase in phases if exceeded(prepared, phase)]
        if not over and not failed:
            for phase in phases:
                if said := surprise(phase):
                    journal.on_warning(said)
            return prepared, phases
        if asked != "replan" or attempt == MOST_ATTEMPTS:
            raise _refusal(prepared, over, failed)
        journal.on_warning(f"{failed or _excess(prepared, over[0])} The run is planned anew, for less memory.")
        prepared = _planned_smaller(prepared, over, failed)
        models.clear()
        _let_go(prepared.device)
        models.append(load(prepared))
    raise AssertionError("unreachable: the last attempt returns or raises")


def rehearse(prepared: Prepared, model: CausalLM, folder: Path) -> tuple[tuple[RehearsedPhase, ...], str]:
    """Every phase's peaks, and which phase ran out of memory, in words; empty where none did."""
    phases: list[RehearsedPhase] = []
    steps: dict[str, Callable[[], None]] = {
        "baseline evaluation": lambda: _evaluate(prepared, model),
        "training": lambda: _train(prepared, model),
        "checkpoint": lambda: _save(model, folder),
    }
    with _untouched(model):
        for name, step in steps.items():
            _let_go(prepared.device)
            with PeakMeter() as meter:
                try:
                    step()
                except RuntimeError as error:  # torch.OutOfMemoryError is one, and libraries raise plain ones
                    if not is_out_of_memory(error):
                        raise
                    return tuple(phases), f"The rehearsal of {name} ran out of memory."
            phases.append(_phase(prepared, name, meter))
    return tuple(phases), ""


def worst_batch(sequences: tuple[Sequence, ...], cutting: Cutting, step_sequences: int) -> Batch:
    """The micro-batch with most positions among those that the longest windows of a step make."""
    longest = sorted(sequences, key=len, reverse=True)[:step_sequences]
    return max(cutting(longest), key=lambda batch: (batch.input_ids_BT.numel(), batch.max_seqlen))


def _train(prepared: Prepared, model: CausalLM) -> None:
    """Two micro-batches of one shape, the second of which may be captured as a graph, and between them an optimizer
    step, so that its moments are there as in every later step."""
    section = prepared.recipe.train
    batch = worst_batch(prepared.train.sequences, train_cutting(prepared), prepared.plan.effective_batch_size)
    optimizer = make_optimizer(model.adapter.parameters(), section)
    model.adapter.zero_gradients()
    for moments in (False, True):
        model.add_gradients(batch, scale=1 / max(1, batch.counted_tokens), dropout_seed=(section.seed, 0))
        if not moments:
            optimizer.step()
    model.forget_graphs()


def _evaluate(prepared: Prepared, model: CausalLM) -> None:
    sequences = prepared.heldout.sequences
    with torch.no_grad():
        model.sum_nats(worst_batch(sequences, evaluation_cutting(prepared), len(sequences)))


def _save(model: CausalLM, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="rehearsal.tmp-", dir=folder) as trial:
        model.adapter.save(Path(trial))


@contextmanager
def _untouched(model: CausalLM) -> Iterator[None]:
    """The adapter's values, its gradients and the generators are as before."""
    before = [parameter.detach().cpu().clone() for parameter in model.adapter.parameters()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(model.adapter.parameters(), before, strict=True):
                    parameter.grad = None
                    parameter.copy_(value)


def learn_overheads(prepared: Prepared, rehearsal: tuple[RehearsedPhase, ...]) -> None:
    """What CUDA and its libraries were found to take is kept for the next plan on this machine.

    Of the device it is what is measured at the end of training less the plan's other lines; of the host, what the
    rehearsal of training needed more or less than the plan said: what a run compiles later differs too much between
    runs. On a CPU the plan's other lines are too large to take it from.

    Args:
        prepared: with the plan that was followed.
        rehearsal: of the run; nothing is learned of the host without it.
    """
    if prepared.device.type != "cuda":
        return
    lines = next((phase.lines for phase in prepared.plan.phases if phase.phase == "training"), ())
    context = measure_context(prepared.device).bytes - sum(
        line.bytes for line in lines if line.where == "device" and line.name in CONTEXT_OF_KERNELS
    )
    runtime = sum(line.bytes for line in lines if line.where == "host" and line.name == RUNTIME)
    found = [
        runtime + phase.host_bytes - phase.host_predicted_bytes for phase in rehearsal if phase.phase == "training"
    ]
    keep_overheads(prepared.device, context=context, runtime_host=found[0] if found else 0)


def _phase(prepared: Prepared, name: str, meter: PeakMeter) -> RehearsedPhase:
    predicted = next((phase for phase in prepared.plan.phases if phase.phase == name), None)
    measure_context(prepared.device)
    return RehearsedPhase(
        phase=name,
        device_predicted_bytes=predicted.bytes("device") if predicted else 0,
        device_bytes=meter.device_peak_bytes,
        host_predicted_bytes=predicted.bytes("host") if predicted else 0,
        host_bytes=meter.host_peak_bytes,
    )


def described(phases: tuple[RehearsedPhase, ...]) -> list[str]:
    """A line a phase: measured and predicted, for each place that was used."""
    lines = []
    for phase in phases:
        places = (
            ("device", phase.device_bytes, phase.device_predicted_bytes),
            ("host", phase.host_bytes, phase.host_predicted_bytes),
        )
        parts = [f"{format_bytes(b)} on the {where}{_against(b, p)}" for where, b, p in places if b]
        lines.append(f"Rehearsal of {phase.phase}: {', '.join(parts)}")
    return lines


def _against(measured: int, predicted: int) -> str:
    return (
        f" ({format_bytes(predicted)} predicted, {format_percent(100 * (measured / predicted - 1))})"
        if predicted
        else ""
    )


@dataclass(frozen=True)
class Excess:
    """A place where a phase needs more than the budget."""

    where: str
    measured: int
    predicted: int
    allowed: int


def exceeded(prepared: Prepared, phase: RehearsedPhase) -> Excess | None:
    """Whether a phase needs more than the budget that the recipe sets; without one, running out is the measure."""
    memory = prepared.recipe.memory
    places = (
        Excess("device", phase.device_bytes, phase.device_predicted_bytes, memory.vram or 0),
        Excess("host", phase.host_bytes, phase.host_predicted_bytes, memory.ram or 0),
    )
    return next((place for place in places if place.allowed and place.measured > place.allowed), None)


def surprise(phase: RehearsedPhase) -> str:
    """A prediction that was wrong by more than its margin, though the budget holds; in words."""
    for where, measured, predicted, margin in (
        ("device", phase.device_bytes, phase.device_predicted_bytes, DEVICE_MARGIN),
        ("host", phase.host_bytes, phase.host_predicted_bytes, HOST_MARGIN),
    ):
        if predicted and measured - predicted > max(CHECKED_ABOVE_BYTES, margin * predicted):
            return (
                f"In {phase.phase} the {where} needs {format_bytes(measured)} where the plan said "
                f"{format_bytes(predicted)}. It fits all the same."
            )
    return ""


def wrong_line(plan: Plan, phase_name: str, where: str) -> str:
    """The line of a phase that is most likely wrong: its largest that loading does not have too."""
    by_name = {phase.phase: [x for x in phase.lines if x.where == where] for phase in plan.phases}
    loading = {line.name for line in by_name.get("load", [])}
    lines = by_name.get(phase_name, [])
    own = [line for line in lines if line.name not in loading] or lines
    if not own:
        return ""
    line = max(own, key=lambda x: x.bytes)
    return f" Its largest line that comes with this phase is {line.name}, {format_bytes(line.bytes)} ({line.formula})."


def _excess(prepared: Prepared, phase: RehearsedPhase) -> str:
    place = exceeded(prepared, phase)
    assert place is not None
    return (
        f"The rehearsal of {phase.phase} needs {format_bytes(place.measured)} on the {place.where}, where "
        f"{format_bytes(place.allowed)} are allowed and the plan said {format_bytes(place.predicted)}."
    )


def _refusal(prepared: Prepared, over: list[RehearsedPhase], failed: str) -> DoesNotFit:
    if over:
        place = exceeded(prepared, over[0])
        assert place is not None
        what = _excess(prepared, over[0]) + wrong_line(prepared.plan, over[0].phase, place.where)
    else:
        name = failed.removeprefix("The rehearsal of ").removesuffix(" ran out of memory.")
        what = failed + wrong_line(prepared.plan, name, "device" if prepared.device.type == "cuda" else "host")
    return DoesNotFit(
        what,
        safe="Nothing was trained.",
        next_step="Set memory.rehearsal: replan, or a smaller memory.vram, or train.per_device_train_batch_size.",
    )


def _planned_smaller(prepared: Prepared, over: list[RehearsedPhase], failed: str) -> Prepared:
    """A plan for as much less memory as the last one was wrong by; the recipe keeps its own budget.

    Raises:
        DoesNotFit: no smaller plan is left.
    """
    memory, plan = prepared.recipe.memory, prepared.plan
    shares = [1.0 if not failed else 0.85]
    for phase in over:
        place = exceeded(prepared, phase)
        if place and place.predicted:
            shares.append(place.predicted / place.measured)
    smaller = {
        where: int(min(shares) * min(asked or plan.predicted_bytes(place), plan.predicted_bytes(place)))
        for where, place, asked in (("vram", "device", memory.vram), ("ram", "host", memory.ram))
        if asked or place == ("device" if prepared.device.type == "cuda" else "host")
    }
    recipe = prepared.recipe.model_copy(update={"memory": memory.model_copy(update=smaller)})
    corpus = corpus_shape(prepared.train, prepared.heldout)
    fresh = plan_for_lengths(recipe, prepared.checkpoint, prepared.anatomy, corpus, plan.max_length)
    return replace(prepared, plan=replace(fresh, warnings=plan.warnings))


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
