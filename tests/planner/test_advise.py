"""What decides how well a model learns is filled in with a reason, nothing the user set is changed or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.planner.advise import (
    FEWEST_USEFUL_STEPS,
    MOST_SMALL_STEPS,
    SHORT,
    STEP_TOKENS,
    Learner,
    advise,
    advised_batch,
)
from drawplate.recipe import Recipe, load_recipe

ADVISED = {
    "lora": ("r", "lora_alpha", "target_modules"),
    "train": ("num_train_epochs", "effective_batch_size", "learning_rate", "lr_scheduler_type", "warmup_ratio"),
}
lengths_of = st.lists(st.integers(2, 4096), min_size=1, max_size=400).map(tuple)
maybe = lambda strategy: st.one_of(st.just("auto"), strategy)  # noqa: E731
train_sections = st.fixed_dictionaries(
    {
        "num_train_epochs": maybe(st.floats(0.1, 20)),
        "effective_batch_size": maybe(st.integers(1, 500).map(lambda n: 12 * n)),
        "gradient_accumulation_steps": maybe(st.sampled_from([1, 2, 3, 4, 6, 12])),
        "learning_rate": maybe(st.floats(1e-6, 1.0)),
        "lr_scheduler_type": maybe(st.sampled_from(["linear", "constant"])),
        "warmup_ratio": maybe(st.floats(0, 0.9)),
    }
)
lora_sections = st.fixed_dictionaries(
    {
        "r": maybe(st.integers(1, 256)),
        "lora_alpha": maybe(st.floats(1, 512)),
        "target_modules": maybe(st.just(["q_proj", "v_proj"])),
    }
)


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    return load_recipe({"model": {"name_or_path": "m"}, "data": {"files": ["a.txt"]}, **sections})


def learner(lengths: tuple[int, ...], hidden: int = 576) -> Learner:
    return Learner(lengths=lengths, target_tokens=tuple(n - 1 for n in lengths), hidden=hidden)


@given(train_sections, lora_sections, lengths_of, st.integers(16, 16384))
def test_what_is_open_is_filled_with_a_reason_and_what_was_set_stays(train, lora, lengths, hidden):
    recipe = recipe_of(train=train, lora=lora)
    advice = advise(recipe, learner(lengths, hidden))
    for section, names in ADVISED.items():
        for name in names:
            asked, filled = getattr(getattr(recipe, section), name), getattr(getattr(advice.recipe, section), name)
            assert filled != "auto"
            assert (name in advice.reasons) == (asked == "auto")
            if asked != "auto":
                assert filled == asked
    assert advise(advice.recipe, learner(lengths, hidden)).recipe == advice.recipe
    assert load_recipe(advice.recipe.model_dump(mode="json")) == advice.recipe, "recipe.yaml can be run again"


@given(lengths_of, st.floats(0.5, 20))
def test_the_advised_batch_gives_enough_steps_and_not_too_many(lengths, epochs):
    advice = advise(recipe_of(train={"num_train_epochs": epochs}), learner(lengths))
    batch, steps = advice.effective_batch_size, advice.optimizer_steps
    assert batch == 1 or steps >= FEWEST_USEFUL_STEPS
    tokens = batch * sum(lengths) / len(lengths)
    assert batch == 1 or tokens <= 1.5 * max(STEP_TOKENS, sum(lengths) * epochs / MOST_SMALL_STEPS)


def test_a_step_has_about_as_many_tokens_whatever_the_documents_length():
    assert advised_batch(10_000, 1_280_000, 3)[0] == 16
    assert advised_batch(1000, 1_024_000, 3)[0] == 2


def test_a_large_corpus_gets_larger_steps():
    batch, reason = advised_batch(100_000, 100_000_000, 3)
    assert batch == 66, "300 million tokens read, and 65,536 a step at most"
    assert "steps are enough" in reason


@pytest.mark.parametrize(
    ("train", "batch"),
    [
        ({"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2048}, 14_336),
        ({"gradient_accumulation_steps": 5}, 15),
        ({"per_device_train_batch_size": 40}, 40),
        ({"per_device_train_batch_size": 4}, 16),
    ],
)
def test_a_batch_asked_for_in_other_words_is_kept(train, batch):
    advice = advise(recipe_of(train=train), learner((128,) * 1000))
    assert advice.effective_batch_size == batch


def test_wider_models_get_smaller_rates():
    rates = [advise(recipe_of(), learner((100,) * 1000, hidden)).learning_rate for hidden in (576, 2048, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert 5e-5 < rates[-1] < rates[0] < 5e-3


# --- warnings ----------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_corpus_is_warned_of_with_what_to_set():
    asked = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2048, "num_train_epochs": 3}
    advice = advise(recipe_of(train=asked), learner((128,) * 906))
    [warning] = advice.warnings
    assert "14,336 sequences a step is your whole corpus 16 times" in warning
    assert "3 optimizer steps, which teach next to nothing; with 16 you get 171" in warning
    assert "Set train.effective_batch_size=16" in warning
    assert advice.effective_batch_size == 14_336, "nothing is refused or changed"
    mended = advise(recipe_of(train={"effective_batch_size": 16, "num_train_epochs": 3}), learner((128,) * 906))
    assert mended.optimizer_steps == 171
    assert mended.warnings == ()


def test_one_step_is_not_called_steps():
    advice = advise(recipe_of(train={"effective_batch_size": 1000, "num_train_epochs": 1}), learner((100,) * 20))
    assert "1 optimizer step, which" in advice.warnings[0]


@given(effective=st.integers(1, 500), count=st.integers(1, 400), epochs=st.floats(0.5, 5))
def test_the_advice_always_gives_more_steps(effective, count, epochs):
    train = {"effective_batch_size": effective, "num_train_epochs": epochs}
    advice = advise(recipe_of(train=train), learner((64,) * count))
    for warning in advice.warnings:
        better = int(warning.split("train.effective_batch_size=")[1].split()[0])
        again = advise(recipe_of(train={**train, "effective_batch_size": better}), learner((64,) * count))
        assert again.optimizer_steps > advice.optimizer_steps
        assert f"with {better} you get {again.optimizer_steps:,}." in warning


def test_small_models_get_higher_ranks():
    ranks = [advise(recipe_of(), learner((100,) * 1000, hidden)).recipe.lora.r for hidden in (576, 1024, 2048, 4096)]
    assert ranks == [64, 64, 32, 16]
    assert advise(recipe_of(lora={"r": 8}), learner((100,) * 1000)).recipe.lora.r == 8


@pytest.mark.parametrize(
    ("r", "epochs", "learnt_most"),
    [
        (16, 2, (1e-3, 1.4e-3)),
        (32, 2, (5e-4, 1e-3)),
        (64, 2, (3.5e-4, 5e-4)),
        (16, 3, (5e-4, 7e-4)),
        (64, 3, (1.5e-4, 2.5e-4)),
    ],
)
def test_the_rate_lies_where_the_study_found_the_best(r, epochs, learnt_most):
    asked = recipe_of(lora={"r": r}, train={"num_train_epochs": epochs})
    low, high = learnt_most
    assert low <= advise(asked, learner((128,) * 1000)).learning_rate <= high


def test_many_passes_do_not_bring_the_rate_to_nothing():
    few, many = (advise(recipe_of(train={"num_train_epochs": n}), learner((128,) * 1000)) for n in (4, 40))
    assert few.learning_rate == many.learning_rate > 1e-5


@pytest.mark.parametrize(("rate", "word"), [(1e-5, "slowly"), (0.1, "undo")])
def test_a_rate_far_from_the_usual_is_warned_of(rate, word):
    [warning] = advise(recipe_of(train={"learning_rate": rate}), learner((128,) * 1000)).warnings
    assert word in warning
    assert advise(recipe_of(train={"learning_rate": 5e-4}), learner((128,) * 1000)).warnings == ()


def test_many_epochs_are_warned_of():
    [warning] = advise(recipe_of(train={"num_train_epochs": 20}), learner((128,) * 1000)).warnings
    assert "by heart" in warning
    evaluated = recipe_of(train={"num_train_epochs": 20}, evaluation={"eval_steps": 10})
    assert advise(evaluated, learner((128,) * 1000)).warnings == (), "what is advised is done already"
    never = recipe_of(train={"num_train_epochs": 20}, evaluation={"eval_steps": 10**6})
    [warning] = advise(never, learner((128,) * 1000)).warnings
    assert "evaluation.eval_steps is 1000000 and there are" in warning


def test_short_sequences_fill_no_step_of_a_batch_that_is_advised():
    mixed = learner((300,) * 60 + (3,) * 5)
    advice = advise(recipe_of(), mixed)
    assert advice.recipe.train.min_target_tokens == SHORT
    assert "5 sequences" in advice.reasons["min_target_tokens"]
    assert advice.optimizer_steps == advise(recipe_of(), learner((300,) * 60)).optimizer_steps


@pytest.mark.parametrize("train", [{"effective_batch_size": 4}, {"gradient_accumulation_steps": 4}])
def test_whoever_counts_a_step_in_sequences_gets_so_many(train):
    advice = advise(recipe_of(train=train), learner((300,) * 60 + (3,) * 5))
    assert advice.recipe.train.min_target_tokens == 0
    assert "min_target_tokens" not in advice.reasons


def test_a_corpus_of_short_sequences_counts_each_of_them():
    advice = advise(recipe_of(), learner((9,) * 200))
    assert advice.recipe.train.min_target_tokens == 0


def test_a_key_for_it_is_kept():
    advice = advise(recipe_of(train={"effective_batch_size": 2, "min_target_tokens": 10}), learner((20, 20, 5, 20, 20)))
    assert advice.recipe.train.min_target_tokens == 10
    assert advice.optimizer_steps == 4
