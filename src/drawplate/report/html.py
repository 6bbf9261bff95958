"""report.html: one self-contained page about one run, made from its record alone.

No script, no request to anywhere (the page's own Content-Security-Policy forbids both), no framework. Everything that
came from outside passes through `visible` and then jinja2's autoescape, so a hostile name is shown, never obeyed. Parts
that the record does not hold are left out. The page is a view: whoever wants figures reads record.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from drawplate.records import RunRecord
from drawplate.report import sections
from drawplate.report.chart import render_svg, swatch
from drawplate.report.evaluation_view import change_rows, intervals_svg, leak_sentences, token_rows
from drawplate.report.figures import Figure, loss_figure, memory_figure
from drawplate.report.next_command import next_commands
from drawplate.report.plan_view import plan_section
from drawplate.report.visible import visible
from drawplate.report.wording import (
    adapter_facts,
    folder_name,
    run_facts,
    verdict,
)
from drawplate.units import format_bytes, format_count

_HERE = Path(__file__).parent


def render_report(record: RunRecord) -> str:
    """The whole page as HTML text."""
    best, worst = sections.document_rows(record)
    changes = change_rows(record)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
            verdict=verdict(record),
            scores=sections.score_tables(record),
            facts=run_facts(record) + adapter_facts(record),
            figures=[figure for figure in (loss_figure(record), memory_figure(record)) if figure],
            best=best,
            worst=worst,
            improved=sections.improved(record),
            data=sections.data_account(record),
            plan=sections.plan_rows(record.plan) if record.plan else [],
            planned=plan_section(record),
            warnings=sections.all_warnings(record),
            ledger=sections.ledger_groups(record),
            recipe=sections.recipe_text(record),
            machine=sections.machine_rows(record),
            model=sections.model_rows(record),
            versions=sections.version_rows(record),
            phases=sections.phase_rows(record),
            changes=changes,
            leaks=leak_sentences(record.data.leaks),
            tokens=token_rows(record),
            files=sections.file_rows(record),
            folder=folder_name(record),
            commands=[(c.what, " \\\n  ".join(c.parts)) for c in next_commands(record, folder_name(record))],
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        lines=_lines, breakable=_breakable, typeset=typeset, bytes=format_bytes, count=format_count
    )
    environment.globals.update(draw=_draw, legend=_legend, draw_intervals=intervals_svg)
    return environment


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(value)


def _lines(text: str) -> Markup:
    return escape(visible(text, keep="\n\t"))


def _breakable(name: str) -> Markup:
    return escape(visible(name)).replace("_", Markup("_<wbr>"))


def typeset(text: str) -> Markup:
    """Our own figures with a true minus and arrow, and no line break between a number and its unit."""
    shown = visible(text).replace("->", "\u2192")
    shown = re.sub(r"(?<![\w.-])-(?=\d)", "\u2212", shown)
    return escape(re.sub(r"(?<=\d) (?=(?:%|[KMG]?i?B|s|min|h)(?:\W|$))", "\u00a0", shown))


def _draw(figure: Figure) -> Markup:
    return render_svg(figure.chart)


def _legend(figure: Figure) -> list[tuple[Markup, str]]:
    curves = [(swatch(series.style, series.marks), series.name) for series in figure.chart.series]
    return curves + [(swatch(level.style), level.name) for level in figure.chart.levels]
