"""The gate in front of every speed figure: does a system train what the fp32 reference trains? No torch here.

Passing means: every loss and gradient is a finite number, no gradient is zero, and over the gate's steps (dropout 0,
the same start, tokens and optimizer) the loss is never further from the reference than the mission's own stack's is,
plus a small slack. On the first step of every case that is timed the loss and the gradient are compared too, with the
case's own dropout. What the gate cannot see: errors that only longer training shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CURVE_SLACK_SHARE = 0.1
CURVE_SLACK_NATS = 0.01
GRADIENT_SLACK_SHARE = 0.25
GRADIENT_SLACK = 0.05


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What some steps gave.

    Attributes:
        losses: nats per token of each step.
        gradient_norms: of the adapter, of each step, unclipped.
        gradient_error: relative error of the first gradient against the reference's, None where it was not compared.
    """

    losses: Sequence[float]
    gradient_norms: Sequence[float]
    gradient_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's decision and what it rests on, in nats per token; `reason` is empty where it passed."""

    reason: str
    difference: float
    allowed: float
    gradient_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether a speed may be shown."""
        return not self.reason


def furthest(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest distance between two loss curves; infinite where one is shorter or not a number.

    >>> furthest([3.0, 2.0], [3.0, 2.5])
    0.5
    """
    if not reference or len(losses) != len(reference) or not all(map(math.isfinite, [*losses, *reference])):
        return math.inf
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def judge(curve: Curve, reference: Curve, yardstick: Curve | None) -> Verdict:
    """Decide on one curve; `yardstick` is the mission's own stack's, None where it could not run (slack alone then)."""
    own = furthest(yardstick.losses, reference.losses) if yardstick else 0.0
    allowed = (own if math.isfinite(own) else 0.0) * (1 + CURVE_SLACK_SHARE) + CURVE_SLACK_NATS
    difference = furthest(curve.losses, reference.losses)
    error, allowed_error = curve.gradient_error, _allowed_error(yardstick)
    reason = ""
    if not all(map(math.isfinite, [*curve.losses, *curve.gradient_norms])):
        reason = "a loss or a gradient is not a number"
    elif not curve.gradient_norms or min(curve.gradient_norms) <= 0:
        reason = "a gradient is zero"
    elif difference > allowed:
        reason = f"the loss is {difference:.4f} nats from the fp32 reference, {allowed:.4f} are allowed"
    elif error is not None and allowed_error is not None and not error <= allowed_error:
        reason = f"the first gradient is {error:.0%} off the fp32 reference's, {allowed_error:.0%} are allowed"
    return Verdict(reason=reason, difference=difference, allowed=allowed, gradient_error=error)


def _allowed_error(yardstick: Curve | None) -> float | None:
    if yardstick is None or yardstick.gradient_error is None or not math.isfinite(yardstick.gradient_error):
        return None
    return yardstick.gradient_error * (1 + GRADIENT_SLACK_SHARE) + GRADIENT_SLACK
