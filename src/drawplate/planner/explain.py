"""Why the search chose what it chose, in sentences that name the alternative and what it would have cost."""

from __future__ import annotations

from dataclasses import replace

from drawplate.planner.budget import Budget
from drawplate.planner.search import Found, Search
from drawplate.planner.seconds.cost import step_cost
from drawplate.planner.seconds.unit_cost import QUANTIZED
from drawplate.planner.shape import Choice
from drawplate.recipe import Recipe
from drawplate.units import format_bytes, format_count

SAME = 1.005
"""Times closer than this are called the same."""


def weight_words(choice: Choice, layers: int) -> str:
    """Where the frozen layers live, in the recipe's words where one word is true of all."""
    host = choice.host_layers(layers)
    if host:
        return "host" if host == layers else "partly host"
    if choice.dequantized_layers:
        return "dequantized" if choice.dequantized_layers == layers else "partly dequantized"
    return "device"


def activation_words(choice: Choice, layers: int) -> str:
    """What becomes of activations, in the recipe's words where one word is true of all."""
    if choice.kept_layers == layers:
        return "keep"
    on_host = choice.on_host(layers)
    if choice.kept_layers + on_host == layers:
        return "keep, partly on the host"
    some = f"partly {choice.policy}" if choice.kept_layers + on_host else choice.policy
    return f"{some}, partly on the host" if on_host else some


def explain(recipe: Recipe, search: Search, found: Found, budget: Budget, *, stored: str | None) -> dict[str, str]:
    """A reason for each decision that was the search's."""
    reasons = {}
    if recipe.quantization.chosen == "auto":
        reasons["precision"] = "the checkpoint is already quantized so" if stored else _precision(search, found, budget)
    if recipe.memory.weights == "auto":
        reasons["weights"] = _weights(search, found)
    if recipe.memory.activations == "auto" and recipe.train.gradient_checkpointing == "auto":
        reasons["activations"] = _activations(search, found)
    if len(search.space.batches) > 1:
        reasons["micro_batch"] = _micro_batch(search, found, budget)
    if found.choice.head_rows:
        reasons["head_rows"] = "embedding and head stay in host memory, the head passes through two slots"
    elif found.choice.table_on_host(search.model):
        reasons["embedding"] = "a micro-batch reads only its tokens' rows, over the bus"
    return reasons


def _precision(search: Search, found: Found, budget: Budget) -> str:
    chosen, parts = found.choice.precision, []
    for other in search.space.precisions:
        if other == chosen:
            continue
        won = search.promising(other, budget)
        said = _compared(won.seconds / found.seconds_per_token) if won else "does not fit"
        parts.append(f"{other} {said}")
    lossless = "" if chosen in (*QUANTIZED, "fp8") else "nothing is lost to quantization; "
    return lossless + ", ".join(parts)


def _compared(ratio: float) -> str:
    if 1 / SAME < ratio < SAME:
        return "takes as long"
    return f"would take {100 * abs(ratio - 1):.0f} % {'longer' if ratio > 1 else 'less'}"


def _seconds(search: Search, found: Found, changed: Choice) -> float:
    return step_cost(search.model, changed, found.batch.work, search.speed, None).seconds


def _weights(search: Search, found: Found) -> str:
    choice, layers = found.choice, search.model.layers
    host = choice.host_layers(layers)
    if host:
        resident = replace(choice, device_layers=layers - choice.dequantized_layers)
        slower = _seconds(search, found, choice) / _seconds(search, found, resident)
        price = "hidden behind the compute" if slower < SAME else f"{100 * (slower - 1):.0f} % of the time"
        return f"{host} of {layers} layers are streamed from host memory: {price}, and the memory is better spent"
    if choice.dequantized_layers:
        packed = replace(choice, dequantized_layers=0, device_layers=layers)
        saved = 1 - _seconds(search, found, choice) / _seconds(search, found, packed)
        kept = "kept with their transposes" if choice.precision == "fp8" else "quantized, then kept dequantized"
        return (
            f"{choice.dequantized_layers} of {layers} layers are {kept}: "
            f"no step has to do it again, which saves {100 * saved:.0f} %"
        )
    frozen = sum(line.bytes for line in found.ledger.lines if line.name.startswith("frozen"))
    return f"{format_bytes(frozen)} of frozen layers fit"


def _activations(search: Search, found: Found) -> str:
    choice, layers = found.choice, search.model.layers
    if choice.kept_layers == layers:
        return "all activations fit, so nothing is computed twice"
    on_host, seconds, parts = choice.on_host(layers), _seconds(search, found, choice), []
    if on_host:
        saved = 1 - seconds / _seconds(search, found, replace(choice, host_kept_layers=0))
        parts.append(
            f"{choice.kept_layers} of {layers} layers keep their activations on the device and {on_host} in host memory"
            f", copied beside the compute: {100 * saved:.0f} % less time than computing these again"
        )
    if again := layers - choice.kept_layers - on_host:
        price = seconds / _seconds(search, found, replace(choice, kept_layers=layers)) - 1
        where = "offloaded to the host" if choice.policy == "offload" else "kept"
        parts.append(
            f"{again} of {layers} layers are computed again from their inputs, {where}: "
            f"{100 * price:.0f} % of the time, for activations that do not fit"
        )
    return "; ".join(parts)


def _micro_batch(search: Search, found: Found, budget: Budget) -> str:
    """Compared with the neighbours that were looked at."""
    sizes = [batch.tokens for batch in search.space.batches]
    place = sizes.index(found.batch.tokens)
    said = f"the fastest of {len(sizes)} sizes from {format_count(sizes[0])} to {format_count(sizes[-1])} tokens"
    if place + 1 == len(sizes):
        return said
    won = search.promising(found.choice.precision, budget, tokens=sizes[place + 1])
    compared = _compared(won.seconds / found.seconds_per_token) if won else "would not fit"
    return f"{said}; {format_count(sizes[place + 1])} {compared}"
