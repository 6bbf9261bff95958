"""The page's tables as rows of text: scores, documents, data, plan, ledger, recipe, machine.

Only formatting: a row is a figure of the record, or the difference of two. What the record does not hold gives no row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import yaml

from drawplate.records import AdapterFacts, Evaluation, LedgerLine, Plan, RunRecord
from drawplate.report.comparisons import (
    ADAPTER,
    adapters,
    comparisons,
    documents_compared,
    measured,
    perplexity_change_percent,
    purpose,
    released,
    trained_base,
)
from drawplate.report.wording import Fact, format_figure
from drawplate.units import format_bytes, format_count, format_percent, format_seconds, plural

_DOCUMENTS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One measure of the held-out documents, before and after."""

    name: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """The measures of the held-out documents on one base model."""

    caption: str
    rows: list[ScoreRow]


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """One held-out document's perplexity, before and after."""

    name: str
    tokens: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One decision of the plan and why it was taken."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LedgerGroup:
    """The ledger's lines for one place, their sum, and the peak measured there."""

    where: str
    lines: list[LedgerLine]
    total: str
    peak: str


def score_tables(record: RunRecord) -> list[ScoreTable]:
    """Perplexity, loss and bits per byte on each base model, the verdict's first."""
    found = [
        ScoreTable(
            caption=f"Held-out documents {_on(each.base, each.adapter)}",
            rows=_score_rows(each.before, each.after, each.change.in_figures()),
        )
        for each in comparisons(record)
    ]
    before, after = measured(record.evaluation.baseline), measured(record.evaluation.final)
    if found or (before is None and after is None):
        return found
    return [ScoreTable(caption=f"Held-out documents {_on(trained_base(record))}", rows=_score_rows(before, after, ""))]


def _on(base: str, adapter: str = ADAPTER) -> str:
    return f"on {base}, without and with {adapter}" if base else "before and after training"


def _score_rows(before: Evaluation | None, after: Evaluation | None, change: str) -> list[ScoreRow]:
    """A side that was not measured is a dash."""
    rows = [
        ScoreRow(
            name="Perplexity",
            before=_score(before, "perplexity", 2),
            after=_score(after, "perplexity", 2),
            change=change,
        ),
        _difference_row("Loss, nats per token", before, after, "loss"),
    ]
    if all(result is None or result.bytes for result in (before, after)):
        rows.append(_difference_row("Bits per byte", before, after, "bits_per_byte"))
    return rows


def _score(result: Evaluation | None, name: str, decimals: int) -> str:
    return format_figure(getattr(result, name), decimals) if result else "\u2013"


def _difference_row(label: str, before: Evaluation | None, after: Evaluation | None, name: str) -> ScoreRow:
    change = ""
    if before and after:
        change = f"{getattr(after, name) - getattr(before, name):+.3f}"
    return ScoreRow(name=label, before=_score(before, name, 3), after=_score(after, name, 3), change=change)


def document_rows(record: RunRecord) -> tuple[list[DocumentRow], list[DocumentRow]]:
    """The held-out documents that gained most and least, at most five each and none twice."""
    _, compared = documents_compared(record)
    rows = [
        _document_row(document.document, before, after)
        for document, before, after in sorted(compared, key=lambda each: each[2].loss - each[1].loss)
    ]
    best = rows[: min(_DOCUMENTS_SHOWN, math.ceil(len(rows) / 2))]
    return best, rows[len(best) :][-_DOCUMENTS_SHOWN:][::-1]


def _document_row(name: str, before: Evaluation, after: Evaluation) -> DocumentRow:
    return DocumentRow(
        name=name,
        tokens=format_count(before.tokens),
        before=format_figure(before.perplexity),
        after=format_figure(after.perplexity),
        change=format_percent(perplexity_change_percent(before, after)),
    )


def improved(record: RunRecord) -> str:
    """How many held-out documents gained, in one sentence; empty where none were scored."""
    base, compared = documents_compared(record)
    if not compared:
        return ""
    better = sum(after.nats < before.nats for _, before, after in compared)
    on = f" on {base}" if base else ""
    return f"{format_count(better)} of {plural(len(compared), 'held-out document')} became easier to predict{on}."


def data_account(record: RunRecord) -> list[Fact]:
    """Where files, documents and tokens went, those not used included; empty where nothing was read."""
    data = record.data
    if not (data.files or data.refused_files or data.skipped_files):
        return []
    lines = (
        ("Files read", data.files, ""),
        ("Files skipped", data.skipped_files, "reasons in intake.jsonl"),
        ("Files refused", data.refused_files, "reasons in intake.jsonl"),
        ("Documents", data.documents, ""),
        ("Duplicates left out", data.duplicate_documents, ""),
        ("Documents cut into windows", data.cut_documents, "cut, not truncated: every window is used"),
        ("Windows", data.windows, ""),
        ("Tokens trained on", data.train_tokens, ""),
        ("Tokens held out", data.heldout_tokens, ""),
        ("Tokens dropped", data.dropped_tokens, ""),
    )
    return [Fact(label=name, value=format_count(n), note=note if n else "") for name, n, note in lines]


_SHOWN_ELSEWHERE = {"reasons", "warnings", "ledger", "phases", "times", "frontier", "assumptions"} | {
    *("dequantized_layers", "device_layers", "host_layers", "kept_layers", "host_kept_layers", "policy", "slots"),
}


_DECIDED = {"micro_batch": "micro_batch_tokens", "num_train_epochs": "epochs"}
"""The row at which a reason stands that goes by another name."""


def plan_rows(plan: Plan) -> list[PlanRow]:
    """Every decision of the plan with its reason; a reason about anything else gets a row of its own."""
    names = [f.name for f in fields(plan) if f.name not in _SHOWN_ELSEWHERE]
    reasons = {_DECIDED.get(n, n): reason for n, reason in plan.reasons.items()}
    rows = [PlanRow(name=n, value=_plain(getattr(plan, n)), reason=reasons.get(n, "")) for n in names]
    others = [PlanRow(name=n, value="", reason=reason) for n, reason in reasons.items() if n not in names]
    return rows + others


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def ledger_groups(record: RunRecord) -> list[LedgerGroup]:
    """The plan's bytes by place, each with its sum and the measured peak where there is one."""
    if record.plan is None:
        return []
    peaks = {"device": record.memory.device_peak_bytes, "host": record.memory.host_peak_bytes}
    groups = []
    for where in ("device", "host", "disk"):
        lines = [line for line in record.plan.ledger if line.where == where]
        if lines:
            peak = format_bytes(peaks[where]) if peaks.get(where) else ""
            total = format_bytes(record.plan.predicted_bytes(where))
            groups.append(LedgerGroup(where=where, lines=lines, total=total, peak=peak))
    return groups


def all_warnings(record: RunRecord) -> list[str]:
    """The plan's warnings and the run's, each once."""
    return list(dict.fromkeys((*(record.plan.warnings if record.plan else ()), *record.warnings)))


def recipe_text(record: RunRecord) -> str:
    """The recipe as resolved, as YAML."""
    if not record.recipe:
        return ""
    return yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip()


def machine_rows(record: RunRecord) -> list[Fact]:
    """What the run ran on."""
    machine = record.machine
    cores = f"{machine.cores} cores, bf16 {'native' if machine.bf16_native else 'emulated'}"
    facts = [Fact(label="Processor", value=machine.cpu, note=cores)]
    if machine.ram_bytes:
        facts.append(Fact(label="Memory", value=format_bytes(machine.ram_bytes)))
    if machine.device_name or machine.device != "cpu":
        note = ", ".join(p for p in (format_bytes(machine.device_bytes), machine.driver) if p)
        facts.append(Fact(label="Device", value=machine.device_name or machine.device, note=note))
    elif machine.cpu:
        facts.append(Fact(label="Device", value="none; ran on the processor"))
    facts.append(Fact(label="System", value=machine.platform))
    return [fact for fact in facts if fact.value]


def model_rows(record: RunRecord) -> list[Fact]:
    """Which base model, in which precision, and the hashes that pin it and the documents."""
    model = record.model
    size = f"{format_count(model.parameters)} parameters" if model.parameters else ""
    layers = f"{model.layers} layers" if model.layers else ""
    facts = [
        Fact(label="Base model", value=model.name, note=model.revision or ""),
        Fact(label="Architecture", value=model.architecture, note=", ".join(p for p in (layers, size) if p)),
        Fact(label="Precision", value=model.precision, note=_frozen_bytes(model.frozen_bytes)),
        Fact(label="Weights, sha256", value=model.sha256[:16], note="the whole hash is in record.json"),
        Fact(label="Documents, sha256", value=record.data.sha256[:16]),
    ]
    return [fact for fact in facts if fact.value]


def _frozen_bytes(count: int) -> str:
    return f"{format_bytes(count)} of frozen weights" if count else ""


def version_rows(record: RunRecord) -> list[Fact]:
    """Drawplate's own version first, then everything it stood on."""
    others = [Fact(label=name, value=v) for name, v in record.versions.items() if name != "drawplate"]
    return [Fact(label="drawplate", value=record.drawplate), *others]


def phase_rows(record: RunRecord) -> list[Fact]:
    """Where the time went."""
    return [Fact(label=phase, value=format_seconds(seconds)) for phase, seconds in record.phase_seconds.items()]


def file_rows(record: RunRecord) -> list[Fact]:
    """What lies beside the page."""
    rows = [
        *((f"{adapter.folder}/", _adapter_words(record, adapter), True) for adapter in adapters(record)),
        ("record.json", "Everything that was measured; this page is made from it alone", True),
        ("metrics.jsonl", "A line for every step, memory sample and evaluation", bool(record.steps)),
        ("plan.json", "The plan and its ledger", record.plan is not None),
        ("recipe.yaml", "The recipe as resolved", bool(record.recipe)),
        ("intake.jsonl", "A line for every file that was offered", bool(record.data.files)),
        ("trained_on.txt", "A hash for every document that was trained on", bool(record.data.files)),
    ]
    return [Fact(label=name, value=what) for name, what, there in rows if there]


def _adapter_words(record: RunRecord, adapter: AdapterFacts) -> str:
    words = [f"The trained adapter, in PEFT's format, with a model card: {purpose(record, adapter)}".rstrip(": ")]
    if adapter.folder != ADAPTER:
        words = [f"The same without what it started from, {purpose(record, adapter)}, and for merging"]
        words += [] if released(record) else ["not measured"]
    return "; ".join(words)
