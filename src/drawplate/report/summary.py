"""What a run, a plan and an evaluation look like in a terminal; plain lines where the output is not one.

Left out: everything the page shows better (curves, single documents, the ledger's formulas).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from drawplate.evaluation.interval import Change
from drawplate.records import ModelScore, RunRecord
from drawplate.report.comparisons import measured
from drawplate.report.next_command import NextCommand, next_commands
from drawplate.report.sections import all_warnings
from drawplate.report.visible import visible
from drawplate.report.wording import (
    Fact,
    Verdict,
    data_facts,
    format_figure,
    memory_facts,
    places,
    score_facts,
    training_facts,
    verdict,
)
from drawplate.units import format_count, plural

_TONES = {"better": "bold green", "worse": "bold red", "failed": "bold red", "stopped": "bold yellow"}


@dataclass(frozen=True)
class FactsTable:
    """Labelled figures: aligned columns in a terminal, one line each where the output is not one."""

    facts: tuple[Fact, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [tuple(visible(t, encoding=options.encoding) for t in (f.label, f.value, f.note)) for f in self.facts]
        if not options.is_terminal:
            width = max((len(label) for label, _, _ in shown), default=0)
            for label, value, note in shown:
                both = f"{value}  ({note})" if value and note else value or note
                yield Text(f"{label:<{width}}  {both}")
            return
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value, note in shown:
            cell = Text(value, style="bold")
            table.add_row(Text(label), cell.append(f"  {note}" if value else note, style="not bold dim"))
        yield table


@dataclass(frozen=True)
class Line:
    """One line of text from anywhere, shown as it is: no markup, no control character obeyed."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(visible(self.text, keep="\n", encoding=options.encoding), style=self.style)


def show(renderable: RenderableType, console: Console) -> None:
    """Prints one of this file's tables; in a file or a pipe no line is broken, however long its path is."""
    console.print(renderable, soft_wrap=not console.is_terminal)


def summary_table(record: RunRecord, folder: Path | str) -> RenderableType:
    """The end of a run: the verdict, its figures, where everything is, and the next command."""
    ruling = verdict(record)
    facts = [*data_facts(record), *score_facts(record), *training_facts(record), *memory_facts(record)]
    facts += places(record, str(folder))
    facts.append(Fact(label="Report", value=f"{folder}/report.html"))
    parts: list[RenderableType] = [*_verdict_lines(ruling), Text(), FactsTable(tuple(facts))]
    parts += warning_lines(all_warnings(record))
    return Group(*parts, *_next_lines(next_commands(record, str(folder))))


def _verdict_lines(ruling: Verdict) -> list[RenderableType]:
    headline = f"{ruling.headline}, {ruling.scores}" if ruling.scores else ruling.headline
    lines: list[RenderableType] = [Line(headline, _TONES.get(ruling.tone, "bold"))]
    return lines + ([Line(ruling.detail)] if ruling.detail else [])


def warning_lines(warnings: Iterable[str]) -> list[RenderableType]:
    """One coloured line each, after an empty one."""
    lines: list[RenderableType] = [Line(f"Warning: {warning}", "yellow") for warning in warnings]
    return [Text(), *lines] if lines else []


def _next_lines(commands: list[NextCommand]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for n, command in enumerate(commands):
        what = f", {command.what}" if len(commands) > 1 else ""
        said = "Next, measure it on documents of your own" if n == 0 else "And the other one"
        lines += [Text(), Line(f"{said}{what}:"), *_command_lines(command.parts)]
    return lines


def _command_lines(parts: Iterable[str]) -> list[RenderableType]:
    """The command over several lines that a shell takes as one, so that none is broken by a narrow terminal."""
    return [Line("  " + line, "bold") for line in " \\\n  ".join(parts).split("\n")]


def evaluation_table(results: Mapping[str, ModelScore]) -> RenderableType:
    """Models and adapters on the same documents; each after the first with its verdict against the first.

    Args:
        results: name (such as "base model", "with adapter") -> score, in the order shown.
    """
    shown = {name: result for name, result in results.items() if measured(result)}
    if not shown:
        return Line("Nothing was measured: no token was counted.")
    facts = [Fact(label="Documents", value=format_count(next(iter(shown.values())).documents))]
    for name, result in shown.items():
        notes = [f"{format_figure(result.bits_per_byte, 4)} bits per byte"] if result.bytes else []
        notes += [f"loss {format_figure(result.loss, 4)}", plural(result.tokens, "token"), result.precision]
        value = f"perplexity {format_figure(result.perplexity)}"
        facts.append(Fact(label=name, value=value, note=", ".join(note for note in notes if note)))
        if result.verdict:
            facts.append(Fact(label="  against the first", value=result.verdict, note=_compared_by(result)))
    return FactsTable(tuple(facts))


def _compared_by(result: ModelScore) -> str:
    if result.perplexity_change_percent is None:
        return "bits per byte; the tokenizers differ, so perplexities do not compare"
    if result.bits_per_byte_change_percent is None:
        return "perplexity"
    bits = Change(percent=result.bits_per_byte_change_percent, ci95_percent=result.bits_per_byte_ci95_percent)
    return f"perplexity; bits per byte {bits.in_figures()}"
