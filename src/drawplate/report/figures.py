"""The two curves of a run, and the same figures as tables for those who cannot or would rather not read a picture.

The training loss is drawn as it was logged: not smoothed, and a step that was skipped for a loss that is not a number
is a gap. Tables are thinned to TABLE_ROWS evenly spaced rows and say so; metrics.jsonl holds every one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from drawplate.records import EvaluationPoint, MemoryPoint, RunRecord
from drawplate.report.chart import Band, Chart, Level, Series
from drawplate.report.comparisons import measured, trained_base
from drawplate.report.wording import format_figure
from drawplate.units import GIB, MIB, format_bytes, format_count, format_seconds, plural

TABLE_ROWS = 60
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its heading, its caption, its table and how many rows the whole table would have."""

    heading: str
    chart: Chart
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    all_rows: int


def thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items, evenly spaced, the first and the last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def heldout_points(record: RunRecord) -> list[EvaluationPoint]:
    """The held-out measurements during the run; where none were logged, those from before and after it."""
    points = [point for point in record.evaluations if measured(point.result)]
    if points:
        return points
    last = record.training.best_step or record.training.optimizer_steps
    ends = ((0, record.evaluation.baseline), (last, record.evaluation.final))
    return [EvaluationPoint(step=step, result=result) for step, result in ends if result and measured(result)]


def loss_figure(record: RunRecord) -> Figure | None:
    """Training loss of every step with the held-out loss over it, or None where nothing was trained."""
    heldout = heldout_points(record)
    if not record.steps:
        return None
    curves = [Series(name="Training loss", style="line-a", points=tuple((s.step, s.loss) for s in record.steps))]
    if heldout:
        points = tuple((p.step, p.result.loss) for p in heldout)
        curves.append(Series(name="Held-out loss", style="line-b", points=points, marks=True))
    chart = Chart(
        key="loss",
        title="Loss over optimizer steps",
        description=_loss_description(record, heldout),
        x_label="optimizer step",
        y_label="nats per token",
        series=tuple(curves),
        whole_x=True,
    )
    rows = tuple(_loss_rows(record, heldout))
    columns = ("Step", "Training loss", "Held-out loss", "Held-out perplexity", "Learning rate", "Tokens/s")
    on = f" Both on {base}." if (base := trained_base(record)) else ""
    caption = f"Mean negative log-likelihood; training as logged at each step, not smoothed.{on}"
    total = len({s.step for s in record.steps} | {p.step for p in heldout})
    return Figure(heading="Loss", chart=chart, caption=caption, columns=columns, rows=rows, all_rows=total)


def _loss_description(record: RunRecord, heldout: list[EvaluationPoint]) -> str:
    finite = [s for s in record.steps if math.isfinite(s.loss)]
    text = "No training loss was a finite number."
    if finite:
        first, last = finite[0], finite[-1]
        text = f"Training loss went from {first.loss:.3f} at step {first.step} to {last.loss:.3f} at step {last.step}."
    if gaps := len(record.steps) - len(finite):
        text += f" {plural(gaps, 'step')} without a finite loss left a gap."
    if len(heldout) > 1:
        text += f" Held-out loss went from {heldout[0].result.loss:.3f} to {heldout[-1].result.loss:.3f}."
    return text


def _loss_rows(record: RunRecord, heldout: list[EvaluationPoint]) -> list[tuple[str, ...]]:
    at_step = {point.step: point.result for point in heldout}
    steps = {step.step: step for step in thin(record.steps, TABLE_ROWS)}
    steps |= {step.step: step for step in record.steps if step.step in at_step}
    rows: list[tuple[str, ...]] = []
    for number in sorted(steps.keys() | at_step.keys()):
        step, result = steps.get(number), at_step.get(number)
        rows.append(
            (
                format_count(number),
                format_figure(step.loss, 4) if step else "",
                format_figure(result.loss, 4) if result else "",
                format_figure(result.perplexity) if result else "",
                f"{step.learning_rate:.2e}" if step else "",
                format_count(step.tokens_per_second) if step else "",
            )
        )
    return rows


def memory_figure(record: RunRecord) -> Figure | None:
    """Memory over the run's time, with the predicted peaks as dashed lines; None where no sample was taken."""
    samples = record.memory_curve
    if not samples:
        return None
    on_device = any(p.sample.device_allocated_bytes or p.sample.device_reserved_bytes for p in samples)
    seconds_each, time_unit = _time_unit(samples[-1].seconds)
    levels = _predictions(record, on_device)
    largest = max([max(_shown_bytes(p)) for p in samples] + [value for _, _, value in levels])
    bytes_each, unit = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    kinds = [("Process", "line-c", 0)]
    if on_device:
        kinds = [("Device, allocated", "line-b", 1), ("Device, reserved", "line-a", 2), *kinds]
    series = [
        Series(
            name=name,
            style=style,
            points=tuple((p.seconds / seconds_each, _shown_bytes(p)[i] / bytes_each) for p in samples),
        )
        for name, style, i in kinds
    ]
    chart = Chart(
        key="memory",
        title="Memory over time",
        description=_memory_description(record, on_device),
        x_label=f"{time_unit} since the start",
        y_label=unit,
        series=tuple(series),
        levels=tuple(Level(name=name, style=style, value=value / bytes_each) for name, style, value in levels),
        bands=_phases(samples, seconds_each),
        y_from_zero=True,
    )
    columns = ("Time", "Phase", "Step", "Process") + (("Allocated", "Reserved", "Device free") if on_device else ())
    rows = tuple(_memory_row(point, on_device) for point in thin(samples, TABLE_ROWS))
    caption = "Sampled during the run; between two samples it may have been higher, so peaks are in the table above."
    return Figure(heading="Memory", chart=chart, caption=caption, columns=columns, rows=rows, all_rows=len(samples))


def _shown_bytes(point: MemoryPoint) -> tuple[int, int, int]:
    sample = point.sample
    return sample.process_bytes, sample.device_allocated_bytes, sample.device_reserved_bytes


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _predictions(record: RunRecord, on_device: bool) -> list[tuple[str, str, int]]:
    memory = record.memory
    lines = [("Predicted host peak", "level-c", memory.host_peak_predicted_bytes)]
    if on_device:
        lines.insert(0, ("Predicted device peak", "level-b", memory.device_peak_predicted_bytes))
    return [line for line in lines if line[2]]


def _phases(samples: Sequence[MemoryPoint], seconds_each: float) -> tuple[Band, ...]:
    """Each phase ends with the last sample taken in it; the next begins there."""
    bands: list[Band] = []
    start = 0.0
    for here, following in zip(samples, [*samples[1:], None], strict=True):
        if following is None or following.phase != here.phase:
            end = here.seconds / seconds_each
            bands.append(Band(name=here.phase, shaded=here.phase != "train", start=start, end=end))
            start = end
    return tuple(bands) if len(bands) > 1 else ()


def _memory_description(record: RunRecord, on_device: bool) -> str:
    memory = record.memory
    text = f"The process reached {format_bytes(memory.host_peak_bytes)} of host memory."
    if on_device:
        text += f" The device reached {format_bytes(memory.device_peak_bytes)}."
    return text


def _memory_row(point: MemoryPoint, on_device: bool) -> tuple[str, ...]:
    sample = point.sample
    row = (format_seconds(point.seconds), point.phase, format_count(point.step), format_bytes(sample.process_bytes))
    if not on_device:
        return row
    device = (sample.device_allocated_bytes, sample.device_reserved_bytes, sample.device_free_bytes)
    return row + tuple(format_bytes(count) for count in device)
