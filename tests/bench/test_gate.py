from __future__ import annotations

import math

import pytest

from bench.peers.gate import CURVE_SLACK_NATS, Curve, furthest, judge

REFERENCE = Curve(losses=[12.0, 11.0, 10.0], gradient_norms=[1.0, 1.0, 1.0], gradient_error=0.0)
MISSION = Curve(losses=[12.02, 11.04, 10.06], gradient_norms=[1.0, 1.1, 1.0], gradient_error=0.2)


def curve(*losses: float, norms: tuple[float, ...] = (1.0, 1.0, 1.0), error: float | None = 0.1) -> Curve:
    return Curve(losses=losses, gradient_norms=norms, gradient_error=error)


def test_the_reference_and_the_yardstick_pass() -> None:
    assert judge(REFERENCE, REFERENCE, MISSION).passed
    assert judge(MISSION, REFERENCE, MISSION).passed


def test_as_far_off_as_the_missions_stack_is_allowed_and_further_is_not() -> None:
    assert judge(curve(12.0, 11.0, 10.06), REFERENCE, MISSION).passed
    verdict = judge(curve(12.0, 11.0, 10.06 + 2 * CURVE_SLACK_NATS), REFERENCE, MISSION)
    assert "nats from the fp32 reference" in verdict.reason


def test_a_system_that_does_not_learn_is_refused() -> None:
    """The negative control: right at the start, gradients that point nowhere afterwards."""
    assert not judge(curve(12.0, 12.0, 12.0), REFERENCE, MISSION).passed


def test_a_gradient_that_is_zero_is_refused_whatever_the_loss() -> None:
    assert judge(curve(12.0, 11.0, 10.0, norms=(1.0, 0.0, 1.0)), REFERENCE, MISSION).reason == "a gradient is zero"
    assert not judge(curve(12.0, 11.0, 10.0, norms=()), REFERENCE, MISSION).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    assert "not a number" in judge(curve(12.0, bad, 10.0), REFERENCE, MISSION).reason
    assert "not a number" in judge(curve(12.0, 11.0, 10.0, norms=(1.0, bad, 1.0)), REFERENCE, MISSION).reason


def test_a_wrong_first_gradient_is_refused_although_the_loss_is_right() -> None:
    assert "gradient" in judge(curve(12.0, 11.0, 10.0, error=1.0), REFERENCE, MISSION).reason
    assert judge(curve(12.0, 11.0, 10.0, error=None), REFERENCE, MISSION).passed
    assert not judge(curve(12.0, 11.0, 10.0, error=math.nan), REFERENCE, MISSION).passed


def test_without_the_missions_stack_only_the_slack_is_allowed() -> None:
    assert judge(curve(12.0, 11.0, 10.0 + CURVE_SLACK_NATS / 2), REFERENCE, None).passed
    assert not judge(curve(12.0, 11.0, 10.0 + CURVE_SLACK_NATS * 2), REFERENCE, None).passed


def test_a_broken_yardstick_does_not_open_the_gate() -> None:
    broken = Curve(losses=[math.nan] * 3, gradient_norms=[1.0] * 3, gradient_error=math.nan)
    assert not judge(curve(12.0, 11.0, 11.0), REFERENCE, broken).passed


def test_curves_of_different_lengths_are_infinitely_far_apart() -> None:
    assert furthest([1.0], [1.0, 2.0]) == math.inf
    assert furthest([], []) == math.inf
