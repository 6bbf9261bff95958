from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from drawplate.errors import UsageError
from drawplate.recipe import Recipe, cache_folder, elsewhere, expand, known_keys, load_recipe

SMALLEST = {"model": {"name_or_path": "m"}, "data": {"files": ["a.txt"]}}


def with_values(**sections):
    return {name: {**SMALLEST.get(name, {}), **values} for name, values in {**SMALLEST, **sections}.items()}


def test_the_smallest_recipe_is_a_model_and_a_file():
    recipe = load_recipe(SMALLEST)
    assert recipe.data.files == ["a.txt"]
    assert recipe.quantization.chosen == "auto"


def test_a_recipe_survives_its_own_yaml(tmp_path):
    recipe = load_recipe(with_values(train={"learning_rate": 2e-4}, memory={"vram": "6GiB"}))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("sections", "hint"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rate"),
        ({"lora": {"alpha": 1}}, "lora.lora_alpha"),
        ({"data": {"lerning_rate": 1}}, "train.learning_rate"),
        ({"quantisation": {}}, "quantization"),
        ({"memroy": {}}, "did you mean memory?"),
        ({"zzzz": {}}, "known sections"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(sections, hint):
    with pytest.raises(UsageError) as error:
        load_recipe(with_values(**sections))
    assert "unknown key" in error.value.what
    assert hint in error.value.what
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"data": {"dataset": "d"}}, "either data.files or data.dataset"),
        ({"data": {"files": []}}, "either data.files or data.dataset"),
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "exclude each other"),
        ({"quantization": {"load_in_4bit": True, "precision": "bf16"}}, "disagree"),
        ({"train": {"fp16": True, "bf16": True}}, "exclude each other"),
        (
            {
                "train": {
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 3,
                    "effective_batch_size": 7,
                }
            },
            "effective_batch_size is not",
        ),
        (
            {"train": {"gradient_checkpointing": False}, "memory": {"activations": "recompute"}},
            "gradient_checkpointing is off",
        ),
        (
            {"train": {"gradient_checkpointing": True}, "memory": {"activations": "keep"}},
            "gradient_checkpointing is on",
        ),
        ({"memory": {"vram": "much"}}, "'much' is not a size"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout"),
        ({"model": {"name_or_path": None}}, "model.name_or_path"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_and_named(sections, part):
    with pytest.raises(UsageError) as error:
        load_recipe(with_values(**sections))
    assert part in error.value.what


def test_the_missing_model_is_named():
    with pytest.raises(UsageError, match="model is missing"):
        load_recipe({"data": {"files": ["a"]}})


def test_a_refusal_names_the_keys_and_repeats_neither_sections_nor_values():
    with pytest.raises(UsageError) as error:
        load_recipe(
            {"model": {"name_or_path": None}, "data": {}, "memory": {"vram": "6GiBB"}, "train": {"save_steps": 0}}
        )
    said = error.value.what.removeprefix("the recipe: ").split("; ")
    assert said[:2] == ["model.name_or_path has no value", "give either data.files or data.dataset"]
    assert "train.save_steps: Input should be greater than or equal to 1 or 'auto' (got 0)" in said
    assert error.value.what.count("6GiBB") == 1


def test_one_file_need_not_be_a_list():
    assert load_recipe(with_values(data={"files": "a.txt"})).data.files == ["a.txt"]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
        ({"precision": "bf16"}, "bf16"),
        ({"load_in_4bit": True, "precision": "nf4"}, "nf4"),
    ],
)
def test_precision_may_be_said_in_either_vocabulary(flags, chosen):
    assert load_recipe(with_values(quantization=flags)).quantization.chosen == chosen


def test_yaml_1_1_surprises_are_undone(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: {name_or_path: m}\ndata: {files: [a], packing: no}\ntrain: {learning_rate: 2e-4, adam_epsilon: 1e-08}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.adam_epsilon == 1e-8
    assert recipe.data.packing is False


def test_overrides_win_over_the_file_and_are_typed():
    recipe = load_recipe(SMALLEST, ["train.num_train_epochs=1", "output_dir=runs/x", "memory.vram=6GB"])
    assert (recipe.train.num_train_epochs, recipe.output_dir, recipe.memory.vram) == (1.0, "runs/x", 6 * 10**9)


def test_overrides_leave_the_callers_dict_alone():
    values = {"model": {"name_or_path": "m"}, "data": {"files": ["a"]}}
    load_recipe(values, ["model.name_or_path=other"])
    assert values["model"]["name_or_path"] == "m"


@pytest.mark.parametrize("value", ["^a #b", "^# Chapter", "x # y # z"])
def test_a_value_on_the_command_line_has_no_comment_that_could_be_cut_off(value):
    assert load_recipe(SMALLEST, [f"data.split_pattern={value}"]).data.split_pattern == value


def test_a_quoted_value_on_the_command_line_is_what_its_quotes_hold():
    assert load_recipe(SMALLEST, ["data.split_pattern='^a #b'"]).data.split_pattern == "^a #b"


@pytest.mark.parametrize("override", ["model=model", "train=5"])
def test_a_section_that_is_given_a_value_is_explained_without_words_of_the_code(override):
    with pytest.raises(UsageError) as error:
        load_recipe(SMALLEST, [override])
    section = override.partition("=")[0]
    assert f"{section} is a section with keys of its own, such as {section}." in error.value.what
    assert "Section" not in error.value.what


def test_the_home_of_nobody_is_refused():
    with pytest.raises(UsageError, match="knows no user of that name"):
        expand("~nobody-of-this-name/docs")


@pytest.mark.parametrize("override", ["train.num_train_epochs", "=3", "train.nope=3", "output_dir.x=1"])
def test_an_override_that_cannot_be_meant_is_refused(override):
    with pytest.raises(UsageError):
        load_recipe({**SMALLEST, "output_dir": "runs/x"}, [override])


def test_a_line_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {}\ndata: [\n")
    with pytest.raises(UsageError, match=r"r\.yaml is not YAML: line 3: expected the node content[^\n]*\.\n"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "\tx: 1\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "r.yaml")


def test_every_key_has_a_meaning():
    assert [key for key, meaning in known_keys().items() if not meaning] == []


def test_known_keys_are_exactly_the_models_fields():
    written = yaml.safe_load(load_recipe(SMALLEST).to_yaml())
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in written.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert flat == set(known_keys())


def test_a_recipe_is_frozen():
    recipe: Recipe = load_recipe(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


def test_the_cache_can_be_moved_and_named_in_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    monkeypatch.setenv("SECRET", "s")
    assert cache_folder() == tmp_path
    assert expand("${DRAWPLATE_CACHE}/m") == tmp_path / "m"
    assert expand("${SECRET}/m") == Path("${SECRET}/m")
    monkeypatch.delenv("DRAWPLATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "drawplate"


def test_off_is_a_word_although_yaml_reads_it_as_false(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: m}\ndata: {files: a.txt, near_duplicates: off}\n")
    assert load_recipe(tmp_path / "recipe.yaml").data.near_duplicates == "off"


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: m}\ntrain:\n  seed: 1\ndata: {files: a}\nlora: {r: 2, r: 64}\ntrain: {}\n")
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert error.value.what == f"{path}: lora.r is given twice, in line 5; train is given twice, in lines 2 and 6."
    with pytest.raises(UsageError, match="r is given twice"):
        load_recipe(SMALLEST, ["lora={r: 2, r: 64}"])


def test_anchors_and_merges_are_no_repetition(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {name_or_path: m}\ndata: &d {files: a}\ntrain: {<<: {seed: 3}, seed: 4}\n")
    assert load_recipe(tmp_path / "r.yaml").train.seed == 4


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"files": ""}},
        {"data": {"files": ["a.txt", ""]}},
        {"data": {"heldout_files": [""]}},
        {"data": {"files": [], "dataset": ""}},
        {"evaluation": {"general_files": ""}},
        {"model": {"name_or_path": ""}},
        {"model": {"gguf_file": ""}},
    ],
)
def test_an_empty_path_is_not_the_current_folder(sections):
    with pytest.raises(UsageError, match=r"(files|dataset|name_or_path|gguf_file): it is empty"):
        load_recipe(with_values(**sections))


def test_no_empty_path_is_ever_expanded():
    with pytest.raises(UsageError, match="A path is empty"):
        expand("")
    with pytest.raises(UsageError, match="output_dir: it is empty"):
        load_recipe({**SMALLEST, "output_dir": ""})
    with pytest.raises(UsageError, match="path is empty"):
        load_recipe("")
    with pytest.raises(UsageError, match=r"--set data\.files= has no value"):
        load_recipe(SMALLEST, ["data.files="])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.revision=0123456", "0123456"),
        ("model.revision=1234567", "1234567"),
        ("model.revision=12e4567", "12e4567"),
        ("model.revision=2024-01-01", "2024-01-01"),
        ("data.text_field=no", "no"),
        ("data.packing=no", False),
        ("model.compile=off", False),
        ("train.max_steps=1e1", 10),
        ("train.max_steps=-1", None),
        ("train.seed=1_000", 1000),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.optim=adamw_bnb_8bit", "adamw_8bit"),
        ("train.optim=adamw_torch_fused", "adamw_torch"),
        ("lora.init_lora_weights=true", "default"),
        ("lora.target_modules=q_proj", ["q_proj"]),
        ("lora.target_modules=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("lora.target_modules=[all-linear]", "all-linear"),
        ("lora.target_modules=all-linear", "all-linear"),
        (r"lora.target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("tracking.report_to=none", []),
        ("tracking.report_to=wandb", ["wandb"]),
    ],
)
def test_a_value_is_what_its_key_means(override, value):
    section, key = override.split("=")[0].split(".")
    assert getattr(getattr(load_recipe(SMALLEST, [override]), section), key) == value


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.learning_rate=.inf", "finite"),
        ("train.learning_rate=.nan", "finite"),
        ("train.max_steps=true", "a number is needed"),
        ("train.max_steps=1.5", "train.max_steps"),
        ("lora.target_modules=.*(q_proj", "is none (missing ), unterminated subpattern"),
        ("lora.target_modules=[all-linear, q_proj]", "give it alone"),
        ("memory.vram=6", "write 6GiB if that is meant"),
        ("memory.ram='12'", "write 12GiB if that is meant"),
        ("memory.vram=6000", "write 6000MiB if that is meant"),
        ("memory.vram=-1", "not a size"),
        ("memory.vram=.inf", "not a size"),
        ("memory.vram=6G", "not a size"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_its_reason(override, part):
    with pytest.raises(UsageError) as error:
        load_recipe(SMALLEST, [override])
    assert part in error.value.what
    assert override.split("=")[0] in error.value.what


def test_bytes_of_a_resolved_recipe_are_read_back():
    recipe = load_recipe(SMALLEST, ["memory.vram=6GiB"])
    assert load_recipe(yaml.safe_load(recipe.to_yaml())).memory.vram == 6 * 2**30


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("lora.use_dora", "no DoRA"),
        ("lora.modules_to_save", "remove it"),
        ("lora.rank_pattern", "lora.r"),
        ("train.warmup_steps", "train.warmup_ratio"),
        ("train.eval_strategy", "evaluation.eval_steps"),
        ("train.dataloader_num_workers", "remove it"),
        ("train.max_seq_length", "data.max_length"),
    ],
)
def test_keys_of_other_libraries_lead_where_they_are_meant(key, part):
    with pytest.raises(UsageError) as error:
        load_recipe(SMALLEST, [f"{key}=1"])
    assert part in error.value.what
    assert "did you mean" not in error.value.what


def test_every_lead_names_keys_that_exist():
    for text in [*elsewhere._LEADS.values(), *(text for _, text in elsewhere._GROUPS)]:
        for name in re.findall(r"\b(?:model|data|train|lora|quantization|evaluation|memory|tracking)\.\w+", text):
            assert name in known_keys(), name
    assert not set(elsewhere._LEADS) & {key.rpartition(".")[2] for key in known_keys()}


def test_a_recipe_nested_too_deeply_or_with_odd_keys_is_refused(tmp_path):
    for text in ("a: " + "[" * 5000, "{1: 2}", "? [a]\n: b", "a: !!python/object:os.system {}", "model: &m\n  x: *m\n"):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UsageError):
            load_recipe(tmp_path / "r.yaml")
