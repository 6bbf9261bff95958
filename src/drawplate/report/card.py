"""The adapter folder's README.md: a model card in the hub's format, from the run's record.

It claims what was measured and no more. The licence is left out: it follows from the base model's and the documents',
which Drawplate does not know. File names and texts of the documents never appear, so that publishing an adapter does
not publish what is in someone's folders; a base model that is a local folder is named by its last part alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from drawplate.records import AdapterFacts, RunRecord
from drawplate.report.comparisons import (
    ADAPTER,
    UNQUANTIZED,
    Comparison,
    adapters,
    comparisons,
    general_change,
    is_quantized,
    measured,
    purpose,
    released,
    released_base,
    tax_change,
    trained,
    trained_base,
)
from drawplate.report.loading import loading_code, packages
from drawplate.report.visible import visible
from drawplate.report.wording import (
    Fact,
    data_facts,
    format_figure,
    memory_facts,
    training_facts,
    verdict,
    verdict_of,
)
from drawplate.units import format_count, plural

CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(record: RunRecord, adapter: AdapterFacts, adapter_config: dict[str, Any]) -> str:
    """README.md as text.

    Args:
        record: the run.
        adapter: which of its adapters the card is for.
        adapter_config: what adapter_config.json holds (r, lora_alpha, target_modules, ...).
    """
    sections = [
        f"# Adapter for {_code(base_model(record))}",
        _opening(record, adapter),
        "## Measured",
        _results(record, adapter),
        "## How it was made",
        _making(record, adapter_config),
        "## How to load it",
        _loading(record, adapter),
        "## Limits",
        _limits(record, adapter),
    ]
    return f"---\n{_header(record)}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def base_model(record: RunRecord) -> str:
    """The base model's hub name, or the last part of its folder's path."""
    name = record.model.name
    return name if _is_hub_name(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1] or "the base model"


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _header(record: RunRecord) -> str:
    header: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    tags = ["lora", "drawplate"]
    if _is_hub_name(record.model.name):
        header = {"base_model": record.model.name, **header}
        tags.insert(0, f"base_model:adapter:{record.model.name}")
    return yaml.safe_dump({**header, "tags": tags}, sort_keys=False)


def _code(text: object) -> str:
    """Text from outside as a code span that it cannot leave."""
    return "`" + visible(text).replace("`", "'") + "`"


def _cell(text: object) -> str:
    """Text from outside with nothing left that Markdown or HTML would take for its own."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", shown)


def _opening(record: RunRecord, adapter: AdapterFacts) -> str:
    own = _own_first(record, adapter)
    ruling = verdict_of(record, own[0]) if own and record.status == "finished" else verdict(record)
    if record.status != "finished":  # its detail is for the person at this machine: reasons and paths
        ruling = replace(ruling, detail="The adapter holds what was learnt until then.")
    scores = f" ({ruling.scores})" if ruling.scores else ""
    others = [each for each in adapters(record) if each != adapter]
    beside = "".join(f" Beside it the run left {_code(each.folder)}, {purpose(record, each)}." for each in others)
    which = f", {purpose(record, adapter)}" if others else ""
    return (
        f"A LoRA adapter{_cell(which)}, trained with Drawplate {_cell(record.drawplate)}. "
        f"**{_cell(ruling.headline)}{_cell(scores)}.** {_cell(ruling.detail)}{beside}"
    )


def _own_first(record: RunRecord, adapter: AdapterFacts) -> list[Comparison]:
    """Of two adapters each is on its own base; one alone was measured wherever it may be used."""
    if len(adapters(record)) == 1:
        return comparisons(record)
    both = (released(record), trained(record))
    return [found for found in (both if adapter.deployed else both[::-1]) if found is not None]


def _results(record: RunRecord, adapter: AdapterFacts) -> str:
    found = _own_first(record, adapter)
    if not found:
        return "Held-out documents were not measured both before and after, so nothing is known about its effect."
    tables = [_table(each) for each in found]
    basis = (
        f"Perplexity is exp(nats / tokens) over {format_count(found[0].after.tokens)} tokens of documents that were "
        'kept out of training. "Before" is the base model without an adapter.'
    )
    return "\n\n".join([*tables, basis + _beside(record)])


def _table(compared: Comparison) -> str:
    before, after = compared.before, compared.after
    rows = [
        "| Held-out documents | before | after |",
        "| --- | ---: | ---: |",
        f"| Perplexity | {format_figure(before.perplexity)} | {format_figure(after.perplexity)} |",
        f"| Loss, nats per token | {format_figure(before.loss, 4)} | {format_figure(after.loss, 4)} |",
    ]
    if before.bytes and after.bytes:
        bits = [format_figure(result.bits_per_byte, 4) for result in (before, after)]
        rows.append(f"| Bits per byte | {bits[0]} | {bits[1]} |")
    change = f"Perplexity changed by {compared.change.in_figures()}"
    on = f" on {compared.base}, with {_code(compared.adapter)}" if compared.base else ""
    return _cell(change) + on + ":\n\n" + "\n".join(rows)


def _beside(record: RunRecord) -> str:
    """What quantization cost before training, and what training cost elsewhere."""
    text = ""
    full = measured(record.evaluation.unquantized_baseline)
    if full is not None and (tax := tax_change(record)):
        documents = plural(record.evaluation.quantization_tax_documents, "held-out document")
        text += (
            f" The base model as released has {format_figure(full.perplexity)} on {documents}: quantizing it to "
            f"{record.model.precision} changed perplexity by {tax.in_figures()}, before training."
        )
    if forgotten := general_change(record):
        on = f" ({trained_base(record)})" if trained_base(record) else ""
        text += f" On general text that is not of the domain, training changed it by {forgotten.in_figures()}{on}."
    return text


def _making(record: RunRecord, adapter_config: dict[str, Any]) -> str:
    facts = [*_adapter_facts(adapter_config), *data_facts(record), *training_facts(record), *memory_facts(record)]
    if record.plan is not None:
        facts.append(Fact(label="Peak learning rate", value=f"{record.plan.learning_rate:g}"))
    facts.append(Fact(label="Seed", value=str(record.seed)))
    machine = record.machine.device_name or record.machine.cpu
    if machine:
        facts.append(Fact(label="Machine", value=machine))
    lines = ["| | | |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {_cell(f.label)} | {_cell(f.value)} | {_cell(f.note)} |" for f in facts])


def _adapter_facts(adapter_config: dict[str, Any]) -> list[Fact]:
    targets = adapter_config.get("target_modules") or ()
    names = targets if isinstance(targets, str) else ", ".join(sorted(map(str, targets)))
    named = (
        ("Rank r", adapter_config.get("r")),
        ("lora_alpha", adapter_config.get("lora_alpha")),
        ("Target modules", names or None),
        ("lora_dropout", adapter_config.get("lora_dropout")),
    )
    return [Fact(label=label, value=str(value)) for label, value in named if value is not None]


def _loading(record: RunRecord, adapter: AdapterFacts) -> str:
    hub = _is_hub_name(record.model.name)
    name = record.model.name if hub else f"PATH_TO/{base_model(record)}"
    code = loading_code(record, adapter, name, hub=hub)
    needed = ", ".join(("transformers", *packages(record, adapter)))
    return f"In this folder, with {needed} installed:\n\n```python\n{code}\n```"


def _limits(record: RunRecord, adapter: AdapterFacts) -> str:
    limits = [
        "- Measured on documents like those it was trained on; on other text it may be no better, or worse, than the "
        "base model.",
        _base_limit(record, adapter),
        "- Lower perplexity means the text is easier to predict. It does not measure truthfulness, safety or use.",
        "- It can repeat what was in the training documents. Publish it only if they may be published.",
        "- The base model's licence and limits apply; the documents' may too.",
    ]
    return "\n".join(limit for limit in limits if limit)


def _base_limit(record: RunRecord, adapter: AdapterFacts) -> str:
    """On which weights it holds."""
    precision, known = record.model.precision, released(record) is not None
    if len(adapters(record)) > 1 and adapter.deployed:
        text = f"- It is for {released_base(record)}, and for merging: it is what training added to the adapter's start"
        return f"{text}, in twice the rank. For {trained_base(record)} take `{ADAPTER}` from the run's folder."
    if len(adapters(record)) > 1:
        return (
            f"- It started from what {precision} loses of the base model's weights, and holds for those weights alone. "
            f"For {released_base(record)}, or to merge it, take `{UNQUANTIZED}` from the run's folder: twice the rank, "
            f"without that start.{'' if known else ' It is a different model: measure it.'}"
        )
    if is_quantized(record) and not known:
        return (
            f"- It was trained on the base model's {precision} weights. Loaded on, or merged into, weights of another "
            "precision it is a different model: measure it again."
        )
    return ""
