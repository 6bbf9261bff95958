"""What a choice needs, estimated and asked of the ledger: estimates learn, and few ledgers are made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from drawplate.planner import fit as fit_module
from drawplate.planner.choose import choose
from drawplate.planner.fit import Fit
from drawplate.planner.seconds.gpus import gpu_named
from drawplate.planner.shape import Choice, Surroundings
from drawplate.planner.situation import CorpusShape, Situation
from tests.planner.test_choose import LLAMA_3B, machine_of, recipe_of

CHOICE = Choice(
    precision="nf4",
    double_quant=True,
    compute_dtype="bfloat16",
    device="cuda",
    dequantized_layers=0,
    device_layers=28,
    kept_layers=6,
    policy="recompute",
    micro_batch_tokens=4096,
    compiled=True,
    dequantize="layer",
)


def test_what_the_ledger_says_of_a_choice_is_not_estimated_lower_again() -> None:
    fit = Fit(LLAMA_3B, Surroundings())
    for kept in (6, 12, 3):
        choice = replace(CHOICE, kept_layers=kept)
        exact = fit.exact(choice)
        assert fit.estimate(choice).device >= exact.device
        assert fit.estimate(choice).host >= exact.host


def test_what_is_known_of_one_choice_mends_the_estimates_of_its_like_and_of_no_other() -> None:
    fit, other = Fit(LLAMA_3B, Surroundings()), replace(CHOICE, precision="bf16")
    alike = replace(CHOICE, kept_layers=8)
    before, not_alike = fit.estimate(alike), fit.estimate(other)
    off = fit.exact(CHOICE).device - fit.estimate(CHOICE).device
    assert off == 0, "the first that is known is estimated as it is"
    truth = Fit(LLAMA_3B, Surroundings()).exact(alike).device
    assert abs(fit.estimate(alike).device - truth) < abs(before.device - truth)
    assert fit.estimate(other) == not_alike


def test_a_plan_with_its_frontier_asks_for_few_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = fit_module.ledger
    monkeypatch.setattr(fit_module, "ledger", lambda *args: (made.append(args), real(*args))[1])
    situation = Situation(
        recipe=recipe_of(memory={"vram": "8GiB"}, train={"effective_batch_size": 64}),
        machine=machine_of(),
        model=LLAMA_3B,
        speed=gpu_named("H100").speed("bfloat16"),
        frontier=True,
    )
    plan = choose(situation, CorpusShape(lengths=(512,) * 1000), 512)
    assert len(plan.frontier) >= 6
    assert len(made) <= 3 * len(plan.frontier), "one for each point, and a few that did not fit"
