"""A plan in the terminal and on the page."""

from __future__ import annotations

import dataclasses

from drawplate.records import CostLine, FrontierPoint, Plan, PlanTimes, RunRecord, TimeFacts
from drawplate.report.html import render_report
from drawplate.report.plan_view import compared_rows, headline, plan_section, plan_table
from drawplate.report.sections import plan_rows
from drawplate.units import GIB
from tests.report.test_summary import printed

TIMES = PlanTimes(
    step_seconds=2.0,
    tokens_per_second=8000.0,
    epoch_seconds=114.0,
    training_seconds=342.0,
    evaluation_seconds=9.0,
    lines=(
        CostLine(name="attention", seconds=0.5, formula="a"),
        CostLine(name="matrix products of the layers", seconds=1.5, formula="b"),
    ),
)
FRONTIER = tuple(
    FrontierPoint(
        vram_bytes=n * GIB, device_bytes=n * GIB - 1, tokens_per_second=1000.0 * n, precision="nf4", weights="host",
        activations="offload", micro_batch_tokens=2048,
    )
    for n in (2, 4, 8)
)  # fmt: skip


def full(plan: Plan) -> Plan:
    return dataclasses.replace(
        plan, times=TIMES, frontier=FRONTIER, device_layers=20, host_layers=8, kept_layers=10, policy="offload",
        assumptions=("Lengths are assumed.",),
    )  # fmt: skip


def test_the_first_lines_say_how_how_fast_and_in_how_much(record: RunRecord) -> None:
    assert record.plan is not None
    how, fast = headline(full(record.plan))
    assert "20 layers on the device and 8 layers streamed from the host" in how
    assert "18 of 28 layers computed again from inputs offloaded to the host" in how
    assert "8,000 tokens/s: 5 min 42 s to train (171 steps, 3 epochs)" in fast
    assert "1.29 GiB on the host" in fast
    on_host = dataclasses.replace(full(record.plan), host_kept_layers=12)
    assert (
        "activations of 10 layers kept on the device and of 12 in host memory, 6 of 28 layers" in headline(on_host)[0]
    )
    assert "of 18 in host memory; 2,048" in headline(dataclasses.replace(on_host, host_kept_layers=18))[0]
    assert (
        "all 28 layers in memory; activations kept"
        in headline(dataclasses.replace(full(record.plan), device_layers=28, host_layers=0, kept_layers=28))[0]
    )


def test_the_terminal_shows_bytes_seconds_and_the_frontier(record: RunRecord) -> None:
    assert record.plan is not None
    lines = [" ".join(line.split()) for line in printed(plan_table(full(record.plan)), width=120).splitlines()]
    assert "matrix products of the layers 1.500 s 75 %" in lines
    assert "an optimizer step 2.000 s 100 %" in lines
    assert "4.00 GiB 4,000 nf4 host offload 2,048" in lines
    assert "Assumed: Lengths are assumed." in lines


def test_the_page_sets_predicted_and_measured_side_by_side(record: RunRecord) -> None:
    assert record.plan is not None
    measured = TimeFacts(step_seconds=2.1, tokens_per_second=7600.0, training_seconds=350.0, evaluation_seconds=9.5)
    whole = dataclasses.replace(record, plan=full(record.plan), times=measured)
    assert ("Optimizer step", "2.000 s", "2.100 s") in compared_rows(whole)
    assert ("Tokens per second, once warm", "8,000", "7,600") in compared_rows(whole)
    page = render_report(whole)
    for text in ("Predicted and measured", "7,600", "The budgets as a table", "Lengths are assumed."):
        assert text in page, text
    assert "<script" not in page


def test_a_plan_without_times_has_no_such_section(record: RunRecord) -> None:
    assert plan_section(record) is None


def test_a_reason_stands_at_the_row_that_it_is_about(record: RunRecord) -> None:
    plan = dataclasses.replace(record.plan, reasons={"micro_batch": "the fastest of 3 sizes"})
    rows = {row.name: row.reason for row in plan_rows(plan)}
    assert rows["micro_batch_tokens"] == "the fastest of 3 sizes"
    assert "micro_batch" not in rows
