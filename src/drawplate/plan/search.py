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

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from drawplate.plan.cost import Cost, step_cost, step_seconds
from drawplate.plan.estimate import estimate
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


class Need(NamedTuple):
    """Peak bytes."""

    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes at most."""

    device_bytes: int
    host_bytes: int

    def missing(self, need: Need) -> dict[str, int]:
        """Bytes by which a prediction, with its margin, exceeds the budget; only places where it does."""
        excess = {
            "device": int(need.device * (1 + DEVICE_MARGIN)) - self.device_bytes,
            "host": int(need.host * (1 + HOST_MARGIN)) - self.host_bytes,
        }
        return {where: count for where, count in excess.items() if count > 0}

    def excess(self, need: Need) -> int:
        """The sum of what is missing; 0 where it fits."""
        return max(0, int(need.device * (1 + DEVICE_MARGIN)) - self.device_bytes) + max(
            0, int(need.host * (1 + HOST_MARGIN)) - self.host_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice with its prices."""

    choice: Choice
    batch: MicroBatch
    cost: Cost
    ledger: Ledger

    @property
    def need(self) -> Need:
        """Its peaks."""
        return Need(self.ledger.peak("device"), self.ledger.peak("host"))

    @property
    def seconds_per_token(self) -> float:
        """What is compared: a step's tokens are the same for every cut, but for sampling."""
        return self.cost.seconds / self.batch.work.step_tokens


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A choice but for the layers that keep their activations, of which at least `fewest` and at most `most` do.

    `seconds` per token, by that number: those of both ends from the start.
    """

    choice: Choice
    batch: MicroBatch
    units: Units
    fewest: int
    most: int
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """No number of layers that keep their activations is faster: time rises or falls with it."""
        return min(self.seconds.values())


_Won = tuple[float, _Candidate, int]
"""Seconds per token, the candidate, and how many of its layers keep their activations."""


class Look(NamedTuple):
    """What counts: below `limit` seconds per token, micro-batches of `tokens`, as the ledger or its estimate has it."""

    limit: float = math.inf
    tokens: int | None = None
    exact: bool = True


@dataclass
class Search:
    """All candidates of a space, priced once; asked with any number of budgets.

    Whether a candidate fits is first estimated: what activations need does not depend on how many layers lie where, so
    it is asked of the ledger once for each pattern of tiers, and the bytes that tiers differ by are added. A candidate
    that would win is then asked of the ledger itself.
    """

    model: ModelShape
    speed: DeviceSpeed
    space: Space
    around: Surroundings
    _priced: dict[str, list[_Candidate]] = field(default_factory=dict)
    _won: dict[tuple[str, Budget], _Won] = field(default_factory=dict)
    _needs: dict[Choice, Need] = field(default_factory=dict)
    _ledgers: dict[Choice, Ledger] = field(default_factory=dict)
    _estimates: dict[tuple[Hashable, ...], Need] = field(default_factory=dict)

    def best(
        self, precision: str, budget: Budget, *, limit: float = math.inf, tokens: int | None = None
    ) -> Found | None:
        """The fastest choice of a precision that fits, None where none does.

        Args:
            precision: of the frozen weights.
            budget: bytes at most.
            limit: seconds per token that it must stay below.
            tokens: of the micro-batch, if only those are to be looked at.
        """
        won = self._won_with_less(precision, budget) if tokens is None else None
        won = self._winner(precision, budget, Look(limit=limit, tokens=tokens), won)
        if won is None or won[0] >= limit:
            return None
        if tokens is None:
            self._won[precision, budget] = won
        return self._found(won[1], won[2])

    def about(self, precision: str, budget: Budget, tokens: int | None = None) -> float | None:
        """Seconds per token of the fastest by the estimate alone: near enough for a sentence, and much sooner known."""
        won = self._winner(precision, budget, Look(tokens=tokens, exact=False), None)
        return won[0] if won else None

    def _winner(self, precision: str, budget: Budget, look: Look, won: _Won | None) -> _Won | None:
        for candidate in self._candidates(precision):
            fastest = min(look.limit, won[0]) if won else look.limit
            if candidate.bound >= fastest:
                break
            if look.tokens not in (None, candidate.batch.tokens):
                continue
            for kept in self._ends(candidate, budget, fastest, exact=look.exact):
                seconds = self._seconds_per_token(candidate, kept)
                if seconds < (won[0] if won else look.limit):
                    won = (seconds, candidate, kept)
        return won

    def _won_with_less(self, precision: str, budget: Budget) -> _Won | None:
        """The fastest of what smaller budgets have found already, which fits here too."""
        smaller = (
            won
            for (of, other), won in self._won.items()
            if of == precision and other.device_bytes <= budget.device_bytes and other.host_bytes <= budget.host_bytes
        )
        return min(smaller, key=lambda won: won[0], default=None)

    def nearest(self, budget: Budget) -> Found:
        """The choice that exceeds the budget by least."""
        ends = [(c, k) for p in self.space.precisions for c in self._candidates(p) for k in {c.fewest, c.most}]
        return self._found(*min(ends, key=lambda end: budget.excess(self._estimate(*end))))

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
            candidate = _Candidate(choice=choice, batch=batch, units=units[key], fewest=fewest, most=most)
            for kept in {fewest, most}:
                self._seconds_per_token(candidate, kept)
            yield candidate

    def _seconds_per_token(self, candidate: _Candidate, kept: int) -> float:
        """What is compared: a step's tokens are the same for every cut, but for sampling."""
        if kept not in candidate.seconds:
            work, choice = candidate.batch.work, _keeping(candidate.choice, kept)
            seconds = step_seconds(self.model, choice, work, self.speed, candidate.units)
            candidate.seconds[kept] = seconds / work.step_tokens
        return candidate.seconds[kept]

    def _ends(self, candidate: _Candidate, budget: Budget, limit: float, *, exact: bool) -> tuple[int, ...]:
        """The most layers that may keep their activations within the budget, where so many take less than `limit`.

        Time falls with that number, so the smallest that is fast enough is looked for first, and mostly does not fit.
        The estimate says how far to look; the ledger itself is asked last, and only below that.
        """

        def may(kept: int) -> bool:
            return not budget.excess(self._estimate(candidate, kept))

        def fits(kept: int) -> bool:
            return self._fits(candidate, kept, budget) if exact else may(kept)

        def fast(kept: int) -> bool:
            return self._seconds_per_token(candidate, kept) < limit

        fewest, most = candidate.fewest, candidate.most
        if may(most) and fits(most):  # where all keep theirs nothing is recomputed, which may be the smaller peak
            return (most, fewest) if most > fewest and fits(fewest) else (most,)
        if most == fewest:
            return ()
        low = fewest if fast(fewest) else _smallest(fewest + 1, most, fast)
        if not may(low):
            return ()
        high = _smallest(low + 1, most, lambda kept: not may(kept)) - 1
        if fits(high):
            return (high,)
        if high == low or not fits(low):
            return ()
        return (_smallest(low + 1, high, lambda kept: not fits(kept)) - 1,)

    def _estimate(self, candidate: _Candidate, kept: int) -> Need:
        """What the ledger would say, from what it says for the same pattern of tiers."""
        choice = candidate.choice
        shift, alike = self._tiers_shift(choice)
        key = (
            alike,
            choice.precision,
            choice.policy,
            choice.head_rows,
            choice.dequantize,
            candidate.batch.tokens,
            kept,
        )
        if key not in self._estimates:
            dequantized, on_device = alike
            like = replace(choice, dequantized_layers=dequantized, device_layers=on_device, kept_layers=kept)
            self._estimates[key] = self._need(like)
        need = self._estimates[key]
        return Need(need.device + shift.device, need.host + shift.host)

    def _tiers_shift(self, choice: Choice) -> tuple[Need, tuple[int, int]]:
        """Bytes by which a choice's tiers need more than others of the same pattern, and those others."""
        layers, dequantized, on_device = self.model.layers, choice.dequantized_layers, choice.device_layers
        some, streamed = min(dequantized, 1), min(choice.host_layers(layers), choice.slots)
        alike = (
            layers if dequantized == layers else some,
            0 if dequantized + on_device in (0, layers) and not on_device else layers - some - streamed,
        )
        key = (choice.precision, choice.head_rows, dequantized, on_device)
        if key not in self._estimates:
            here, there = (
                self._need(replace(choice, dequantized_layers=d, device_layers=v, kept_layers=0))
                for d, v in ((dequantized, on_device), alike)
            )
            self._estimates[key] = Need(here.device - there.device, here.host - there.host)
        return self._estimates[key], alike

    def _fits(self, candidate: _Candidate, kept: int, budget: Budget) -> bool:
        exact = self._ledger(_keeping(candidate.choice, kept))
        return not budget.excess(Need(exact.peak("device"), exact.peak("host")))

    def _ledger(self, choice: Choice) -> Ledger:
        if choice not in self._ledgers:
            self._ledgers[choice] = ledger(self.model, choice, self.around)
        return self._ledgers[choice]

    def _need(self, choice: Choice) -> Need:
        if choice not in self._needs:
            self._needs[choice] = Need(*estimate(self.model, choice, self.around))
        return self._needs[choice]

    def _found(self, candidate: _Candidate, kept: int) -> Found:
        choice = _keeping(candidate.choice, kept)
        cost = step_cost(self.model, choice, candidate.batch.work, self.speed, candidate.units)
        return Found(choice=choice, batch=candidate.batch, cost=cost, ledger=self._ledger(choice))


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from `low` on that holds, `high` being known to; what holds for one holds for all above."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _keeping(choice: Choice, kept: int) -> Choice:
    return replace(choice, kept_layers=kept)


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
                        compiled=space.fixed.device == "cuda" if space.compiled == "auto" else space.compiled,
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
    if precision in (*QUANTIZED, "fp8"):
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
