"""The search: of all ways to spend a budget, the fastest that fits by the ledger with a margin.

What varies: precision, how many layers are dequantized, on the device or streamed, how many keep their activations and
what becomes of the others', the micro-batch, and whether embedding and head are streamed. What the user set does not
vary. For everything else fixed, time and memory are monotone in the number of layers that keep their activations, so
that number is found by halving; the rest is enumerated, the most promising first, until nothing left can be faster. The
enumeration does not depend on the budget, so that more memory is never predicted to be slower.

Left out: mixes of dequantized and streamed layers (memory that would pay for one is better spent on not streaming), and
more than two slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from drawplate.plan.cost import Cost, step_cost
from drawplate.plan.ledger import Choice, Ledger, ModelShape, Surroundings, ledger
from drawplate.plan.unit_cost import QUANTIZED, Units, units_of
from drawplate.plan.work import StepWork
from drawplate.records import DeviceSpeed
from drawplate.units import GIB

DEVICE_MARGIN, HOST_MARGIN = 0.03, 0.05
"""Shares of a prediction by which it may be wrong: what the ledger promises."""

HEAD_SLOT_ROWS = 8192
HOST_SHARES = tuple(i / 8 for i in range(1, 9))
DEQUANTIZED_SHARES = (0.25, 0.5, 0.75, 1.0)
LARGEST_WHOLE_LAYER_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One way to cut a step: windows and positions of a micro-batch, and the work that a step is then."""

    sequences: int
    tokens: int
    rows: int
    work: StepWork


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may vary, and what is given.

    Attributes:
        precisions: to choose from.
        batches: ways to cut a step.
        weights: device, dequantized, host or auto, as in the recipe.
        activations: keep, recompute, offload, `again` (either of the last two) or auto.
        compiled: asked for, or auto: where it works.
        fixed: the rest of a choice, in its words.
    """

    precisions: tuple[str, ...]
    batches: tuple[MicroBatch, ...]
    weights: str
    activations: str
    compiled: bool | Literal["auto"]
    fixed: Choice


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes at most."""

    device_bytes: int
    host_bytes: int

    def missing(self, predicted: Ledger) -> dict[str, int]:
        """Bytes by which a prediction, with its margin, exceeds the budget; only places where it does."""
        needs = {
            "device": int(predicted.peak("device") * (1 + DEVICE_MARGIN)) - self.device_bytes,
            "host": int(predicted.peak("host") * (1 + HOST_MARGIN)) - self.host_bytes,
        }
        return {where: missing for where, missing in needs.items() if missing > 0}


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice with its prices."""

    choice: Choice
    batch: MicroBatch
    cost: Cost
    ledger: Ledger

    @property
    def seconds_per_token(self) -> float:
        """What is compared: a step's tokens are the same for every cut, but for sampling."""
        return self.cost.seconds / self.batch.work.step_tokens


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A choice but for the layers that keep their activations, of which at least `fewest` and at most `most` do."""

    choice: Choice
    batch: MicroBatch
    units: Units
    fewest: int
    most: int
    bound: float


@dataclass
class Search:
    """All candidates of a space, priced once; asked with any number of budgets."""

    model: ModelShape
    speed: DeviceSpeed
    space: Space
    around: Surroundings
    _priced: dict[str, list[_Candidate]] = field(default_factory=dict)
    _ledgers: dict[Choice, Ledger] = field(default_factory=dict)

    def best(self, precision: str, budget: Budget) -> Found | None:
        """The fastest choice of a precision that fits; None where none does."""
        best: Found | None = None
        for candidate in self._candidates(precision):
            if best is not None and candidate.bound >= best.seconds_per_token:
                break
            for kept in self._most_kept(candidate, budget):
                found = self._priced_at(candidate, kept)
                if best is None or found.seconds_per_token < best.seconds_per_token:
                    best = found
        return best

    def nearest(self, budget: Budget) -> Found:
        """The choice that exceeds the budget by least."""
        candidates = [c for p in self.space.precisions for c in self._candidates(p)]
        least = min(
            (replace(c.choice, kept_layers=kept) for c in candidates for kept in {c.fewest, c.most}),
            key=lambda choice: sum(budget.missing(self._ledger(choice)).values()),
        )
        candidate = next(c for c in candidates if replace(c.choice, kept_layers=least.kept_layers) == least)
        return self._priced_at(candidate, least.kept_layers)

    def _candidates(self, precision: str) -> list[_Candidate]:
        if precision not in self._priced:
            found = [c for batch in self.space.batches for c in self._of_batch(precision, batch)]
            self._priced[precision] = sorted(found, key=lambda c: c.bound)
        return self._priced[precision]

    def _of_batch(self, precision: str, batch: MicroBatch) -> Iterator[_Candidate]:
        units: dict[tuple[bool, str], Units] = {}
        for choice, fewest, most in choices(self.model, self.space, precision, batch):
            key = (choice.compiled, choice.dequantize)
            if key not in units:
                units[key] = units_of(self.model, choice, batch.work, self.speed)
            ends = [
                step_cost(self.model, replace(choice, kept_layers=k), batch.work, self.speed, units[key]).seconds
                for k in (fewest, most)
            ]
            bound = min(ends) / batch.work.step_tokens
            yield _Candidate(choice=choice, batch=batch, units=units[key], fewest=fewest, most=most, bound=bound)

    def _most_kept(self, candidate: _Candidate, budget: Budget) -> tuple[int, ...]:
        """The fewest and the most layers that may keep their activations within the budget; none where none may."""

        def fits(kept: int) -> bool:
            return not budget.missing(self._ledger(replace(candidate.choice, kept_layers=kept)))

        if fits(candidate.most):  # where all keep theirs nothing is recomputed, which may be the smaller peak
            return (candidate.most, candidate.fewest) if fits(candidate.fewest) else (candidate.most,)
        if not fits(candidate.fewest):
            return ()
        low, high = candidate.fewest, max(candidate.fewest, candidate.most - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return (candidate.fewest, low)

    def _priced_at(self, candidate: _Candidate, kept: int) -> Found:
        choice = replace(candidate.choice, kept_layers=kept)
        cost = step_cost(self.model, choice, candidate.batch.work, self.speed, candidate.units)
        return Found(choice=choice, batch=candidate.batch, cost=cost, ledger=self._ledger(choice))

    def _ledger(self, choice: Choice) -> Ledger:
        if choice not in self._ledgers:
            self._ledgers[choice] = ledger(self.model, choice, self.around)
        return self._ledgers[choice]


def choices(model: ModelShape, space: Space, precision: str, batch: MicroBatch) -> Iterator[tuple[Choice, int, int]]:
    """Every choice of a precision and cut, with the fewest and most layers that may keep their activations.

    Where two take the same time the earlier wins, so the simpler comes first: nothing streamed, inputs on the device.
    """
    fixed = space.fixed
    cuda = fixed.device == "cuda"
    for dequantized, on_device in tiers(model.layers, space.weights, precision, cuda=cuda):
        for policy, fewest, most in policies(model.layers, space.activations, cuda=cuda):
            for head_rows in (0, HEAD_SLOT_ROWS) if cuda else (0,):
                for dequantize in dequantizations(model, fixed, precision):
                    choice = replace(
                        fixed,
                        precision=precision,
                        dequantized_layers=dequantized,
                        device_layers=on_device,
                        policy=policy,
                        head_rows=head_rows,
                        dequantize=dequantize,
                        compiled=is_compiled(space, precision, dequantized == model.layers),
                        micro_batch_tokens=batch.tokens,
                        rows=batch.rows,
                        micro_batches=max(1, round(batch.work.micro_batches)),
                    )
                    yield choice, fewest, most


def tiers(layers: int, weights: str, precision: str, *, cuda: bool) -> list[tuple[int, int]]:
    """(dequantized, on the device) of the layers; the rest are on the host."""
    named = {"device": [(0, layers)], "dequantized": [(layers, 0)], "host": [(0, 0)]}
    if weights != "auto":
        return named[weights]
    found = [(0, layers)]
    if precision in QUANTIZED:
        shares = DEQUANTIZED_SHARES if cuda else (1.0,)
        found += [(n, layers - n) for n in sorted({max(1, round(layers * share)) for share in shares})]
    if cuda:
        found += [(0, layers - n) for n in sorted({max(1, round(layers * share)) for share in HOST_SHARES})]
    return found


Policy = Literal["recompute", "offload"]


def policies(layers: int, activations: str, *, cuda: bool) -> list[tuple[Policy, int, int]]:
    """(policy of the layers that do not keep their activations, fewest and most that do)."""
    if activations == "keep":
        return [("recompute", layers, layers)]
    if activations == "recompute":
        return [("recompute", 0, 0)]
    if activations == "offload":
        return [("offload", 0, 0)]
    most = 0 if activations == "again" else layers
    recompute: list[tuple[Policy, int, int]] = [("recompute", 0, most)]
    return recompute + ([("offload", 0, most)] if cuda else [])


def dequantizations(model: ModelShape, fixed: Choice, precision: str) -> tuple[Literal["layer", "product"], ...]:
    """A whole layer at once on a GPU, where launches cost time, unless a dequantized layer is very large."""
    if fixed.device != "cuda":
        return ("product",)
    layer_bytes = model.linear_parameters // model.layers * (4 if fixed.compute_dtype == "float32" else 2)
    if layer_bytes > LARGEST_WHOLE_LAYER_BYTES:
        return ("product",)
    return ("layer", "product") if precision in QUANTIZED else ("layer",)


def is_compiled(space: Space, precision: str, dequantized: bool) -> bool:
    """As asked; else on a GPU, but for int8 layers, on which the compiler of torch 2.11 fails."""
    if space.compiled != "auto":
        return space.compiled
    return space.fixed.device == "cuda" and (precision != "int8" or dequantized)
