"""A run in words and in labelled figures, shared by the page, the terminal and the model card.

Every figure is the record's own, only rounded; where the record does not hold one, the line is left out. What a change
is called, better, worse or neither, is evaluation/interval.py's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from drawplate.evaluation.interval import Word
from drawplate.records import Evaluation, RunRecord
from drawplate.report.comparisons import (
    ADAPTER,
    BITS,
    Comparison,
    comparisons,
    deployed_first,
    general_change,
    measured,
    purpose,
    tax_change,
    trained_base,
    why_not_released,
)
from drawplate.units import format_bytes, format_count, format_percent, format_seconds, plural

Tone = Word | Literal["unmeasured", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The first thing a reader sees: the verdict, the two scores, and what it rests on or what is safe."""

    tone: Tone
    headline: str
    scores: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One labelled figure, with what helps to read it."""

    label: str
    value: str
    note: str = ""


def format_figure(value: float | None, decimals: int = 2) -> str:
    """A score to `decimals` places; thousands are separated, and what is beyond a million is in powers of ten."""
    if value is None or math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return f"{value:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.2e}"


def verdict(record: RunRecord) -> Verdict:
    """Whether it helped, in evaluation/interval.py's words; a run that was stopped or failed says so first.

    It is about the base model that a person has: as released, where that was measured, and named where it was not.
    """
    if record.status != "finished":
        return _unfinished(record)
    found = comparisons(record)
    if not found:
        return Verdict(
            tone="unmeasured",
            headline=f"Finished after {_steps(record)}; whether it helped was not measured",
            detail="There is no held-out evaluation from both before and after the training.",
        )
    return verdict_of(record, found[0])


def verdict_of(record: RunRecord, compared: Comparison) -> Verdict:
    """The verdict on one base model, of a run that is finished."""
    words = compared.change.in_words()
    return Verdict(
        tone=compared.change.word,
        headline=words[0].upper() + words[1:],
        scores=_scores(compared),
        detail=_rests_on(record, compared),
    )


def _scores(compared: Comparison) -> str:
    on = f" on {compared.base}" if compared.base else ""
    return f"held-out perplexity {in_perplexities(compared)}{on}"


def in_perplexities(compared: Comparison) -> str:
    """`24.48 -> 13.76`."""
    return f"{format_figure(compared.before.perplexity)} -> {format_figure(compared.after.perplexity)}"


def _rests_on(record: RunRecord, compared: Comparison) -> str:
    brackets = ", with its 95 % interval" if compared.change.ci95_percent else ""
    sides = "before and after" if compared.adapter == ADAPTER else f"without and with {compared.adapter}"
    text = (
        f"Change of perplexity{brackets}, measured {sides} on {_documents(record, compared)}, none of them trained on."
    )
    return " ".join(part for part in (text, why_not_released(record)) if part)


def _documents(record: RunRecord, compared: Comparison) -> str:
    held_out = record.data.heldout_documents
    sample = f" of {format_count(held_out)} held-out ones" if compared.documents < held_out else ""
    return f"the same {plural(compared.documents, 'document')}{sample}, {plural(compared.after.tokens, 'token')}"


def _steps(record: RunRecord, of_planned: bool = False) -> str:
    done = record.training.optimizer_steps
    planned = record.plan.optimizer_steps if record.plan else 0
    if of_planned and planned > done:
        return f"{format_count(done)} of {plural(planned, 'optimizer step')}"
    return plural(done, "optimizer step")


def _unfinished(record: RunRecord) -> Verdict:
    verb = "failed" if record.status == "failed" else "was stopped"
    done = record.training.optimizer_steps
    headline = f"The run {verb} " + (f"after {_steps(record, True)}" if done else "before the first optimizer step")
    sentences = []
    reasons = dict.fromkeys((record.training.stopped_because, record.error)) if record.status == "stopped" else {}
    if reason := "; ".join(text.rstrip(".") for text in reasons if text):
        sentences.append(f"Reason: {reason}.")
    for compared in comparisons(record)[:1]:
        words = compared.change.in_words()
        sentences.append(f"{words[0].upper()}{words[1:]} ({_scores(compared)}).")
    if has_adapter(record):
        kept = [place.value + f" ({place.note})" * bool(place.note) for place in places(record, folder_name(record))]
        sentences.append(f"Safe: your documents, and the adapter trained so far, in {' and '.join(kept)}.")
    else:
        sentences.append("Your documents are untouched; nothing was trained, so there is no adapter.")
    tone: Tone = "failed" if record.status == "failed" else "stopped"
    return Verdict(tone=tone, headline=headline, detail=" ".join(sentences))


def folder_name(record: RunRecord) -> str:
    """The run's folder as the recipe names it, or a placeholder where the recipe is not in the record."""
    return str(record.recipe.get("output_dir") or "RUN_FOLDER")


def data_facts(record: RunRecord) -> list[Fact]:
    """Documents and tokens, and which were held out."""
    data = record.data
    if not data.documents:
        return []
    split = f"{format_count(data.train_documents)} trained on, {format_count(data.heldout_documents)} held out"
    tokens = f"{format_count(data.train_tokens)} trained on, {format_count(data.heldout_tokens)} held out"
    return [
        Fact(label="Documents", value=format_count(data.documents), note=split),
        Fact(label="Tokens", value=format_count(data.train_tokens + data.heldout_tokens), note=tokens),
    ]


def score_facts(record: RunRecord) -> list[Fact]:
    """Held-out perplexity before, after, and the change; then what stands beside it, each with its base model."""
    found, facts = comparisons(record), []
    if found:
        facts = _compared_facts(record, found[0])
    for label, result in (("Before", record.evaluation.baseline), ("After", record.evaluation.final)):
        if not found and result is not None and measured(result) is not None:
            facts.append(_perplexity_fact(label, result, trained_base(record)))
    for beside in found[1:]:
        value = f"perplexity {in_perplexities(beside)}, {beside.change.in_figures()}"
        note = f"{record.model.precision}, as in training; without and with {beside.adapter}"
        facts.append(Fact(label=f"On the {BITS[record.model.precision]}-bit base", value=value, note=note))
    if forgotten := general_change(record):
        note = ", on ".join(part for part in (record.evaluation.general_text, trained_base(record)) if part)
        facts.append(Fact(label="General text", value=forgotten.in_words(), note=note))
    if tax := tax_change(record):
        note = f"by quantizing the base model to {record.model.precision}, before training"
        facts.append(Fact(label="Quantization tax", value=tax.in_figures(), note=note))
    return facts


def _compared_facts(record: RunRecord, compared: Comparison) -> list[Fact]:
    after = f"with {compared.adapter}" if compared.base else ""
    interval = "95 % interval in brackets" if compared.change.ci95_percent else ""
    return [
        _perplexity_fact("Before", compared.before, compared.base),
        _perplexity_fact("After", compared.after, after),
        Fact(label="Change", value=compared.change.in_figures(), note=interval),
    ]


def _perplexity_fact(label: str, result: Evaluation, base: str) -> Fact:
    bits = f"{format_figure(result.bits_per_byte, 3)} bits per byte" if result.bytes else ""
    note = ", ".join(part for part in (base, bits) if part)
    return Fact(label=label, value=f"perplexity {format_figure(result.perplexity)}", note=note)


def training_facts(record: RunRecord) -> list[Fact]:
    """Steps, time and speed."""
    training = record.training
    if not training.optimizer_steps and not record.total_seconds:
        return []
    epochs = f"{round(training.epochs, 2):g}"
    notes = [f"{epochs} epoch{'' if epochs == '1' else 's'}"] if training.epochs else []
    if training.tokens_per_optimizer_step:
        notes.append(f"{format_count(training.tokens_per_optimizer_step)} tokens each")
    if training.skipped_steps:
        notes.append(f"{format_count(training.skipped_steps)} skipped")
    facts = [Fact(label="Optimizer steps", value=format_count(training.optimizer_steps), note=", ".join(notes))]
    if record.status == "finished" and training.stopped_because:
        facts.append(Fact(label="Ended early", value=training.stopped_because))
    if training.best_step is not None:
        facts.append(Fact(label="Adapter kept from step", value=format_count(training.best_step)))
    if training.corrections:
        facts.append(Fact(label="Out of memory, so", value=training.corrections[-1]))
    if record.resumed:
        times = len(record.resumed)
        facts.append(Fact(label="Taken up again", value=record.resumed[-1], note=f"{times} times" if times > 1 else ""))
    total = record.total_seconds or training.seconds
    if total:
        note = f"{format_seconds(training.seconds)} of it training" if training.seconds and record.total_seconds else ""
        facts.append(Fact(label="Time", value=format_seconds(total), note=note))
    return facts + speed_facts(record)


def speed_facts(record: RunRecord) -> list[Fact]:
    """The two speeds of a run under their names, and when its first step was done."""
    whole, warm, first = (
        record.training.tokens_per_second,
        record.times.tokens_per_second,
        record.times.first_step_seconds,
    )
    facts = []
    if first:
        note = "after the start: reading, loading and measuring included"
        facts.append(Fact(label="First step", value=format_seconds(first), note=note))
    if warm:
        facts.append(Fact(label="Speed once warm", value=f"{format_count(warm)} tokens/s", note="the median step"))
    if whole:
        note = "compiling, capturing and warming up included"
        facts.append(Fact(label="Speed of all steps", value=f"{format_count(whole)} tokens/s", note=note))
    return facts


def memory_facts(record: RunRecord) -> list[Fact]:
    """Measured peaks with the predicted ones beside them; a place that was not used is left out."""
    memory = record.memory
    pairs = (
        ("Peak device memory", memory.device_peak_bytes, memory.device_peak_predicted_bytes),
        ("Peak host memory", memory.host_peak_bytes, memory.host_peak_predicted_bytes),
    )
    facts = []
    for label, peak, predicted in pairs:
        if peak:
            facts.append(Fact(label=label, value=format_bytes(peak), note=_against(peak, predicted)))
        elif predicted:
            facts.append(Fact(label=label, value="not measured", note=f"predicted {format_bytes(predicted)}"))
    return facts


def _against(peak: int, predicted: int) -> str:
    if not predicted:
        return "not predicted"
    off = 100 * (peak / predicted - 1)
    side = "higher" if off > 0 else "lower"
    return f"predicted {format_bytes(predicted)}; measured {format_percent(off, signed=False)} {side}"


def run_facts(record: RunRecord) -> list[Fact]:
    """Data, training and memory, in the order in which they are read."""
    return data_facts(record) + training_facts(record) + memory_facts(record)


def adapter_facts(record: RunRecord) -> list[Fact]:
    """How much of the model was trained, and where the result is."""
    facts = []
    trainable, all_parameters = record.model.trainable_parameters, record.model.parameters
    if trainable:
        note = f"{100 * trainable / all_parameters:.2f} % of {format_count(all_parameters)}" if all_parameters else ""
        facts.append(Fact(label="Trainable parameters", value=format_count(trainable), note=note))
    return facts + places(record, folder_name(record))


def places(record: RunRecord, folder: str) -> list[Fact]:
    """Where each adapter is, and for which base model; the verdict's own first."""
    root = folder.rstrip("/")
    return [
        Fact(label="Adapter", value=f"{root}/{adapter.folder}", note=purpose(record, adapter))
        for adapter in deployed_first(record)
    ]


def has_adapter(record: RunRecord) -> bool:
    """Whether there was anything to save: a run that ends early keeps the adapter it has come to."""
    return record.training.optimizer_steps > 0
