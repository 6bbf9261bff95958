"""Whether the unquantized model is measured: yes where it costs no memory that the run does not need anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from drawplate.planner.bytes.ledger import ledger
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.planner.tax import DEPLOYED_PHASE, PHASE, plan_quantization_tax, sample_tokens
from drawplate.records import LedgerLine, PhaseLedger, Plan
from drawplate.units import GIB
from tests.report.conftest import make_plan

LLAMA_8B = ModelShape(
    parameters=8_030_000_000,
    layers=32,
    linear_parameters=6_979_000_000,
    outside_parameters=1_051_000_000,
    hidden=4096,
    intermediate=14_336,
    vocab=128_256,
    attention_width=6144,
    trained_parameters=42_000_000,
    max_positions=8192,
)


def plan_of(device: str = "cuda", *, precision: str = "nf4", weights: str = "host", tokens: int = 8192) -> Plan:
    choice = Choice.in_words(
        32,
        weights=weights,
        activations="recompute",
        precision=precision,
        double_quant=True,
        compute_dtype="bfloat16",
        device=device,  # type: ignore[arg-type]
        micro_batch_tokens=tokens,
    )
    made = ledger(LLAMA_8B, choice, Surroundings(base_bytes=GIB, context_bytes=GIB // 2))
    return replace(
        make_plan(),
        device=device,
        precision=precision,
        compute_dtype="bfloat16",
        max_length=2048,
        micro_batch_tokens=tokens,
        ledger=made.lines,
        phases=made.phases,
    )


def test_an_unquantized_model_in_another_dtype_than_it_is_stored_in_needs_its_table_twice() -> None:
    plans = {dtype: replace(plan_of(), compute_dtype=dtype) for dtype in ("bfloat16", "float16")}
    made = {dtype: phase_of(decided(plan), DEPLOYED_PHASE).bytes("host") for dtype, plan in plans.items()}
    assert made["float16"] - made["bfloat16"] == 128_256 * 4096 * 2


def small(plan: Plan) -> Plan:
    """A run that takes 1 GiB of the device."""
    lines = (LedgerLine(name="all", where="device", bytes=GIB, formula=""),)
    return replace(plan, ledger=lines, phases=(PhaseLedger(phase="training", lines=lines),))


def phase_of(plan: Plan, name: str = PHASE) -> PhaseLedger:
    return next(phase for phase in plan.phases if phase.phase == name)


def decided(plan: Plan, **changes: Any) -> Plan:
    settings = {"asked": "auto", "stored_precision": None, "host_room_bytes": 100 * GIB} | changes
    return plan_quantization_tax(plan, LLAMA_8B, **settings)


@pytest.mark.parametrize("weights", ["host", "device"])
def test_a_gpu_streams_it_within_what_training_takes(weights: str) -> None:
    before = plan_of(weights=weights)
    plan = decided(before)
    assert plan.quantization_tax
    assert "streamed from the host" in plan.reasons["quantization_tax"]
    phase = phase_of(plan)
    assert phase.bytes("device") <= before.predicted_bytes("device") == plan.predicted_bytes("device")
    assert plan.predicted_bytes("host") >= phase.bytes("host") > 16e9 + GIB, "16-bit weights and the process"
    ring = next(line for line in phase.lines if line.name == "ring slots")
    assert ring.bytes == pytest.approx(2 * 6_979e6 / 32 * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        (plan_of(), {"asked": False}, "is off"),
        (plan_of(), {"stored_precision": "nf4"}, "checkpoint itself is quantized"),
        (plan_of(), {"host_room_bytes": 12 * GIB}, "of the host"),
        (small(plan_of()), {}, "of the device"),
        (plan_of("cpu"), {}, "of the host"),
    ],
)
def test_it_is_left_out_with_a_reason(plan: Plan, changes: dict[str, Any], words: str) -> None:
    other = decided(plan, **changes)
    assert not other.quantization_tax
    assert words in other.reasons["quantization_tax"]
    assert (other.ledger, other.phases) == (plan.ledger, plan.phases)


def test_who_asks_for_it_gets_it() -> None:
    assert decided(small(plan_of()), asked=True, host_room_bytes=0).quantization_tax
    assert not decided(plan_of(), asked=True, stored_precision="nf4").quantization_tax


def test_an_unquantized_model_has_no_tax() -> None:
    plan = plan_of(precision="bf16")
    assert decided(plan) == plan


def test_where_the_adapters_start_does_not_fit_the_tax_is_measured_alone() -> None:
    plan = plan_of(tokens=2048)
    assert decided(plan, starts_adapter=True).starts_from_error
    lines = {line.name for line in phase_of(decided(plan, starts_adapter=True)).lines}
    assert {"error of one weight", "adapter's start"} <= lines

    def of_size(size: int) -> Plan:
        lines = (LedgerLine(name="all", where="device", bytes=size, formula=""),)
        return replace(plan, ledger=lines, phases=(PhaseLedger(phase="training", lines=lines),))

    chosen = decided(of_size(phase_of(decided(of_size(100 * GIB))).bytes("device")), starts_adapter=True)
    assert chosen.quantization_tax
    assert not chosen.starts_from_error
    assert chosen.reasons["starts_from_error"].startswith("from zero: it would take")
    assert not chosen.measures_deployed, "with an adapter on the device it would be more than that"
    assert chosen.reasons["measures_deployed"].startswith("not measured: it would take")


@pytest.mark.parametrize(("starts", "ranks"), [(False, 1), (True, 2)])
def test_the_adapter_as_deployed_is_in_the_ledger_of_the_last_phase(starts: bool, ranks: int) -> None:
    before = plan_of()
    plan = decided(before, starts_adapter=starts)
    assert plan.measures_deployed
    last = plan.phases[-1]
    adapter = ranks * 4 * LLAMA_8B.trained_parameters
    assert {line.name: line.bytes for line in last.lines if line.where == "device"}["adapter"] == adapter
    assert last.bytes("device") <= before.predicted_bytes("device")
    on_host = phase_of(decided(replace(before, adapter="host"), starts_adapter=starts), DEPLOYED_PHASE)
    assert last.bytes("device") - on_host.bytes("device") == adapter


def test_a_small_model_is_measured_on_all_documents_and_a_large_one_on_a_sample() -> None:
    assert sample_tokens("cpu", 135_000_000) > 12_076, "the demo's held-out tokens"
    assert sample_tokens("cpu", 8_030_000_000) == 4096
    assert sample_tokens("cuda", 70_000_000_000) == 65_536 < sample_tokens("cuda", 3_000_000_000)
