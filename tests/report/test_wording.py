from __future__ import annotations

import dataclasses

import pytest

from drawplate.records import Evaluation, EvaluationFacts, RunRecord
from drawplate.report.wording import format_figure, heldout_change, memory_facts, training_facts, verdict


def with_change(record: RunRecord, after: float, interval: tuple[float, float] | None) -> RunRecord:
    assert record.evaluation.baseline is not None
    baseline = record.evaluation.baseline
    final = dataclasses.replace(baseline, nats=baseline.nats + after * baseline.tokens)
    facts = EvaluationFacts(baseline=baseline, final=final, change_ci95_percent=interval)
    return dataclasses.replace(record, evaluation=facts)


def test_a_gain_is_said_with_its_size_its_interval_and_both_figures(record: RunRecord) -> None:
    ruling = verdict(record)
    assert ruling.headline == "Better: -43.8 % [-45.6, -41.9]"
    assert ruling.scores == "held-out perplexity 24.48 -> 13.76"
    assert "95 % interval" in ruling.detail
    assert ruling.tone == "better"


@pytest.mark.parametrize(
    ("after", "interval", "headline"),
    [
        (-0.02, (-4.0, 0.1), "No measurable change: -2.0 % [-4.0, +0.1]"),
        (-0.02, (-4.0, -0.1), "Better: -2.0 % [-4.0, -0.1]"),
        (0.02, (0.1, 4.0), "Worse: +2.0 % [+0.1, +4.0]"),
        (0.3, None, "Unclear: +35.0 %, and too few documents for an interval"),
    ],
)
def test_the_headline_is_the_verdict_in_words(
    record: RunRecord, after: float, interval: tuple[float, float] | None, headline: str
) -> None:
    assert verdict(with_change(record, after, interval)).headline == headline


def test_a_perplexity_that_overflows_is_worse_not_an_error(record: RunRecord) -> None:
    ruling = verdict(with_change(record, 900.0, None))
    assert ruling.tone == "worse"
    assert "infinite" in ruling.scores


def test_without_a_final_evaluation_nothing_is_claimed(record: RunRecord) -> None:
    bare = dataclasses.replace(record, evaluation=EvaluationFacts(baseline=record.evaluation.baseline))
    assert verdict(bare).tone == "unmeasured"
    assert heldout_change(bare) is None


def test_an_evaluation_of_no_tokens_is_no_evaluation(record: RunRecord) -> None:
    nothing = Evaluation(nats=0.0, tokens=0, bytes=0)
    empty = dataclasses.replace(record, evaluation=EvaluationFacts(baseline=nothing, final=nothing))
    assert verdict(empty).tone == "unmeasured"


def test_a_stopped_run_says_how_far_it_came_why_and_what_is_safe(record: RunRecord) -> None:
    training = dataclasses.replace(record.training, optimizer_steps=34, stopped_because="Ctrl-C")
    stopped = dataclasses.replace(record, status="stopped", training=training, evaluation=EvaluationFacts())
    ruling = verdict(stopped)
    assert ruling.headline == "The run was stopped after 34 of 171 optimizer steps"
    assert "Reason: Ctrl-C." in ruling.detail
    assert "runs/climate-demo/adapter" in ruling.detail


def test_a_failure_before_the_first_step_promises_no_adapter(failure: RunRecord) -> None:
    ruling = verdict(failure)
    assert ruling.tone == "failed"
    assert "before the first optimizer step" in ruling.headline
    assert "there is no adapter" in ruling.detail


def test_predicted_memory_stands_beside_measured(gpu_record: RunRecord, record: RunRecord) -> None:
    device, host = memory_facts(gpu_record)
    assert (device.label, device.value) == ("Peak device memory", "3.58 GiB")
    assert device.note == "predicted 3.62 GiB; measured 1.1 % lower"
    assert host.value == "1.31 GiB"
    assert [fact.label for fact in memory_facts(record)] == ["Peak host memory"]


@pytest.mark.parametrize(
    ("value", "text"), [(13.756, "13.76"), (1234.5, "1,234.50"), (3e9, "3.00e+09"), (float("inf"), "infinite")]
)
def test_figures_of_any_size_can_be_read(value: float, text: str) -> None:
    assert format_figure(value) == text


def test_what_memory_forced_and_where_a_run_was_taken_up_again_are_said(record: RunRecord) -> None:
    training = dataclasses.replace(record.training, corrections=("from step 3 on: micro-batches of 1,024 tokens",))
    again = dataclasses.replace(record, training=training, resumed=("after step 40", "after step 90"))
    facts = {fact.label: fact for fact in training_facts(again)}
    assert facts["Out of memory, so"].value == "from step 3 on: micro-batches of 1,024 tokens"
    assert (facts["Taken up again"].value, facts["Taken up again"].note) == ("after step 90", "2 times")
    assert not {"Out of memory, so", "Taken up again"} & {fact.label for fact in training_facts(record)}
