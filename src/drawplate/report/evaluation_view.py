"""The page's changes: held-out documents, general text and the quantization tax, drawn as intervals and as a table.

Then what training and held-out documents have in common, and where every token went. Only formatting; what a change is
called is evaluation/interval.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from drawplate.evaluation.interval import Change
from drawplate.records import Evaluation, LeakReport, RunRecord
from drawplate.report.chart import value_axis
from drawplate.report.comparisons import (
    Comparison,
    comparisons,
    general_change,
    measured,
    released,
    tax_change,
    trained_base,
)
from drawplate.report.visible import visible
from drawplate.report.wording import Fact, format_figure
from drawplate.units import format_count, plural

_ROW_PIXELS, _NAME_PIXELS, _BAR_PIXELS = 44, 14, 32
"""A row's height, and how far below its top the name and the bar lie."""
_STYLES = {"better": "good", "worse": "bad"}


@dataclass(frozen=True, kw_only=True)
class ChangeRow:
    """One paired change of perplexity: on what, from what to what."""

    name: str
    before: str
    after: str
    change: Change
    note: str


def change_rows(record: RunRecord) -> list[ChangeRow]:
    """Every change that was measured, the verdict's own first."""
    facts, trained_on = record.evaluation, trained_base(record)
    tax_documents = plural(facts.quantization_tax_documents, "held-out document")
    on = f" on {trained_on}" if trained_on else ""
    found = (
        *(_heldout_row(record, compared) for compared in comparisons(record)),
        (
            "General text",
            (facts.general_baseline, facts.general_final),
            general_change(record),
            f"before and after training{on}, {plural(facts.general_documents, 'document')} of {facts.general_text}: "
            "what was forgotten",
        ),
        (
            "Quantization",
            (facts.unquantized_baseline, facts.quantized_baseline),
            tax_change(record),
            f"from the base model as released to {record.model.precision or 'the quantized one'}, before training, "
            f"{tax_documents}",
        ),
    )
    return [
        ChangeRow(name=name, before=_perplexity(before), after=_perplexity(after), change=change, note=note)
        for name, (before, after), change, note in found
        if change is not None
    ]


Found = tuple[str, tuple[Evaluation | None, Evaluation | None], Change | None, str]


def _heldout_row(record: RunRecord, compared: Comparison) -> Found:
    documents = plural(compared.documents, "document")
    name, note = "Held-out documents", f"before and after training, {documents}"
    if compared.base:
        note = f"on {compared.base}, without and with {compared.adapter}, {documents}"
        name = f"Held-out documents, {'as released' if compared == released(record) else record.model.precision}"
    return name, (compared.before, compared.after), compared.change, note


def _perplexity(result: Evaluation | None) -> str:
    return format_figure(result.perplexity) if result is not None and measured(result) else "\u2013"


def intervals_svg(rows: Sequence[ChangeRow]) -> Markup:
    """Each change as a dot on its 95 % interval, over a common axis with zero on it."""
    ends = [end for row in rows for end in (row.change.ci95_percent or (row.change.percent,))]
    axis = value_axis([0.0, *ends])
    height = _ROW_PIXELS * len(rows)
    title = "; ".join(f"{row.name}: {row.change.in_words()}" for row in rows)
    parts = [_fill('<svg class="intervals" role="img" height="{}" aria-label="{}">', height + 24, title)]
    for tick in axis.ticks:
        style = "zero" if abs(tick) < axis.step / 1e6 else "grid-line"
        x = _percent(axis.share(tick))
        parts.append(_fill('<line class="{}" x1="{}" x2="{}" y1="0" y2="{}"/>', style, x, x, height))
        text = '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
        parts.append(_fill(text, x, height + 17, _signed(axis.label(tick))))
    for i, row in enumerate(rows):
        parts.append(_bar(row, axis.share, _ROW_PIXELS * i))
    return Markup("").join(parts) + Markup("</svg>")


def _bar(row: ChangeRow, share: Callable[[float], float], top: float) -> Markup:
    """The row's name, and below it the interval with its dot."""
    style = _STYLES.get(row.change.word, "neutral")
    low, high = (share(end) for end in row.change.ci95_percent or (row.change.percent, row.change.percent))
    from_left = low + high < 1.0  # a name begins or ends with its interval, on the side that has room
    place, anchor = (low, "start") if from_left else (high, "end")
    text = '<text class="row-name" x="{}" y="{}" dy="0.32em" text-anchor="{}">{}</text>'
    parts = [_fill(text, _percent(place), top + _NAME_PIXELS, anchor, row.name)]
    y = top + _BAR_PIXELS
    if row.change.ci95_percent:
        reach = '<line class="reach {}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        parts.append(_fill(reach, style, _percent(low), _percent(high), y, y))
    dot = '<circle class="{}" cx="{}" cy="{}" r="5"><title>{}</title></circle>'
    parts.append(_fill(dot, style, _percent(share(row.change.percent)), y, row.name))
    return Markup("").join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _signed(label: str) -> str:
    """A tick with its sign and unit, and a true minus."""
    sign = "" if label.startswith("-") or not label.strip("0.") else "+"
    return f"{sign}{label} %".replace("-", "\u2212")


def _fill(template: str, *values: object) -> Markup:
    return Markup(template).format(*(visible(value) for value in values))


def leak_sentences(leaks: LeakReport | None) -> list[str]:
    """What training and held-out documents have in common; nothing where it was not looked for."""
    if leaks is None:
        return []
    percent = f"{100 * leaks.threshold:.0f} %"
    first = (
        f"{plural(leaks.similar_pairs, 'training document')} nearly repeated a held-out one ({percent} of their runs "
        f"of five words or more in common); {format_count(leaks.set_aside_documents)} of them were set aside and not "
        "trained on."
    )
    if not leaks.similar_pairs:
        first = f"No training document repeats a held-out one ({percent} of their runs of five words, or more)."
    longest = f"The longest run of words that both sides still share is {plural(leaks.longest_shared_words, 'word')}"
    where = f", in {leaks.train_document} and {leaks.heldout_document}" if leaks.train_document else ""
    return [first, f"{longest}{where}."]


def token_rows(record: RunRecord) -> list[Fact]:
    """Where every token of both sides went: each side's lines sum to its tokens. Empty for a record without them."""
    ledger = record.data.ledger
    if ledger is None:
        return []
    train, heldout = ledger.train, ledger.heldout
    lines = (
        ("Tokens", train.tokens, heldout.tokens, "in all documents of the side"),
        ("counted by the loss", train.counted_tokens, heldout.counted_tokens, ""),
        ("first of a window", train.first_tokens, heldout.first_tokens, "nothing precedes it"),
        ("masked", train.masked_tokens, heldout.masked_tokens, "prompts, and what the loss is told to leave out"),
        ("dropped", train.dropped_tokens, heldout.dropped_tokens, "in windows where the loss would count nothing"),
        ("read again as context", train.context_tokens, heldout.context_tokens, "not counted a second time"),
    )
    rows = [
        Fact(label=name, value=f"{format_count(a)} | {format_count(b)}", note=note if a or b else "")
        for name, a, b, note in lines
    ]
    seen = f"{format_count(ledger.seen_tokens)}"
    return [*rows, Fact(label="seen by all optimizer steps", value=seen, note="counted, as often as they were read")]
