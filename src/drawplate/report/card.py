"""The adapter folder's README.md: a model card in the hub's format, from the run's record.

It claims what was measured and no more. The licence is left out: it follows from the base model's and the documents',
which Drawplate does not know. File names and texts of the documents never appear, so that publishing an adapter does
not publish what is in someone's folders; a base model that is a local folder is named by its last part alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from drawplate.records import RunRecord
from drawplate.report.visible import visible
from drawplate.report.wording import (
    Fact,
    data_facts,
    format_figure,
    general_change,
    measured,
    memory_facts,
    plural,
    tax_change,
    training_facts,
    verdict,
)
from drawplate.units import format_count

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(record: RunRecord, adapter_config: dict[str, Any]) -> str:
    """README.md as text.

    Args:
        record: the run.
        adapter_config: what adapter_config.json holds (r, lora_alpha, target_modules, ...).
    """
    sections = [
        f"# Adapter for {_code(base_model(record))}",
        _opening(record),
        "## Measured",
        _results(record),
        "## How it was made",
        _making(record, adapter_config),
        "## How to load it",
        _loading(record),
        "## Limits",
        _limits(record),
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


def _opening(record: RunRecord) -> str:
    ruling = verdict(record)
    scores = f" ({ruling.scores})" if ruling.scores else ""
    return (
        f"A LoRA adapter trained with Drawplate {_cell(record.drawplate)}. "
        f"**{_cell(ruling.headline)}{_cell(scores)}.** {_cell(ruling.detail)}"
    )


def _results(record: RunRecord) -> str:
    before, after = measured(record.evaluation.baseline), measured(record.evaluation.final)
    if before is None or after is None:
        return "Held-out documents were not measured both before and after, so nothing is known about its effect."
    rows = [
        "| Held-out documents | before | after |",
        "| --- | ---: | ---: |",
        f"| Perplexity | {format_figure(before.perplexity)} | {format_figure(after.perplexity)} |",
        f"| Loss, nats per token | {format_figure(before.loss, 4)} | {format_figure(after.loss, 4)} |",
    ]
    if before.bytes and after.bytes:
        bits = [format_figure(result.bits_per_byte, 4) for result in (before, after)]
        rows.append(f"| Bits per byte | {bits[0]} | {bits[1]} |")
    precision = _cell(record.model.precision or "its own precision")
    basis = (
        f"Perplexity is exp(nats / tokens) over {format_count(after.tokens)} tokens of documents that were kept out of "
        f'training. "Before" is the base model in {precision}, as trained on.'
    )
    return "\n".join(rows) + "\n\n" + basis + _quantization(record)


def _quantization(record: RunRecord) -> str:
    """What quantization cost before training, and what training cost elsewhere."""
    text = ""
    full = measured(record.evaluation.unquantized_baseline)
    if full is not None and (tax := tax_change(record)):
        documents = plural(record.evaluation.quantization_tax_documents, "held-out document")
        text += (
            f" Without quantization the base model's is {format_figure(full.perplexity)} on {documents}: quantizing it "
            f"changed perplexity by {tax.in_figures()}."
        )
    if forgotten := general_change(record):
        text += f" On general text that is not of the domain, training changed it by {forgotten.in_figures()}."
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


def _loading(record: RunRecord) -> str:
    name = record.model.name if _is_hub_name(record.model.name) else f"PATH_TO/{base_model(record)}"
    arguments = [repr(visible(name))]
    if record.model.revision:
        arguments.append(f"revision={visible(record.model.revision)!r}")
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({arguments[0]})"
    imported, made = "AutoModelForCausalLM, AutoTokenizer", []
    if _belongs_to_four_bits(record):
        imported += ", BitsAndBytesConfig"
        kind = f'bnb_4bit_quant_type="{record.model.precision}", bnb_4bit_use_double_quant={_double_quant(record)}'
        made = [f'four_bits = BitsAndBytesConfig(load_in_4bit=True, {kind}, bnb_4bit_compute_dtype="bfloat16")']
        arguments.append("quantization_config=four_bits")
    return "\n".join(
        [
            "```python",
            "from peft import PeftModel",
            f"from transformers import {imported}",
            "",
            *made,
            f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
            'model = PeftModel.from_pretrained(base, "PATH_TO_THIS_FOLDER")',
            tokenizer,
            "```",
        ]
    )


def _belongs_to_four_bits(record: RunRecord) -> bool:
    """The adapter started from what 4 bits lost, so that it holds for those weights alone."""
    return record.training.init_lora_weights == "quantization_error"


def _double_quant(record: RunRecord) -> bool:
    asked = record.recipe.get("quantization", {}).get("bnb_4bit_use_double_quant", "auto")
    return asked is not False


def _limits(record: RunRecord) -> str:
    precision = record.model.precision
    limits = [
        "- Measured on documents like those it was trained on; on other text it may be no better, or worse, than the "
        "base model.",
        "- Lower perplexity means the text is easier to predict. It does not measure truthfulness, safety or use.",
        "- It can repeat what was in the training documents. Publish it only if they may be published.",
        "- The base model's licence and limits apply; the documents' may too.",
    ]
    if _belongs_to_four_bits(record):
        limits.insert(
            1,
            f"- It started from what {precision} loses of the base model's weights, and holds for those weights alone. "
            "For unquantized ones, or to merge it, take `adapter_unquantized` from the run's folder: twice the rank, "
            "without that start. It is a different model: measure it.",
        )
    elif precision in ("nf4", "fp4", "int8", "fp8"):
        limits.insert(
            1,
            f"- It was trained on the base model's {precision} weights. Loaded on, or merged into, weights of another "
            "precision it is a different model: measure it again.",
        )
    return "\n".join(limits)
