"""A corpus and a model's size -> what the recipe left `auto` about learning: batch, rate, schedule, epochs, adapter.

The values come from a study on a small model and corpora of three kinds (docs/recipes.md, bench/recipe_study.py), the
rate's dependence on the model's width from others' measurements on large ones. Nothing here refuses anything: what the
user set stays, and what will probably not learn is said in a warning with the setting that would.

Left out: what memory and time allow, which is `choose`'s business and changes no sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from drawplate.data.steps import filling
from drawplate.recipe import USUAL_RANK, LoraSection, Recipe
from drawplate.units import format_count, plural

STEP_TOKENS = 2048
LARGEST_STEP_TOKENS = 65_536
MOST_SMALL_STEPS = 2000
FEWEST_USEFUL_STEPS = 50
RATE, RATE_RANK, RATE_WIDTH, RATE_EPOCHS = 1.2e-3, 16, 576, 2.0
RANK_EXPONENT, WIDTH_EXPONENT, EPOCHS_EXPONENT = 0.75, 0.781, 2.0
"""The rate of a rank, width and number of passes, and how it falls with each beyond."""
LONGEST = 2.0
"""Times RATE_EPOCHS up to which more passes lower the rate: what lies beyond was not studied."""
RANKS = ((1024, 64), (2048, 32))
"""Widths up to which a rank is advised; the usual one beyond."""
SHORT, SHORT_SHARE = 32, 0.25
"""Target tokens, and share of the mean sequence's, below both of which a sequence fills no step."""
FAR_OFF_RATE = 8.0
MANY_EPOCHS = 8.0
USUAL: dict[str, tuple[float | str, str]] = {
    "num_train_epochs": (RATE_EPOCHS, "a third pass learns the text by heart; what was held out gets worse again"),
    "lr_scheduler_type": ("cosine", "a rate that falls to zero leaves the least noise at the end"),
    "warmup_ratio": (0.05, "Adam's averages settle in the first steps, at a small rate"),
}
ADAPTER_REASONS = {
    "lora_alpha": "twice the rank: the learning rate was found with it",
    "target_modules": "all-linear: it learns a sixth more than query and value alone",
}


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What the advice rests on: lengths of the training sequences in tokens, how many of those tokens the loss counts,
    and the model's width (hidden size)."""

    lengths: tuple[int, ...]
    target_tokens: tuple[int, ...]
    hidden: int

    def filling(self, min_target_tokens: int) -> int:
        """Sequences that fill a step."""
        return filling(self.target_tokens, min_target_tokens)

    @property
    def least(self) -> int:
        """Target tokens below which a sequence is too short to fill a step."""
        return min(SHORT, int(SHORT_SHARE * sum(self.target_tokens) / len(self.target_tokens)))


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recipe with no `auto` left in what it advises on, and the same values with their types.

    Attributes:
        recipe: complete.
        effective_batch_size: windows in an optimizer step.
        optimizer_steps: of the whole run; a time limit may end it sooner.
        reasons: a line for each value that the user left open.
        warnings: what will probably not learn, and what to set.
    """

    recipe: Recipe
    epochs: float
    effective_batch_size: int
    optimizer_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    reasons: dict[str, str]
    warnings: tuple[str, ...]


def advise(recipe: Recipe, learner: Learner) -> Advice:
    """Fill what the recipe left open. Given a recipe that leaves nothing open, it is returned as it is."""
    lora, reasons = advised_adapter(recipe.lora, learner.hidden)
    asked = recipe.train.num_train_epochs
    epochs = RATE_EPOCHS if asked == "auto" else float(asked)
    usual = {**USUAL, "learning_rate": _rate(learner.hidden, cast(int, lora.r), epochs)}
    open_ones = {name: both for name, both in usual.items() if getattr(recipe.train, name) == "auto"}
    reasons |= {name: reason for name, (_, reason) in open_ones.items()}
    train = recipe.train.model_copy(update={name: value for name, (value, _) in open_ones.items()})
    least = _least(recipe, learner, reasons)
    batch = _batch(recipe, learner, least, epochs, reasons)
    train = train.model_copy(update={"effective_batch_size": batch, "min_target_tokens": least})
    filled = recipe.model_copy(update={"lora": lora, "train": train})
    steps = optimizer_steps(learner.filling(least), batch, epochs, train.max_steps)
    return Advice(
        recipe=filled,
        epochs=epochs,
        effective_batch_size=batch,
        optimizer_steps=steps,
        learning_rate=float(train.learning_rate),
        lr_scheduler_type=str(train.lr_scheduler_type),
        warmup_ratio=float(train.warmup_ratio),
        reasons=reasons,
        warnings=_warnings(filled, learner, epochs, batch, steps),
    )


def optimizer_steps(windows: int, batch: int, epochs: float, max_steps: int | None = None) -> int:
    """Steps in all; the last of an epoch may be smaller."""
    steps = max(1, math.ceil(math.ceil(windows / batch) * epochs))
    return min(steps, max_steps or steps)


def advised_batch(windows: int, epoch_tokens: int, epochs: float) -> tuple[int, str]:
    """Sequences in an optimizer step, and why, for so many sequences and tokens in an epoch.

    Small steps learn most from a given text, down to the size of the study's smallest. A long run takes larger ones,
    which keep the device busy: LoRA bears them less well than full fine-tuning does, but thousands of steps are enough
    (Schulman et al., "LoRA Without Regret", 2025). A corpus too small for either still gets 50 steps where it can.
    """
    tokens = min(max(STEP_TOKENS, epoch_tokens * epochs / MOST_SMALL_STEPS), LARGEST_STEP_TOKENS)
    wanted = max(1, round(tokens * windows / epoch_tokens))
    useful = max(1, int(windows * epochs) // FEWEST_USEFUL_STEPS)
    if useful < wanted:
        return useful, f"as many windows as leave a corpus of {format_count(windows)} some {FEWEST_USEFUL_STEPS} steps"
    if tokens > STEP_TOKENS:
        return wanted, f"some {format_count(tokens)} tokens a step: {format_count(MOST_SMALL_STEPS)} steps are enough"
    return wanted, f"some {format_count(tokens)} tokens a step: smaller ones gain little more and take longer"


def _least(recipe: Recipe, learner: Learner, reasons: dict[str, str]) -> int:
    """Target tokens from which a sequence fills a step: as asked; none where the user counts a step in sequences."""
    train = recipe.train
    if train.min_target_tokens != "auto":
        return train.min_target_tokens
    if train.effective_batch_size != "auto" or train.gradient_accumulation_steps != "auto":
        return 0
    short = sum(tokens < learner.least for tokens in learner.target_tokens)
    if not short:
        return 0
    reasons["min_target_tokens"] = (
        f"{plural(short, 'sequence')} with fewer target tokens would move the adapter as far as a whole document "
        "does if it were a step; each joins a step instead"
    )
    return learner.least


def _batch(recipe: Recipe, learner: Learner, least: int, epochs: float, reasons: dict[str, str]) -> int:
    """Sequences in an optimizer step: as asked in any of three keys, else as advised, in whole micro-batches."""
    train = recipe.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if train.effective_batch_size != "auto":
        return train.effective_batch_size
    if micro != "auto" and accumulation != "auto":
        return micro * accumulation
    batch, reasons["effective_batch_size"] = advised_batch(learner.filling(least), sum(learner.lengths), epochs)
    if accumulation != "auto":
        return accumulation * max(1, round(batch / accumulation))
    return max(batch, 1 if micro == "auto" else micro)


def advised_adapter(section: LoraSection, hidden: int) -> tuple[LoraSection, dict[str, str]]:
    """The section filled for a model of that width, and the reason of each value that was open."""
    rank, why = _rank(hidden)
    reasons = {n: reason for n, reason in {"r": why, **ADAPTER_REASONS}.items() if getattr(section, n) == "auto"}
    return section.model_copy(update={"r": rank} if "r" in reasons else {}).filled(), reasons


def _rank(hidden: int) -> tuple[int, str]:
    """By the model's width.

    Small models learnt most at 64, where an adapter costs them little; the same rank on a model seven times as wide
    trains twenty times as many numbers, whose gradients and moments take gigabytes.
    """
    rank = next((rank for width, rank in RANKS if hidden <= width), USUAL_RANK)
    if rank == USUAL_RANK:
        return rank, f"{rank}: enough for a model so wide, and a higher rank takes memory"
    return rank, f"{rank}: on a small model a high rank learns more, and forgets less at the rate that suits it"


def _rate(hidden: int, rank: int, epochs: float) -> tuple[float | str, str]:
    """Peak learning rate, to two figures.

    From the study at one width: at two passes ranks 16, 32 and 64 learnt most at rates that fall with the rank to the
    power 0.75 (the update is scaled by two whatever the rank, so that a higher one moves further at the same rate); at
    three passes less than half of the rate did as well and forgot less, and more than four are taken for four. Beyond
    the study's width the rate falls with the width to the power 0.781, which others fitted over Llama models of several
    sizes (Thinking Machines Lab, "Supervised Learning Hyperparameters", Tinker documentation, 2025; for Qwen they found
    0.078, nearly flat): an extrapolation, and the careful one of the two.
    """
    wider, higher, longer = hidden / RATE_WIDTH, rank / RATE_RANK, min(epochs / RATE_EPOCHS, LONGEST)
    falls = max(1.0, wider) ** WIDTH_EXPONENT * max(1.0, higher) ** RANK_EXPONENT * max(1.0, longer) ** EPOCHS_EXPONENT
    rate = float(f"{RATE / falls:.1e}")
    grown = ((wider, f"width {format_count(hidden)}"), (higher, f"rank {rank}"), (longer, f"{epochs:g} passes"))
    less = [name for share, name in grown if share > 1]
    base = f"{RATE:g} did best at width {RATE_WIDTH}, rank {RATE_RANK} and two passes"
    return rate, f"{base}; less for {' and '.join(less)}" if less else base


def _warnings(recipe: Recipe, learner: Learner, epochs: float, batch: int, steps: int) -> tuple[str, ...]:
    found = (
        _too_few_steps(recipe, learner, epochs, batch, steps),
        _far_off_rate(recipe, learner, epochs),
        _many(epochs, recipe.evaluation.eval_steps, steps),
    )
    return tuple(warning for warning in found if warning)


def _too_few_steps(recipe: Recipe, learner: Learner, epochs: float, batch: int, steps: int) -> str:
    if steps >= FEWEST_USEFUL_STEPS or batch <= 1 or recipe.train.max_steps:
        return ""
    windows = learner.filling(cast(int, recipe.train.min_target_tokens))
    better, _ = advised_batch(windows, sum(learner.lengths), epochs)
    better_steps = optimizer_steps(windows, better, epochs)
    if better >= batch or better_steps <= steps:
        return ""
    share = batch / windows
    size = f"your whole corpus {share:.0f} times" if share >= 2 else f"{100 * share:.0f} % of your corpus"
    return (
        f"{format_count(batch)} sequences a step is {size} ({format_count(windows)} sequences): {steps} optimizer "
        f"step{'s' if steps > 1 else ''}, which teach next to nothing; with {better} you get "
        f"{format_count(better_steps)}. Set train.effective_batch_size={better} (with per_device_train_batch_size and "
        "gradient_accumulation_steps on auto)."
    )


def _far_off_rate(recipe: Recipe, learner: Learner, epochs: float) -> str:
    usual = float(_rate(learner.hidden, cast(int, recipe.lora.r), epochs)[0])
    asked = float(recipe.train.learning_rate)
    if usual / FAR_OFF_RATE < asked < usual * FAR_OFF_RATE:
        return ""
    effect = "may undo what the model knows" if asked > usual else "learns very slowly"
    return (
        f"A learning rate of {asked:g} {effect}; {usual:g} is usual for LoRA on a model so wide (train.learning_rate)."
    )


def _many(epochs: float, eval_steps: int | None, steps: int) -> str:
    if epochs <= MANY_EPOCHS or (eval_steps or steps) < steps:
        return ""
    asked = f"evaluation.eval_steps is {eval_steps} and there are {steps}: set it lower" if eval_steps else ""
    return (
        f"{epochs:g} epochs make a model learn a small corpus by heart. {asked or 'Set evaluation.eval_steps'}, so "
        "that the best adapter is kept and not the last one, or set fewer epochs (train.num_train_epochs)."
    )
