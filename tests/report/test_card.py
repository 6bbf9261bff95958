from __future__ import annotations

import dataclasses

import yaml

from drawplate.records import EvaluationFacts, RunRecord
from drawplate.report import card as cards
from drawplate.report.comparisons import adapters

CONFIG = {"r": 16, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.0}


def model_card(record: RunRecord, config: dict[str, object]) -> str:
    """Of the run's first adapter."""
    return cards.model_card(record, adapters(record)[0], config)


def header(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    values: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return values


def named(record: RunRecord, name: str) -> RunRecord:
    return dataclasses.replace(record, model=dataclasses.replace(record.model, name=name))


def test_the_header_is_the_hubs(record: RunRecord) -> None:
    assert header(model_card(record, CONFIG)) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:HuggingFaceTB/SmolLM2-135M", "lora", "drawplate"],
    }


def test_the_measured_figures_are_the_records(record: RunRecord) -> None:
    card = model_card(record, CONFIG)
    assert "| Perplexity | 24.48 | 13.76 |" in card
    assert "13,700 tokens" in card
    assert "| Rank r | 16 |" in card
    assert "q\\_proj, v\\_proj" in card
    assert "The base model as released has 19.69 on 31 held-out documents" in card
    assert "changed perplexity by +24.3 % [+22.9, +25.8]" in card
    assert "On general text that is not of the domain, training changed it by +0.8 % [-0.6, +2.2] (the 4-bit" in card


def test_each_of_two_adapters_leads_with_its_own_base_and_names_the_other(deployed_record: RunRecord) -> None:
    own, plain = (cards.model_card(deployed_record, adapter, CONFIG) for adapter in deployed_record.adapters)
    assert own.index("| Perplexity | 24.48 | 13.76 |") < own.index("| Perplexity | 19.69 | 12.97 |")
    assert plain.index("| Perplexity | 19.69 | 12.97 |") < plain.index("| Perplexity | 24.48 | 13.76 |")
    assert "Beside it the run left `adapter_unquantized`, for the base model as released (bf16)." in own
    assert "Beside it the run left `adapter`, for the 4-bit base model (nf4)." in plain
    assert "Better: -34.1 %" in plain.split("## Measured")[0]
    assert "Better: -43.8 %" in own.split("## Measured")[0]
    assert "BitsAndBytesConfig" in own
    assert "BitsAndBytesConfig" not in plain


def test_it_says_how_to_load_the_adapter(record: RunRecord) -> None:
    card = model_card(record, CONFIG)
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "base_model = 'HuggingFaceTB/SmolLM2-135M'\n" in code


def test_a_model_for_text_and_images_is_loaded_as_the_class_that_it_names(record: RunRecord) -> None:
    named_class = "Gemma3ForConditionalGeneration"
    model = dataclasses.replace(record.model, architecture=named_class)
    code = model_card(dataclasses.replace(record, model=model), CONFIG).split("```python\n")[1].split("```")[0]
    assert f"import AutoTokenizer, {named_class}\n" in code
    assert f"base = {named_class}.from_pretrained(base_model" in code
    assert "AutoModel" not in code


def test_a_local_base_models_folder_is_not_published(record: RunRecord) -> None:
    card = model_card(named(record, "/home/someone/secret-project/llama"), CONFIG)
    assert "base_model" not in header(card)
    assert "someone" not in card
    assert "`llama`" in card


def test_no_name_of_a_document_is_published(record: RunRecord) -> None:
    card = model_card(record, CONFIG)
    assert not any(document.document in card for document in record.documents)


def test_without_an_evaluation_no_effect_is_claimed(record: RunRecord) -> None:
    card = model_card(dataclasses.replace(record, evaluation=EvaluationFacts()), CONFIG)
    assert "nothing is known about its effect" in card
    assert "Better" not in card


def test_hostile_text_stays_text(record: RunRecord) -> None:
    evil = "a\n---\nbase_model: x/y <script> ![p](http://t.example/x) `code` | '\"\x1b"
    machine = dataclasses.replace(record.machine, cpu=evil)
    card = model_card(named(dataclasses.replace(record, machine=machine), evil), {"target_modules": [evil], "r": 1})
    assert "base_model" not in header(card)
    assert "<script" not in card.replace("`a\\x0a", "`").split("## Measured")[1].split("## How to load it")[0]
    assert "![p]" not in card.split("## How it was made")[1].split("## How to load it")[0]
    assert "\x1b" not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
