from __future__ import annotations

import dataclasses

import pytest

from drawplate.records import Evaluation, EvaluationFacts, RunRecord
from drawplate.report.wording import change_percent, format_figure, format_percent, memory_facts, verdict


def with_change(record: RunRecord, after: float, interval: tuple[float, float] | None) -> RunRecord:
    assert record.evaluation.baseline is not None
    baseline = record.evaluation.baseline
    final = dataclasses.replace(baseline, nats=baseline.nats + after * baseline.tokens)
    facts = EvaluationFacts(baseline=baseline, final=final, change_ci95_percent=interval)
    return dataclasses.replace(record, evaluation=facts)


def test_a_gain_is_said_with_its_size_both_figures_and_the_interval(record: RunRecord) -> None:
    ruling = verdict(record)
    assert ruling.headline == "Held-out perplexity fell by 43.8 % (24.48 -> 13.76)"
    assert ruling.interval == "95 % interval -45.6 % to -41.9 %"
    assert ruling.tone == "better"


@pytest.mark.parametrize(
    ("after", "interval", "tone"),
    [
        (-0.02, (-4.0, 0.1), "same"),
        (-0.02, (-4.0, -0.1), "better"),
        (0.02, (0.1, 4.0), "worse"),
        (0.02, (-0.1, 4.0), "same"),
        (0.0, None, "same"),
        (0.3, None, "worse"),
    ],
)
def test_better_or_worse_needs_an_interval_on_one_side_of_zero(
    record: RunRecord, after: float, interval: tuple[float, float] | None, tone: str
) -> None:
    ruling = verdict(with_change(record, after, interval))
    assert ruling.tone == tone
    assert {"same": "No measurable", "better": "fell", "worse": "got worse"}[tone] in ruling.headline


def test_a_perplexity_that_overflows_is_worse_not_an_error(record: RunRecord) -> None:
    ruling = verdict(with_change(record, 900.0, None))
    assert ruling.tone == "worse"
    assert "infinite" in ruling.headline


def test_without_a_final_evaluation_nothing_is_claimed(record: RunRecord) -> None:
    bare = dataclasses.replace(record, evaluation=EvaluationFacts(baseline=record.evaluation.baseline))
    assert verdict(bare).tone == "unmeasured"
    assert change_percent(bare) is None


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


def test_a_percentage_never_reads_minus_zero() -> None:
    assert format_percent(-0.01) == "0.0 %"
    assert format_percent(4.26) == "+4.3 %"
    assert format_percent(-4.26, signed=False) == "4.3 %"
