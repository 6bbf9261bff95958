from __future__ import annotations

import dataclasses

import pytest

from drawplate.records import Evaluation, EvaluationFacts, RunRecord
from drawplate.report.comparisons import heldout_change
from drawplate.report.wording import format_figure, memory_facts, score_facts, training_facts, verdict


def with_change(record: RunRecord, after: float, interval: tuple[float, float] | None) -> RunRecord:
    assert record.evaluation.baseline is not None
    baseline = record.evaluation.baseline
    final = dataclasses.replace(baseline, nats=baseline.nats + after * baseline.tokens)
    facts = EvaluationFacts(baseline=baseline, final=final, change_ci95_percent=interval)
    return dataclasses.replace(record, evaluation=facts)


def test_a_gain_is_said_with_its_size_its_interval_and_both_figures(record: RunRecord) -> None:
    ruling = verdict(record)
    assert ruling.headline == "Better: -43.8 % [-45.6, -41.9]"
    assert ruling.scores == "held-out perplexity 24.48 -> 13.76 on the 4-bit base model (nf4)"
    assert "95 % interval" in ruling.detail
    assert ruling.tone == "better"


def test_the_base_model_as_released_comes_first_where_it_was_measured(deployed_record: RunRecord) -> None:
    ruling = verdict(deployed_record)
    assert ruling.headline == "Better: -34.1 % [-35.9, -32.3]"
    assert ruling.scores == "held-out perplexity 19.69 -> 12.97 on the base model as released (bf16)"
    assert "without and with adapter_unquantized on the same 101 documents, 13,700 tokens" in ruling.detail
    facts = {fact.label: f"{fact.value} ({fact.note})" for fact in score_facts(deployed_record)}
    beside = "perplexity 24.48 -> 13.76, -43.8 % [-45.6, -41.9] (nf4, as in training; without and with adapter)"
    assert facts["On the 4-bit base"] == beside
    assert facts["General text"].endswith("(general English prose, on the 4-bit base model (nf4))")
    assert list(facts) == ["Before", "After", "Change", "On the 4-bit base", "General text", "Quantization tax"]


def test_noise_on_the_base_as_released_is_no_gain_whatever_the_4_bit_one_gained(deployed_record: RunRecord) -> None:
    facts = dataclasses.replace(
        deployed_record.evaluation, deployed_change_percent=-0.4, deployed_ci95_percent=(-1.9, 1.2)
    )
    ruling = verdict(dataclasses.replace(deployed_record, evaluation=facts))
    assert (ruling.headline, ruling.tone) == ("No measurable change: -0.4 % [-1.9, +1.2]", "same")


@pytest.mark.parametrize(
    ("precision", "stored", "base"),
    [
        ("bf16", "", ""),
        ("fp8", "", " on the 8-bit base model (fp8)"),
        ("int8", "", " on the 8-bit base model (int8)"),
        ("nf4", "nf4", " on the base model as released (nf4)"),
    ],
)
def test_the_verdict_names_its_baseline(record: RunRecord, precision: str, stored: str, base: str) -> None:
    model = dataclasses.replace(record.model, precision=precision, stored_precision=stored)
    assert verdict(dataclasses.replace(record, model=model)).scores == f"held-out perplexity 24.48 -> 13.76{base}"


def test_why_the_base_as_released_was_not_measured_is_said(record: RunRecord) -> None:
    assert record.plan is not None
    plan = dataclasses.replace(record.plan, reasons={"quantization_tax": "not measured: no room"})
    detail = verdict(dataclasses.replace(record, plan=plan)).detail
    assert detail.endswith("The base model as released was not measured with an adapter: no room.")


def test_the_two_speeds_and_the_first_step_have_names(deployed_record: RunRecord) -> None:
    facts = {fact.label: (fact.value, fact.note) for fact in training_facts(deployed_record)}
    assert facts["First step"] == ("41.3 s", "after the start: reading, loading and measuring included")
    assert facts["Speed once warm"] == ("1,712 tokens/s", "the median step")
    assert facts["Speed of all steps"] == ("1,471 tokens/s", "compiling, capturing and warming up included")


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
