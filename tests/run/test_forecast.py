"""A plan from config.json alone: no weights, no GPU, no data; and what is assumed is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from drawplate import cli
from drawplate.data.tokens import load_tokenizer
from drawplate.errors import DataError, UsageError
from drawplate.recipe import USUAL_RANK, Recipe, load_recipe
from drawplate.records import Plan, from_json
from drawplate.run.forecast import forecast
from drawplate.run.planning import model_shape
from drawplate.run.prepare import prepare
from drawplate.units import GIB
from tests.tiny import recipe_values, tiny_recipe


@pytest.fixture
def bare(base: Path, tmp_path: Path) -> Path:
    """A model folder that holds a configuration and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    return folder


def recipe_for(model: Path, files: Path | str, **sections: dict[str, Any]) -> Recipe:
    return load_recipe(
        {"model": {"name_or_path": str(model)}, "data": {"files": [str(files)], "heldout_fraction": 0.3}, **sections}
    )


def test_a_forecast_is_the_plan_that_a_run_makes(base: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(base, corpus, tmp_path / "run", data={"heldout_fraction": 0.3})
    told, made = forecast(recipe), prepare(recipe).plan
    assert told.assumptions == ()
    assert (told.micro_batch_tokens, told.optimizer_steps, told.times) == (
        made.micro_batch_tokens, made.optimizer_steps, made.times
    )  # fmt: skip
    assert made.times is not None
    assert made.times.evaluation_seconds > 0


def test_the_plan_counts_the_adapter_that_the_run_trains(base: Path, corpus: Path) -> None:
    """A rank that the recipe leaves open depends on the model's width."""
    recipe = recipe_for(base, corpus)
    prepared = prepare(recipe)
    assert prepared.recipe.lora.r != USUAL_RANK, "a small model takes another"
    open_, filled = model_shape(prepared.anatomy, recipe), model_shape(prepared.anatomy, prepared.recipe)
    assert open_.trained_parameters == filled.trained_parameters
    assert [kind.trained for kind in open_.kinds] == [kind.trained for kind in filled.kinds]
    lines = (line for phase in prepared.plan.phases for line in phase.lines if line.where == "disk")
    adapter = next(line.bytes for line in lines if line.name == "checkpoints") / 3 / 3  # three, with two moments each
    assert adapter == 4 * filled.trained_parameters


@pytest.mark.parametrize("name", ["not there", "https://example.org/documents.jsonl"])
def test_documents_that_are_not_there_are_an_error_and_no_invented_windows(bare: Path, name: str) -> None:
    with pytest.raises(DataError, match=re.escape(name)):
        forecast(recipe_for(bare, name))


def test_without_a_tokenizer_lengths_come_from_characters(bare: Path, corpus: Path) -> None:
    plan = forecast(recipe_for(bare, corpus))
    assert "holds no tokenizer" in plan.assumptions[0]
    assert "A token is assumed to be 4 characters" in plan.assumptions[0]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_a_tokenizer_without_a_vocabulary_is_none(architecture: str, tmp_path: Path) -> None:
    """transformers builds one of control tokens alone, in which every text is empty."""
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer's vocabulary"):
        load_tokenizer(tmp_path)


def test_a_plan_says_that_there_are_no_weights_and_only_then(base: Path, bare: Path, corpus: Path) -> None:
    said = [" ".join(forecast(recipe_for(folder, corpus)).assumptions) for folder in (bare, base)]
    assert ["has no weights on this machine" in text for text in said] == [True, False]


def test_a_tokenizer_that_cannot_be_read_is_an_error_as_in_a_run(base: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(base, broken := tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        forecast(recipe_for(broken, corpus))


def test_a_conversation_without_a_tokenizer_cannot_be_planned(bare: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day to you"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(20)))
    with pytest.raises(DataError, match="holds no tokenizer"):
        forecast(recipe_for(bare, rows))


def test_a_card_that_is_not_there_is_planned_for_with_its_source(bare: Path, corpus: Path) -> None:
    plan = forecast(recipe_for(bare, corpus), gpu="RTX 4090")
    assert plan.device == "cuda"
    assert plan.compute_dtype == "bfloat16"
    assert "Ada GPU Architecture whitepaper" in plan.assumptions[0]
    assert 0 < plan.predicted_bytes("device") < 24 * GIB
    assert "up to 40 % more" in plan.assumptions[1]
    assert "`--ram SIZE` plans for another" in plan.assumptions[2]
    elsewhere = forecast(recipe_for(bare, corpus, memory={"ram": "2TiB"}), gpu="T4")
    assert elsewhere.compute_dtype == "float16", "it has no bf16"
    assert "The host is assumed to have 2048.00 GiB of memory." in elsewhere.assumptions[2]
    with pytest.raises(UsageError, match="no figures are known"):
        forecast(recipe_for(bare, corpus), gpu="Voodoo 2")


def test_the_command_reads_as_text_and_as_json(base: Path, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values(base, corpus, tmp_path / "run", data={"heldout_fraction": 0.3})))
    options = ["plan", str(path), "--gpu", "RTX 3060", "--vram", "2GiB", "--ram", "64GiB"]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.stderr
    for words in ("tokens/s", "Memory on the device", "Time of an optimizer step", "Decisions and reasons", "Assumed:"):
        assert words in done.stdout, words
    plan = from_json(Plan, json.loads(CliRunner().invoke(cli.app, [*options, "--json"]).stdout))
    assert plan.predicted_bytes("device") <= 2 * GIB
    assert plan.times is not None
    assert plan.times.lines


def test_a_plan_that_does_not_fit_ends_with_5(base: Path, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values(base, corpus, tmp_path / "run", data={"heldout_fraction": 0.3})))
    done = CliRunner().invoke(cli.app, ["plan", str(path), "--gpu", "T4", "--vram", "100MiB"])
    assert done.exit_code == 5, done.stderr
    assert "No plan fits. The nearest" in done.stderr
    assert "memory.vram" in done.stderr
