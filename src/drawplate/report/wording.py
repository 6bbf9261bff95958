"""A run in words and in labelled figures, shared by the page, the terminal and the model card.

Every figure is the record's own, only rounded; where the record does not hold one, the line is left out. What a change
is called, better, worse or neither, is compare.py's business.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Literal

from drawplate.compare import Change, Word, percent_of
from drawplate.records import Evaluation, RunRecord
from drawplate.units import format_bytes, format_count, format_percent, format_seconds

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


def plural(count: int, noun: str) -> str:
    """`1 document`, `1,007 documents`."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def measured(result: Evaluation | None) -> Evaluation | None:
    """The evaluation, or None where nothing was counted and so no ratio exists."""
    return result if result is not None and result.tokens > 0 else None


def heldout_change(record: RunRecord) -> Change | None:
    """Change of held-out perplexity, negative where it fell; None where either side is missing."""
    before, after = measured(record.evaluation.baseline), measured(record.evaluation.final)
    if before is None or after is None:
        return None
    percent = record.evaluation.perplexity_change_percent
    if percent is None:
        percent = perplexity_change_percent(before, after)
    return Change(percent=percent, ci95_percent=record.evaluation.change_ci95_percent)


def tax_change(record: RunRecord) -> Change | None:
    """Change of perplexity by quantizing the base model; None where it was not measured."""
    return _change(record.evaluation.quantization_tax_percent, record.evaluation.quantization_tax_ci95_percent)


def general_change(record: RunRecord) -> Change | None:
    """Change of perplexity on text that is not of the domain; None where it was not measured."""
    return _change(record.evaluation.general_change_percent, record.evaluation.general_ci95_percent)


def _change(percent: float | None, interval: tuple[float, float] | None) -> Change | None:
    return None if percent is None else Change(percent=percent, ci95_percent=interval)


def perplexity_change_percent(before: Evaluation, after: Evaluation) -> float:
    """100 (exp(after.loss - before.loss) - 1): the ratio of perplexities without forming either."""
    return percent_of(after.loss - before.loss)


def verdict(record: RunRecord) -> Verdict:
    """Whether it helped, in compare.py's words; a run that was stopped or failed says so first."""
    if record.status != "finished":
        return _unfinished(record)
    change = heldout_change(record)
    if change is None:
        return Verdict(
            tone="unmeasured",
            headline=f"Finished after {_steps(record)}; whether it helped was not measured",
            detail="There is no held-out evaluation from both before and after the training.",
        )
    words = change.in_words()
    return Verdict(
        tone=change.word, headline=words[0].upper() + words[1:], scores=_scores(record), detail=_rests_on(record)
    )


def _scores(record: RunRecord) -> str:
    before, after = record.evaluation.baseline, record.evaluation.final
    assert before is not None  # heldout_change found both
    assert after is not None
    return f"held-out perplexity {format_figure(before.perplexity)} -> {format_figure(after.perplexity)}"


def _rests_on(record: RunRecord) -> str:
    final = record.evaluation.final
    tokens = f", {plural(final.tokens, 'token')}" if final is not None else ""
    brackets = ", with its 95 % interval" if record.evaluation.change_ci95_percent else ""
    documents = plural(record.data.heldout_documents, "document")
    return (
        f"Change of perplexity{brackets}, measured before and after on the same {documents}{tokens}, none of them "
        "trained on."
    )


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
    change = heldout_change(record)
    sentences = []
    reasons = dict.fromkeys((record.training.stopped_because, record.error)) if record.status == "stopped" else {}
    if reason := "; ".join(text.rstrip(".") for text in reasons if text):
        sentences.append(f"Reason: {reason}.")
    if change is not None:
        words = change.in_words()
        sentences.append(f"{words[0].upper()}{words[1:]} ({_scores(record)}).")
    if has_adapter(record):
        sentences.append(f"Safe: your documents, and the adapter trained so far, in {folder_name(record)}/adapter.")
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
    """Held-out perplexity before, after, and the change."""
    facts = []
    for label, result in (("Before", record.evaluation.baseline), ("After", record.evaluation.final)):
        if measured(result) is not None and result is not None:
            note = f"{format_figure(result.bits_per_byte, 3)} bits per byte" if result.bytes else ""
            facts.append(Fact(label=label, value=f"perplexity {format_figure(result.perplexity)}", note=note))
    change = heldout_change(record)
    if change is not None:
        note = "95 % interval in brackets" if change.ci95_percent else ""
        facts.append(Fact(label="Change", value=change.in_figures(), note=note))
    if forgotten := general_change(record):
        facts.append(Fact(label="General text", value=forgotten.in_words(), note=record.evaluation.general_text))
    if tax := tax_change(record):
        note = f"by quantizing the base model to {record.model.precision}, before training"
        facts.append(Fact(label="Quantization tax", value=tax.in_figures(), note=note))
    return facts


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
    if training.tokens_per_second:
        facts.append(Fact(label="Speed", value=f"{format_count(training.tokens_per_second)} tokens/s", note="training"))
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
    if has_adapter(record):
        facts.append(Fact(label="Adapter", value=f"{folder_name(record)}/adapter"))
    return facts


def has_adapter(record: RunRecord) -> bool:
    """Whether there was anything to save: a run that ends early keeps the adapter it has come to."""
    return record.training.optimizer_steps > 0


def eval_command(record: RunRecord, folder: str) -> list[str]:
    """The next command, as parts that each belong on one line; empty where there is no adapter to measure."""
    if not has_adapter(record):
        return []
    model, adapter = shlex.quote(record.model.name), shlex.quote(f"{folder.rstrip('/')}/adapter")
    return ["drawplate eval", f"--model {model}", f"--adapter {adapter}", "--data YOUR_DOCUMENTS"]
