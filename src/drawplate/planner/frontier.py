"""What other budgets would buy, and, where nothing fits, what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from drawplate.errors import DoesNotFit
from drawplate.planner.budget import DEVICE_MARGIN, HOST_MARGIN, Budget
from drawplate.planner.explain import activation_words, weight_words
from drawplate.planner.search import Found, Search
from drawplate.recipe import Recipe
from drawplate.records import FrontierPoint
from drawplate.units import GIB, MIB, format_bytes, format_count

if TYPE_CHECKING:
    from drawplate.planner.situation import Situation

POINTS = 12
CARD_GIB = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180)
"""Sizes that cards have, and small ones that a card shares with other work."""
STEP = 64 * MIB


def frontier_of(search: Search, best: Callable[[Budget], Found | None], budget: Budget) -> tuple[FrontierPoint, ...]:
    """Device memory against tokens/s: a dozen points from the smallest that fits to the largest that is of use.

    Args:
        search: priced.
        best: the choice for a budget.
        budget: its host bytes are kept.
    """
    if search.space.fixed.device != "cuda":
        return ()
    smallest = _device_need(search.nearest(replace(budget, device_bytes=0)))
    most = best(replace(budget, device_bytes=1 << 50))
    if most is None:
        return ()
    largest = max(smallest, _device_need(most))
    between = [int(n * GIB) for n in CARD_GIB if smallest < n * GIB < largest]
    every = max(1, -(-len(between) // (POINTS - 2)))
    points: list[FrontierPoint] = []
    for vram in (smallest, *between[::every], largest):
        found = best(replace(budget, device_bytes=vram))
        if found is not None:
            points.append(_point(search, vram, found))
    return tuple(points)


def _device_need(found: Found) -> int:
    """A budget that the choice fits, in steps that people write."""
    return -(-int(found.ledger.peak("device") * (1 + DEVICE_MARGIN) + 1) // STEP) * STEP


def _point(search: Search, vram: int, found: Found) -> FrontierPoint:
    layers = search.model.layers
    return FrontierPoint(
        vram_bytes=vram,
        device_bytes=found.ledger.peak("device"),
        tokens_per_second=found.cost.tokens_per_second,
        precision=found.choice.precision,
        weights=weight_words(found.choice, layers),
        activations=activation_words(found.choice, layers),
        micro_batch_tokens=found.choice.micro_batch_tokens,
    )


def does_not_fit(situation: Situation, search: Search, would_fit: Callable[[Situation], bool]) -> DoesNotFit:
    """The nearest miss, and the one change that would mend it."""
    budget = situation.budget
    near = search.nearest(budget)
    missing = budget.missing(near.need)
    margins = {"device": DEVICE_MARGIN, "host": HOST_MARGIN}
    limits = {"device": budget.device_bytes, "host": budget.host_bytes}
    parts = [
        f"{format_bytes(near.ledger.peak(where))} on the {where}, and with a margin of {margins[where]:.0%} "
        f"{format_bytes(missing[where])} more than the {format_bytes(limits[where])} allowed"
        for where in missing
    ]
    layers, choice = search.model.layers, near.choice
    what = (
        f"{choice.precision}, weights: {weight_words(choice, layers)}, "
        f"activations: {activation_words(choice, layers)}, {format_count(choice.micro_batch_tokens)} tokens at a time"
    )
    where = next(iter(missing))
    lines = [line for line in near.ledger.largest(where).lines if line.where == where]
    line = max(lines, key=lambda line: line.bytes)
    return DoesNotFit(
        f"No plan fits. The nearest ({what}) needs {' and '.join(parts)}. Its largest line is {line.name}, "
        f"{format_bytes(line.bytes)}.",
        safe="Nothing was loaded or written.",
        next_step=next((text for text, s in _changes(situation) if would_fit(s)), None) or _more(near, missing),
    )


def _changes(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """One change of the recipe at a time: what the user set and the search might set better."""
    recipe = situation.recipe
    loosened = {
        "memory": {"weights": "auto", "activations": "auto"},
        "train": {"gradient_checkpointing": "auto", "per_device_train_batch_size": "auto"},
        "quantization": {"precision": "nf4"},
        "evaluation": {"per_device_eval_batch_size": "auto"},
    }
    for section, keys in loosened.items():
        for key, value in keys.items():
            before = getattr(getattr(recipe, section), key)
            stored = situation.stored_precision if key == "precision" else None
            if before == value or stored or (key == "precision" and recipe.quantization.chosen in ("auto", "nf4")):
                continue
            changed = _with(recipe, section, {key: value})
            yield f"Set {section}.{key}: {value} (it is {before}); that fits.", replace(situation, recipe=changed)


def _with(recipe: Recipe, section: str, keys: dict[str, object]) -> Recipe:
    """The recipe with some keys of a section changed; flags that say the same as `precision` are dropped with it."""
    if "precision" in keys:
        keys = {**keys, "load_in_4bit": None, "load_in_8bit": None}
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=keys)})


def _more(near: Found, missing: dict[str, int]) -> str:
    """Where no key mends it: the budget, or shorter windows."""
    where = max(missing, key=lambda place: missing[place])
    if where == "device":
        return f"Allow {format_bytes(_device_need(near))} with memory.vram, or shorten data.max_length."
    need = int(near.ledger.peak("host") * (1 + HOST_MARGIN)) + MIB
    return f"Allow {format_bytes(need)} with memory.ram, use a smaller model, or a machine with more memory."
