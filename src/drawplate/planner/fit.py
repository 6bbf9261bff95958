"""What a choice needs: estimated for thousands of them, asked of the ledger for a few.

What activations need does not depend on how many layers lie where, so it is estimated once for each pattern of tiers,
and the bytes that tiers differ by are added. Whatever the ledger has said of a choice corrects the estimates of those
that differ from it only in numbers of layers: by the most that any of them was too low, or the least that all were too
high.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from drawplate.planner.budget import Need
from drawplate.planner.bytes.estimate import estimate
from drawplate.planner.bytes.ledger import Ledger, ledger
from drawplate.planner.shape import Choice, ModelShape, Surroundings

_Pattern = tuple[tuple[int, int], str, str, str, int, str, int, int]
"""Tiers as (dequantized, on the device), precision, policy, where the embedding is, rows of a head's slot,
dequantization, tokens, layers whose activations may be kept in host memory."""
_NOTHING = Need(0, 0)


@dataclass
class Fit:
    """Peaks of choices, remembered."""

    model: ModelShape
    around: Surroundings
    _exact: dict[Choice, Need] = field(default_factory=dict)
    _ledgers: dict[Choice, Ledger] = field(default_factory=dict)
    _corrections: dict[_Pattern, Need] = field(default_factory=dict)
    _estimates: dict[tuple[Any, ...], Need] = field(default_factory=dict)
    _shifts: dict[tuple[str, str, int, int, int], tuple[Need, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._unmeasured = self.model.unmeasured()

    def knows(self, choice: Choice) -> bool:
        """Whether the ledger has been asked."""
        return choice in self._exact

    def exact(self, choice: Choice) -> Need:
        """By the ledger."""
        if choice not in self._exact:
            made = self.ledger(choice)
            self._exact[choice] = need = Need(made.peak("device"), made.peak("host"))
            shift, pattern = self._pattern(choice)
            guess = self._of_pattern(choice, pattern, choice.kept_layers)
            off = Need(need.device - guess.device - shift.device, need.host - guess.host - shift.host)
            known = self._corrections.get(pattern, off)
            self._corrections[pattern] = Need(max(known.device, off.device), max(known.host, off.host))
        return self._exact[choice]

    def ledger(self, choice: Choice) -> Ledger:
        """All of it."""
        if choice not in self._ledgers:
            self._ledgers[choice] = ledger(self.model, choice, self.around)
        return self._ledgers[choice]

    def estimate(self, choice: Choice, kept: int | None = None) -> Need:
        """About the same; with `kept` as if so many layers kept their activations."""
        shift, pattern = self._pattern(choice)
        need = self._of_pattern(choice, pattern, choice.kept_layers if kept is None else kept)
        more = self._corrections.get(pattern, _NOTHING)
        return Need(need.device + shift.device + more.device, need.host + shift.host + more.host)

    def _pattern(self, choice: Choice) -> tuple[Need, _Pattern]:
        """Bytes by which a choice's tiers need more than others of the same pattern, and that pattern."""
        layers, dequantized, on_device = self.model.layers, choice.dequantized_layers, choice.device_layers
        key = (choice.precision, choice.embedding, choice.head_rows, dequantized, on_device)
        if key not in self._shifts:
            some, streamed = min(dequantized, 1), min(choice.host_layers(layers), choice.slots)
            alike = (
                layers if dequantized == layers else some,
                0 if dequantized + on_device in (0, layers) and not on_device else layers - some - streamed,
            )
            here, there = (
                Need(*estimate(self._unmeasured, replace(_with(choice, tiers, 0), host_kept_layers=0), self.around))
                for tiers in ((dequantized, on_device), alike)
            )
            self._shifts[key] = Need(here.device - there.device, here.host - there.host), alike
        shift, alike = self._shifts[key]
        return shift, (
            alike,
            choice.precision,
            choice.policy,
            choice.embedding,
            choice.head_rows,
            choice.dequantize,
            choice.micro_batch_tokens,
            choice.host_kept_layers,
        )

    def _of_pattern(self, choice: Choice, pattern: _Pattern, kept: int) -> Need:
        key = (pattern[:-1], kept, min(choice.host_kept_layers, self.model.layers - kept))
        if key not in self._estimates:
            self._estimates[key] = Need(*estimate(self.model, _with(choice, pattern[0], kept), self.around))
        return self._estimates[key]


def _with(choice: Choice, tiers: tuple[int, int], kept: int) -> Choice:
    return replace(choice, dequantized_layers=tiers[0], device_layers=tiers[1], kept_layers=kept)
