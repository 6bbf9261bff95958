"""A plan as a person reads it: what was chosen and why, the bytes, the seconds, and what other budgets would buy.

The same rows serve the terminal (`plan_table`) and the page (`PlanSection`). Formats only; figures are the plan's own,
with the measured ones beside them once there is a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from drawplate.records import Plan, RunRecord
from drawplate.report.chart import Chart, Series
from drawplate.report.figures import Figure
from drawplate.report.sections import plan_rows
from drawplate.report.summary import FactsTable, Line, warning_lines
from drawplate.report.visible import visible
from drawplate.report.wording import Fact
from drawplate.units import GIB, format_bytes, format_count, format_seconds, plural

SETTLED = ("device", "double_quant", "micro_batch_sequences", "optimizer_steps", "epochs", "eval_batch_sequences")
"""Decisions that the first lines tell, or that nobody asks for in ten seconds."""
LINES_SHOWN = 6


@dataclass(frozen=True)
class Grid:
    """Aligned columns, the first to the left and the others to the right unless named in `left`."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [tuple(visible(cell, encoding=options.encoding) for cell in row) for row in (self.columns, *self.rows)]
        widths = [max(len(row[i]) for row in shown) for i in range(len(self.columns))]
        yield Text()
        yield Text(self.heading, style="bold")
        for number, row in enumerate(shown):
            cells = (
                c.ljust(w) if i in self.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            text = "  " + "  ".join(cells)
            if text.strip():
                yield Text(text.rstrip(), style="dim" if number == 0 else "")


def headline(plan: Plan) -> list[str]:
    """The plan in two sentences: how, and how fast in how much memory."""
    tokens = f"{format_count(plan.micro_batch_tokens)} tokens at a time"
    first = f"{plan.precision} weights, {_where(plan)}; {_activations(plan)}; {tokens}."
    parts = []
    if plan.times is not None:
        steps = f"{plural(plan.optimizer_steps, 'step')}, {_epochs(plan)}"
        parts.append(
            f"{format_count(plan.times.tokens_per_second)} tokens/s: {format_seconds(plan.times.training_seconds)} to "
            f"train ({steps}), {format_seconds(plan.times.evaluation_seconds)} for each measurement"
        )
    peaks = [f"{format_bytes(n)} on the {where}" for where in ("device", "host") if (n := plan.predicted_bytes(where))]
    return [first, "; ".join([*parts, " and ".join(peaks)]) + "."]


def _epochs(plan: Plan) -> str:
    """Those that were asked for, or how much of them train.max_steps and train.max_minutes leave."""
    words = f"{plan.epochs:g} epoch{'' if plan.epochs == 1 else 's'}"
    if plan.times is None or not plan.times.epoch_seconds:
        return words
    reached = plan.times.training_seconds / plan.times.epoch_seconds
    return words if reached > 0.99 * plan.epochs else f"{reached:.2g} of {words}"


def _where(plan: Plan) -> str:
    if not plan.layers:
        return f"weights: {plan.weights}"
    here = "in memory" if plan.device == "cpu" and not plan.host_layers else "on the device"
    counted = (
        (plan.dequantized_layers, f"{'transposed too' if plan.precision == 'fp8' else 'dequantized'} {here}"),
        (plan.device_layers, here),
        (plan.host_layers, "streamed from the host"),
    )
    parts = [(n, words) for n, words in counted if n]
    if len(parts) == 1:
        return f"all {plan.layers} layers {parts[0][1]}"
    return " and ".join(f"{n} layers {words}" for n, words in parts)


def _activations(plan: Plan) -> str:
    if not plan.layers or plan.kept_layers == plan.layers:
        return "activations kept" if plan.layers else f"activations: {plan.activations}"
    inputs = "from inputs offloaded to the host" if plan.policy == "offload" else "from inputs on the device"
    count = plan.layers - plan.kept_layers - plan.host_kept_layers
    again = f"{'all' if count == plan.layers else f'{count} of {plan.layers}'} layers computed again {inputs}"
    if not plan.host_kept_layers:
        return again
    kept = f"activations of {plan.kept_layers} layers kept on the device and of {plan.host_kept_layers} in host memory"
    return f"{kept}, {again}" if count else kept


def plan_table(plan: Plan) -> RenderableType:
    """What a person reads in ten seconds, and below it why."""
    facts = [
        Fact(label=row.name, value=row.value, note=row.reason)
        for row in plan_rows(plan)
        if row.reason or row.name not in SETTLED
    ]
    grids: list[RenderableType] = [grid for grid in (*memory_grids(plan), time_grid(plan), frontier_grid(plan)) if grid]
    assumed: list[RenderableType] = [Line(f"Assumed: {text}", "cyan") for text in plan.assumptions]
    first, second = headline(plan)
    return Group(
        Line(first, "bold"),
        Line(second, "bold green"),
        *assumed,
        *warning_lines(plan.warnings),
        *grids,
        Text(),
        Text("Decisions and reasons", style="bold"),
        FactsTable(tuple(facts)),
    )


def memory_grids(plan: Plan) -> list[Grid]:
    """The ledger's largest lines for each place, the rest in one; bytes of a place sum to its peak."""
    grids = []
    for where in ("device", "host", "disk"):
        lines = sorted((x for x in plan.ledger if x.where == where), key=lambda x: -x.bytes)
        if not lines:
            continue
        phase = max(plan.phases, key=lambda p: p.bytes(where)).phase if plan.phases else ""
        rows = [(x.name, format_bytes(x.bytes), x.formula) for x in lines[:LINES_SHOWN]]
        if rest := lines[LINES_SHOWN:]:
            rows.append((f"{len(rest)} smaller lines", format_bytes(sum(x.bytes for x in rest)), ""))
        rows.append(("predicted peak", format_bytes(plan.predicted_bytes(where)), phase and f"in {phase}"))
        grids.append(Grid(f"Memory on the {where}", ("", "", ""), tuple(rows), left=(0, 2)))
    return grids


def time_grid(plan: Plan) -> Grid | None:
    """The lines of an optimizer step."""
    if plan.times is None:
        return None
    rows = [*time_rows(plan), ("an optimizer step", f"{plan.times.step_seconds:.3f} s", "100 %")]
    return Grid("Time of an optimizer step", ("", "", ""), tuple(rows))


def time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Name, seconds and share of each line of an optimizer step, the largest first."""
    if plan.times is None:
        return []
    whole = plan.times.step_seconds or 1.0
    lines = sorted(plan.times.lines, key=lambda line: -line.seconds)
    return [(x.name, f"{x.seconds:.3f} s", f"{100 * x.seconds / whole:.0f} %") for x in lines]


FRONTIER_COLUMNS = ("Device memory", "tokens/s", "weights", "where", "activations", "tokens at a time")


def frontier_grid(plan: Plan) -> Grid | None:
    """What other budgets would buy."""
    if not plan.frontier:
        return None
    return Grid("What other budgets would buy", FRONTIER_COLUMNS, tuple(frontier_rows(plan)), left=(2, 3, 4))


def frontier_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A row a point."""
    return [
        (
            format_bytes(p.vram_bytes),
            format_count(p.tokens_per_second),
            p.precision,
            p.weights,
            p.activations,
            format_count(p.micro_batch_tokens),
        )
        for p in plan.frontier
    ]


@dataclass(frozen=True, kw_only=True)
class PlanSection:
    """What the page shows of a plan beside its decisions and its ledger."""

    sentences: Sequence[str]
    assumptions: Sequence[str]
    times: Sequence[tuple[str, str, str]]
    compared: Sequence[tuple[str, str, str]]
    phases: Sequence[tuple[str, str, str]]
    columns: Sequence[str]
    frontier: Sequence[tuple[str, ...]]
    figure: Figure | None


def plan_section(record: RunRecord) -> PlanSection | None:
    """The page's rows; None where the record holds no plan with times."""
    plan = record.plan
    if plan is None or plan.times is None:
        return None
    return PlanSection(
        sentences=headline(plan),
        assumptions=plan.assumptions,
        times=time_rows(plan),
        compared=compared_rows(record),
        phases=[(p.phase, format_bytes(p.bytes("device")), format_bytes(p.bytes("host"))) for p in plan.phases],
        columns=FRONTIER_COLUMNS,
        frontier=frontier_rows(plan),
        figure=frontier_figure(plan),
    )


def compared_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Seconds and bytes, predicted and measured; a dash where something was not measured."""
    times, memory = (record.plan.times if record.plan else None), record.memory
    rows = []
    if times is not None:
        measured = record.times
        rows += [
            ("Optimizer step", _seconds(times.step_seconds), _seconds(measured.step_seconds)),
            ("Tokens per second, once warm", format_count(times.tokens_per_second), _count(measured.tokens_per_second)),
            ("Training", _seconds(times.training_seconds), _seconds(measured.training_seconds)),
            ("One measurement", _seconds(times.evaluation_seconds), _seconds(measured.evaluation_seconds)),
        ]
    peaks = (
        ("Device memory", memory.device_peak_predicted_bytes, memory.device_peak_bytes),
        ("Host memory", memory.host_peak_predicted_bytes, memory.host_peak_bytes),
    )
    rows += [
        (name, format_bytes(a) if a else "\u2013", format_bytes(b) if b else "\u2013") for name, a, b in peaks if a or b
    ]
    return rows


def _seconds(seconds: float) -> str:
    return "\u2013" if not seconds else f"{seconds:.3f} s" if seconds < 10 else format_seconds(seconds)


def _count(count: float) -> str:
    return format_count(count) if count else "\u2013"


def frontier_figure(plan: Plan) -> Figure | None:
    """Tokens per second against device memory."""
    if len(plan.frontier) < 2:
        return None
    points = tuple((p.vram_bytes / GIB, p.tokens_per_second) for p in plan.frontier)
    first, last = plan.frontier[0], plan.frontier[-1]
    chart = Chart(
        key="frontier",
        title="Predicted tokens per second against device memory",
        description=(
            f"From {format_count(first.tokens_per_second)} tokens/s in {format_bytes(first.vram_bytes)} to "
            f"{format_count(last.tokens_per_second)} in {format_bytes(last.vram_bytes)}."
        ),
        x_label="GiB of device memory",
        y_label="tokens per second",
        series=(Series(name="predicted tokens/s", style="line-a", points=points, marks=True),),
        y_from_zero=True,
    )
    return Figure(heading="Frontier", chart=chart, caption="", columns=(), rows=(), all_rows=0)
