"""The search: of all ways to spend a budget, the fastest that fits by the ledger with a margin.

What varies is in planner/space.py; what the user set does not. For everything else fixed, time and memory are monotone
in the number of layers that keep their activations, so that number is found by halving; the rest is enumerated, the
most promising first, until nothing left can be faster. The enumeration does not depend on the budget, so that more
memory is never predicted to be slower.

Whether a choice fits is estimated (planner/fit.py), and only what would win is asked of the ledger, which is slower:
where it says no, the estimate has learned from it, and the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from drawplate.planner.budget import Budget, Need
from drawplate.planner.bytes.ledger import Ledger
from drawplate.planner.fit import Fit
from drawplate.planner.seconds.cost import Cost, Walk, carried_layers, step_cost, step_seconds
from drawplate.planner.seconds.unit_cost import Units, sending, units_of
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.planner.space import (
    FEWEST_KEPT,
    FEWEST_LAYERS,
    MicroBatch,
    Space,
    choices,
    may_keep_in_host_memory,
)
from drawplate.records import DeviceSpeed


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


class Won(NamedTuple):
    """The fastest that is estimated to fit: seconds per token, and how many layers keep their activations."""

    seconds: float
    candidate: _Candidate
    kept: int

    @property
    def choice(self) -> Choice:
        """The whole of it."""
        return replace(self.candidate.choice, kept_layers=self.kept)


@dataclass
class Search:
    """All candidates of a space, priced once; asked with any number of budgets."""

    model: ModelShape
    speed: DeviceSpeed
    space: Space
    fit: Fit
    _priced: dict[str, list[_Candidate]] = field(default_factory=dict)
    _won: dict[tuple[str, Budget], Won] = field(default_factory=dict)

    @property
    def around(self) -> Surroundings:
        """What the ledger is given."""
        return self.fit.around

    def unmeasured(self) -> Search:
        """The same search by what is known of layers without measuring any on a device."""
        model = self.model.unmeasured()
        return replace(self, model=model, fit=Fit(model, self.around), _won={})

    def best(
        self, precision: str, budget: Budget, *, limit: float = math.inf, tokens: int | None = None
    ) -> Found | None:
        """The fastest choice of a precision that fits by the ledger, None where none does.

        Args:
            precision: of the frozen weights.
            budget: bytes at most.
            limit: seconds per token that it must stay below.
            tokens: of the micro-batch, if only those are to be looked at.
        """
        return self.settled(budget, lambda: self.promising(precision, budget, limit=limit, tokens=tokens))

    def settled(self, budget: Budget, promising: Callable[[], Won | None]) -> Found | None:
        """What is still promising once the ledger has been asked of it: each answer may mend the estimates."""
        while won := promising():
            known, found = self.fit.knows(won.choice), self.confirmed(won, budget)
            if known and found:
                return found
        return None

    def promising(
        self, precision: str, budget: Budget, *, limit: float = math.inf, tokens: int | None = None
    ) -> Won | None:
        """The same as far as the estimate knows: near enough for a sentence, and much sooner known."""
        won = self._won_with_less(precision, budget) if tokens is None else None
        if won is not None and won.seconds >= limit:
            won = None
        for candidate in self._candidates(precision):
            fastest = won.seconds if won else limit
            if candidate.bound >= fastest:
                break
            if tokens not in (None, candidate.batch.tokens):
                continue
            for kept in self._ends(candidate, budget, fastest):
                seconds = self._seconds_per_token(candidate, kept)
                if seconds < (won.seconds if won else limit):
                    won = Won(seconds, candidate, kept)
        return won

    def confirmed(self, won: Won, budget: Budget) -> Found | None:
        """What the ledger says of it: the choice with its prices, None where it does not fit after all."""
        if budget.excess(self.fit.exact(won.choice)):
            return None
        self._won[won.choice.precision, budget] = won
        return self._found(won)

    def _won_with_less(self, precision: str, budget: Budget) -> Won | None:
        """The fastest of what smaller budgets have found already, which fits here too."""
        smaller = (
            won
            for (of, other), won in self._won.items()
            if of == precision and other.device_bytes <= budget.device_bytes and other.host_bytes <= budget.host_bytes
        )
        return min(smaller, key=lambda won: won.seconds, default=None)

    def nearest(self, budget: Budget) -> Found:
        """The choice that exceeds the budget by least."""
        ends = [
            Won(c.seconds[k], c, k)
            for p in self.space.precisions
            for c in self._candidates(p)
            if not c.choice.host_kept_layers
            for k in {c.fewest, c.most}
        ]
        return self._found(min(ends, key=lambda end: budget.excess(self.fit.estimate(end.choice))))

    def _candidates(self, precision: str) -> list[_Candidate]:
        if precision not in self._priced:
            found = [c for batch in self.space.batches for c in self._of_batch(precision, batch)]
            self._priced[precision] = sorted(found, key=lambda c: (c.bound, c.choice.host_kept_layers))
        return self._priced[precision]

    def _of_batch(self, precision: str, batch: MicroBatch) -> Iterator[_Candidate]:
        units: dict[tuple[bool, str], Units] = {}
        sends: dict[tuple[bool, str], Units] = {}
        for choice, fewest, most in choices(self.model, self.space, precision, batch):
            key = (choice.compiled, choice.dequantize)
            if key not in units:
                units[key] = units_of(self.model, choice, batch.work, self.speed)
            candidate = _Candidate(choice=choice, batch=batch, units=units[key], fewest=fewest, most=most)
            for kept in {fewest, most}:
                self._seconds_per_token(candidate, kept)
            yield candidate
            if may_keep_in_host_memory(self.model, choice) and most > fewest and most >= FEWEST_LAYERS:
                if key not in sends:
                    sends[key] = sending(units[key], self.model, choice, batch.work, self.speed)
                yield from self._with_host_memory(candidate, sends[key])

    def _with_host_memory(self, candidate: _Candidate, units: Units) -> Iterator[_Candidate]:
        """The same with as many layers' activations in host memory as the bus carries for nothing, if any."""
        choice = candidate.choice
        if count := carried_layers(choice, Walk.of(self.model, choice)._replace(kept=FEWEST_KEPT), units):
            all_kept = {candidate.most: candidate.seconds[candidate.most]}
            choice = replace(choice, host_kept_layers=count)
            away = replace(candidate, choice=choice, units=units, fewest=FEWEST_KEPT, seconds=all_kept)
            self._seconds_per_token(away, FEWEST_KEPT)
            yield away

    def _seconds_per_token(self, candidate: _Candidate, kept: int) -> float:
        """What is compared: a step's tokens are the same for every cut, but for sampling."""
        if kept not in candidate.seconds:
            work, choice = candidate.batch.work, replace(candidate.choice, kept_layers=kept)
            seconds = step_seconds(self.model, choice, work, self.speed, candidate.units)
            candidate.seconds[kept] = seconds / work.step_tokens
        return candidate.seconds[kept]

    def _ends(self, candidate: _Candidate, budget: Budget, limit: float) -> tuple[int, ...]:
        """The most layers that may keep their activations within the budget, where so many take less than `limit`.

        Time falls with that number, so the smallest that is fast enough is looked for first, and mostly does not fit.
        """

        def fits(kept: int) -> bool:
            return not budget.excess(self.fit.estimate(candidate.choice, kept))

        def fast(kept: int) -> bool:
            return self._seconds_per_token(candidate, kept) < limit

        fewest, most = candidate.fewest, candidate.most
        if fits(most):  # where all keep theirs nothing is recomputed, which may be the smaller peak
            return (most, fewest) if most > fewest and fits(fewest) else (most,)
        if most == fewest or not fits(fewest):
            return ()
        low = fewest if fast(fewest) else _smallest(fewest + 1, most, fast)
        if not fits(low):
            return ()
        return (_smallest(low + 1, most, lambda kept: not fits(kept)) - 1,)

    def _found(self, won: Won) -> Found:
        batch = won.candidate.batch
        cost = step_cost(self.model, won.choice, batch.work, self.speed, won.candidate.units)
        return Found(choice=won.choice, batch=batch, cost=cost, ledger=self.fit.ledger(won.choice))


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from `low` on that holds, `high` being known to; what holds for one holds for all above."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
