"""What a run compared, and on which base model: every pair of measurements with its change and its name.

A run with a quantized base has two pairs of the held-out documents. The one that a reader should see first is the base
model as released, which is what they have, without and with the adapter that is for it; the other is the quantized
base, on which the adapter was trained. Each figure is the record's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from drawplate.evaluation.interval import Change, percent_of
from drawplate.records import AdapterFacts, DocumentChange, Evaluation, RunRecord

BITS = {"nf4": 4, "fp4": 4, "int8": 8, "fp8": 8}
ADAPTER, UNQUANTIZED = "adapter", "adapter_unquantized"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The held-out documents under one base model, without and with an adapter.

    Attributes:
        base: the base model in words; empty where a run knows only one, the model as it is.
        adapter: the folder of the adapter.
        documents: how many both sides measured.
    """

    before: Evaluation
    after: Evaluation
    change: Change
    documents: int
    base: str = ""
    adapter: str = ADAPTER


def measured(result: Evaluation | None) -> Evaluation | None:
    """The evaluation, or None where nothing was counted and so no ratio exists."""
    return result if result is not None and result.tokens > 0 else None


def is_quantized(record: RunRecord) -> bool:
    """Whether training saw other weights than the files hold: quantized by Drawplate, not by whoever released them."""
    return record.model.precision in BITS and not record.model.stored_precision


def released_base(record: RunRecord) -> str:
    """The base model as its files hold it, with its precision; in a run that quantized it."""
    precision = record.evaluation.unquantized_precision or "unquantized"
    return f"the base model as released ({precision})"


def trained_base(record: RunRecord) -> str:
    """The base model on which the adapter was trained; empty where that is simply the base model."""
    precision, stored = record.model.precision, record.model.stored_precision
    if stored:
        return f"the base model as released ({stored})"
    return f"the {BITS[precision]}-bit base model ({precision})" if precision in BITS else ""


def released(record: RunRecord) -> Comparison | None:
    """On the base model as released, with the adapter that is for it; None where it was not measured."""
    facts = record.evaluation
    before, after = measured(facts.unquantized_baseline), measured(facts.unquantized_final)
    change = _change(facts.deployed_change_percent, facts.deployed_ci95_percent)
    if before is None or after is None or change is None:
        return None
    return Comparison(
        before=before,
        after=after,
        change=change,
        documents=facts.deployed_documents,
        base=released_base(record),
        adapter=facts.deployed_adapter or ADAPTER,
    )


def trained(record: RunRecord) -> Comparison | None:
    """On the base model as trained on; None where either side is missing."""
    facts = record.evaluation
    before, after, change = measured(facts.baseline), measured(facts.final), heldout_change(record)
    if before is None or after is None or change is None:
        return None
    return Comparison(
        before=before,
        after=after,
        change=change,
        documents=record.data.heldout_documents,
        base=trained_base(record),
    )


def comparisons(record: RunRecord) -> list[Comparison]:
    """What was measured of the held-out documents; the first is the verdict's."""
    return [found for found in (released(record), trained(record)) if found is not None]


def heldout_change(record: RunRecord) -> Change | None:
    """Change of held-out perplexity on the base as trained on, negative where it fell; None where a side is missing."""
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


def why_not_released(record: RunRecord) -> str:
    """Why a run with a quantized base has no comparison on the base model as released; empty where it has one."""
    if not is_quantized(record) or released(record) is not None:
        return ""
    reasons = record.plan.reasons if record.plan else {}
    said = [reasons.get(key, "") for key in ("measures_deployed", "quantization_tax")]
    why = next((text.removeprefix("not measured: ") for text in said if text.startswith("not measured: ")), "")
    return f"The base model as released was not measured with an adapter{': ' + why if why else ''}."


def adapters(record: RunRecord) -> tuple[AdapterFacts, ...]:
    """What the run left; of a record that does not say, what it must have left."""
    if record.adapters or not record.training.optimizer_steps:
        return record.adapters
    started = record.training.init_lora_weights == "quantization_error"
    own = AdapterFacts(folder=ADAPTER, base_precision=record.model.precision, deployed=not started)
    return (own, AdapterFacts(folder=UNQUANTIZED, base_precision="", deployed=True)) if started else (own,)


def deployed_first(record: RunRecord) -> list[AdapterFacts]:
    """The adapters, that for the base model as released before the other."""
    return sorted(adapters(record), key=lambda adapter: not adapter.deployed)


def purpose(record: RunRecord, adapter: AdapterFacts) -> str:
    """For which base model an adapter is; empty where there is only one that it could be."""
    if len(adapters(record)) > 1:
        return f"for {released_base(record) if adapter.deployed else trained_base(record)}"
    return f"trained on {trained_base(record)}" if is_quantized(record) else ""


def documents_compared(record: RunRecord) -> tuple[str, list[tuple[DocumentChange, Evaluation, Evaluation]]]:
    """Each held-out document before and after, and on which base: the verdict's where all were measured on it."""
    scored = [d for d in record.documents if d.tokens > 0]
    plain = [(d, d.unquantized_nats, d.deployed_nats) for d in scored]
    base, pairs = trained_base(record), [(d, d.baseline_nats, d.final_nats) for d in scored]
    if all(before is not None and after is not None for _, before, after in plain) and released(record):
        base, pairs = released_base(record), plain  # type: ignore[assignment]
    return base, [(d, _of(d, before), _of(d, after)) for d, before, after in pairs]


def _of(document: DocumentChange, nats: float) -> Evaluation:
    return Evaluation(nats=nats, tokens=document.tokens, bytes=0)
