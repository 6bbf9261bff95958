from __future__ import annotations

import re
from pathlib import Path

import pytest

from drawplate.data.documents import read_documents
from drawplate.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_recipe(path):
    assert load_recipe(path).data.files


def test_the_missions_recipe_has_its_values():
    recipe = load_recipe(EXAMPLES / "llama-3.2-3b-climate.yaml")
    assert recipe.quantization.chosen == "nf4"
    assert recipe.quantization.bnb_4bit_use_double_quant
    assert recipe.quantization.bnb_4bit_compute_dtype == "float16"
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (8, 32, 0.1)
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    train = recipe.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (7, 2048)
    assert (train.num_train_epochs, train.fp16, train.gradient_checkpointing) == (3, True, True)
    assert (recipe.data.pad_to_multiple_of, recipe.data.heldout_fraction, recipe.data.packing) == (16, 0.1, False)
    assert recipe.evaluation.per_device_eval_batch_size == 10
    assert recipe.evaluation.eval_accumulation_steps == 2048


def test_every_value_of_the_missions_recipe_is_commented():
    lines = (EXAMPLES / "llama-3.2-3b-climate.yaml").read_text().splitlines()
    assert [line for line in lines if re.match(r"  \w+: ", line) and "#" not in line] == []


def test_the_demos_pattern_keeps_articles_and_leaves_headings_and_missing_pages_out(tmp_path):
    """The page's shape: a heading, then an article, a figure's caption, or the line that there is no such page."""
    article = "<b>Adaptation</b> is the process of adjusting to the effects of climate change. " * 4
    entries = {
        "adaptation": f'<p class="wpage_first_para">{article}</p><figure><figcaption>A dike</figcaption></figure>',
        "nowhere": '<p><i>The page "<a href="x">Nowhere</a>" does not exist. You can create a draft.</i></p>',
        "AR": "<p><b>AR</b> or <b>ar</b> may refer to:\n</p>",
        "again": f'<p class="wpage_first_para">{article}</p><figure><figcaption>A dike</figcaption></figure>',
        "stub": "<p>A stub.</p>",
    }
    page = "".join(
        f'<div role="ami_entry"><p>search term:  {term} <a href="x">Wikipedia Page</a></p>{body}<p></p></div>'
        for term, body in entries.items()
    )
    (tmp_path / "wg2.html").write_text(f"<html><body>{page}</body></html>")
    section = load_recipe(EXAMPLES / "climate-demo.yaml").data
    corpus = read_documents(section, [str(tmp_path / "wg2.html")])
    [document] = corpus.documents
    assert document.text.startswith("Adaptation is the process")
    assert document.text.endswith("\nA dike")
    [line] = corpus.intake
    assert (line.duplicate_documents, line.short_documents) == (1, 1)
