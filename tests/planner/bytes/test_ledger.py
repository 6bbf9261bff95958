"""Every byte a named line: the formulas, and that more of anything never costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from drawplate.layout.footprint import TRIAL, Line, Trace
from drawplate.planner.bytes.batch_rows import Rows
from drawplate.planner.bytes.estimate import estimate
from drawplate.planner.bytes.ledger import PHASES, Ledger, ledger
from drawplate.planner.bytes.replay import Replay
from drawplate.planner.bytes.sketch import kept_bytes_per_token_and_layer, sketched
from drawplate.planner.bytes.stage import Stage
from drawplate.planner.shape import Choice, ModelShape, Surroundings, stored_bits
from drawplate.records import LedgerLine
from drawplate.units import MIB

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # a ledger takes hundredths of a second: no shrinking
AROUND = Surroundings(base_bytes=10**8, context_bytes=10**8, dataset_bytes=10**6)
values_of_choices = st.fixed_dictionaries(
    {
        "precision": st.sampled_from(["nf4", "fp4", "int8", "fp8", "bf16", "fp16", "fp32"]),
        "double_quant": st.booleans(),
        "compute_dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
        "weights": st.sampled_from(["device", "dequantized", "host"]),
        "activations": st.sampled_from(["keep", "recompute", "offload"]),
        "micro_batch_tokens": st.integers(16, 10**6),
        "device": st.sampled_from(["cpu", "cuda"]),
    }
)
KNOWN = {
    "precision": "nf4",
    "double_quant": True,
    "compute_dtype": "bfloat16",
    "weights": "device",
    "activations": "recompute",
    "micro_batch_tokens": 2048,
    "device": "cuda",
}


def shape(layers: int = 28, rank: int = 8) -> ModelShape:
    """Llama 3.2 3B with so many layers, and an adapter of that rank on q_proj and v_proj."""
    a_layer = 3072 * (3072 + 1024 + 1024 + 3072) + 3 * 3072 * 8192
    outside = 128_256 * 3072 + (2 * layers + 1) * 3072
    return ModelShape(
        parameters=layers * a_layer + outside,
        layers=layers,
        linear_parameters=layers * a_layer,
        outside_parameters=outside,
        hidden=3072,
        intermediate=8192,
        vocab=128_256,
        attention_width=5120,
        trained_parameters=layers * rank * (3072 + 3072 + 3072 + 1024),
        max_positions=131_072,
    )


def ledger_of(model: ModelShape, **values: Any) -> Ledger:
    return ledger(model, Choice.in_words(model.layers, **values), AROUND)


def lines_of(model: ModelShape, **values: Any) -> dict[str, LedgerLine]:
    phase = next(p for p in ledger_of(model, **values).phases if p.phase == "training")
    assert len({line.name for line in phase.lines}) == len(phase.lines)
    return {line.name: line for line in phase.lines}


def total(model: ModelShape, **values: Any) -> int:
    """All blocks; without the allocator's gaps, which may be smaller where blocks are larger."""
    lines = ledger_of(model, **values).lines
    return sum(line.bytes for line in lines if "gaps" not in line.name)


@settings(max_examples=10, deadline=None, phases=QUICK)
@given(
    values_of_choices,
    st.integers(1, 10**5),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 256),
    st.integers(1, 64),
)
def test_more_tokens_layers_or_rank_never_cost_less(
    values: dict[str, Any], tokens: int, layers: int, more_layers: int, rank: int, more_rank: int
) -> None:
    base = total(shape(layers, rank), **values)
    longer = {**values, "micro_batch_tokens": values["micro_batch_tokens"] + tokens}
    assert total(shape(layers, rank), **longer) >= base
    assert total(shape(layers + more_layers, rank), **values) >= base
    assert total(shape(layers, rank + more_rank), **values) >= base


@settings(max_examples=15, deadline=None, phases=QUICK)
@given(values_of_choices)
def test_spending_less_memory_is_predicted_to_need_less(values: dict[str, Any]) -> None:
    def device(**changes: Any) -> int:
        where = "device" if values["device"] == "cuda" else "host"
        lines = ledger_of(shape(), **{**values, "launched": True, **changes}).largest(where).lines
        return sum(line.bytes for line in lines if line.where == where and "gaps" not in line.name)

    assert device(activations="recompute") <= device(activations="keep")
    if values["device"] == "cuda":
        assert device(activations="offload") <= device(activations="recompute")
        assert device(weights="host") < device(weights="device")
    assert device(weights="device", precision="nf4") < device(weights="device", precision="int8")
    assert device(weights="device", precision="int8") < device(weights="device", precision="bf16")


@settings(max_examples=15, deadline=None, phases=QUICK)
@given(values_of_choices)
def test_on_a_cpu_every_byte_is_the_hosts(values: dict[str, Any]) -> None:
    lines = ledger_of(shape(), **{**values, "device": "cpu"}).lines
    assert {line.where for line in lines} <= {"host", "disk"}


@settings(max_examples=15, deadline=None, phases=QUICK)
@given(values_of_choices)
def test_the_lines_of_each_place_sum_to_its_peak(values: dict[str, Any]) -> None:
    found = ledger_of(shape(), **values)
    assert tuple(phase.phase for phase in found.phases) == PHASES
    for where in ("device", "host", "disk"):
        assert sum(line.bytes for line in found.lines if line.where == where) == found.peak(where)
    assert all(line.bytes >= 0 and line.formula for phase in found.phases for line in phase.lines)


def test_stored_bits_are_those_of_the_format() -> None:
    assert stored_bits("nf4", True) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert stored_bits("fp4", False) == 4.5
    assert [stored_bits(p, True) for p in ("int8", "bf16", "fp16", "fp32")] == [8, 16, 16, 32]


def test_the_lines_of_a_known_case() -> None:
    lines = lines_of(shape(), **KNOWN)
    exact = 100_663_296 * stored_bits("nf4", True) / 8
    a_layer = lines["frozen weights on the device"].bytes / 28
    assert exact < a_layer < exact + 7 * 4 * 256 + 512, "each tensor is rounded up to 256 bytes, the layer to 512"
    assert lines["embedding and head"].bytes == 2 * 128_256 * 3072
    assert lines["adapter"].bytes == lines["adapter gradients"].bytes == 4 * 2_293_760
    assert lines["optimizer moments"].bytes == 8 * 2_293_760
    assert lines["layer inputs kept"].bytes == 28 * 2048 * 3072 * 2
    assert lines["CUDA context"].bytes == 10**8
    streamed = lines_of(shape(), **{**KNOWN, "weights": "host"})
    assert streamed["frozen weights on the host"].where == "host"
    assert streamed["ring slots"].bytes == 2 * (lines["frozen weights on the device"].bytes // 28)


def test_an_embedding_on_the_host_takes_its_bytes_there_unless_it_is_the_head_too() -> None:
    table = 128_256 * 3072 * 2
    for tied in (False, True):
        model = replace(shape(), tied=tied)
        here, there = (lines_of(model, **KNOWN, embedding=where) for where in ("device", "host"))
        assert here["embedding and head"].bytes == (1 if tied else 2) * table
        assert there["embedding and head"].bytes == table
        assert ("embedding, page-locked" in there) == (not tied)
    assert there == here
    neither = lines_of(replace(shape(), tied=False), **KNOWN, head_rows=8192)
    assert "embedding and head" not in neither
    assert neither["embedding, page-locked"].bytes == neither["head, page-locked"].bytes == table


def test_tiers_and_policies_can_be_mixed() -> None:
    counts = {"dequantized_layers": 4, "device_layers": 10, "kept_layers": 5, "policy": "offload"}
    plain = {name: value for name, value in KNOWN.items() if name not in ("weights", "activations")}
    mixed = ledger(shape(), Choice(**plain, **counts), AROUND)  # type: ignore[arg-type]
    names = {line.name: line.where for phase in mixed.phases for line in phase.lines}
    assert names["frozen weights on the host"] == names["offloaded layer inputs"] == "host"
    assert names["frozen weights, dequantized"] == names["activations kept"] == "device"
    more = replace(Choice(**plain, **counts), kept_layers=6)  # type: ignore[arg-type]
    assert ledger(shape(), more, AROUND).peak("device") > mixed.peak("device")


@settings(max_examples=25, deadline=None, phases=QUICK)
@given(values_of_choices, st.integers(0, 28), st.integers(0, 28), st.sampled_from([0, 3, 8, 28]))
def test_the_estimate_agrees_with_the_ledger(values: dict[str, Any], away: int, kept: int, on_host: int) -> None:
    words = Choice.in_words(28, **values)
    policy = "recompute" if values["activations"] == "keep" else values["activations"]
    choice = replace(words, device_layers=28 - away, dequantized_layers=0, kept_layers=kept, policy=policy)
    choice = replace(choice, host_kept_layers=on_host)
    exact = ledger(shape(), choice, AROUND)
    for where, guess in zip(("device", "host"), estimate(shape(), choice, AROUND), strict=True):
        # The estimate knows no gaps between blocks, which the search leaves to the ledger that verifies its winner.
        blocks = max(sum(line.bytes for line in _blocks(phase.lines, where)) for phase in exact.phases)
        assert guess == pytest.approx(blocks, rel=0.15, abs=64 * MIB)
        assert guess == pytest.approx(exact.peak(where), rel=0.25, abs=64 * MIB)


def _blocks(lines: Sequence[LedgerLine], where: str) -> list[LedgerLine]:
    """What is held in one place, without the allocator's gaps."""
    return [line for line in lines if line.where == where and not line.name.startswith("allocator")]


@given(st.sampled_from([2, 4]))
def test_a_layers_activations_are_more_than_its_linear_inputs_and_outputs(size: int) -> None:
    """Input, q, k, v, attention's output, gate, up, product: the least that autograd keeps of a Llama layer."""
    least = (3072 + 5120 + 3072 + 3 * 8192) * size
    assert least < kept_bytes_per_token_and_layer(shape(), size) < 3 * least


def test_on_a_cpu_later_phases_hold_the_small_blocks_that_training_freed() -> None:
    def stays(tokens: int) -> dict[str, int]:
        made = ledger_of(shape(), **{**values, "device": "cpu", "micro_batch_tokens": tokens})
        name = "freed, still with the process"
        return {p.phase: sum(line.bytes for line in p.lines if line.name == name) for p in made.phases}

    values = {**KNOWN, "activations": "keep"}
    small, large = stays(128), stays(2048)
    assert small["baseline evaluation"] < small["checkpoint"]
    assert small["checkpoint"] > 16 * MIB, "narrow blocks of 128 tokens are below 1 MiB"
    assert large["checkpoint"] < MIB, "larger blocks are mapped, and gone when they are freed"
    on_gpu = ledger_of(shape(), **values)
    assert not any("still with the process" in line.name for phase in on_gpu.phases for line in phase.lines)


def test_a_captured_micro_step_holds_its_batch_and_workspaces_of_its_own() -> None:
    captured, launched = lines_of(shape(), **KNOWN), lines_of(shape(), **KNOWN, launched=True)
    own = {name for name in captured if name.startswith("captured micro-step")}
    assert "captured micro-step: its batch" in own
    assert not own & launched.keys()
    assert captured["cuBLAS workspace"].bytes == 2 * launched["cuBLAS workspace"].bytes
    assert captured["adapter gradients"].bytes == launched["adapter gradients"].bytes == 4 * 2_293_760


def test_a_second_capture_finds_the_workspaces_of_the_first_one_there() -> None:
    """At the loss, before any backward of its own."""
    made = ledger(shape(), Choice.in_words(28, **{**KNOWN, "activations": "keep"}), AROUND)
    training = next(phase for phase in made.phases if phase.phase == "training")
    lines = {line.name: line.bytes for line in training.lines}
    assert training.moment == "the loss"
    assert lines["cuBLAS workspace"] == 4 * AROUND.product_workspace_bytes
    final = {line.name for line in made.phases[-1].lines}
    assert "captured micro-step: its batch" not in final, "given back"


@pytest.mark.parametrize("launched", [False, True])
def test_return_buffers_of_steps_that_are_captured_go_with_the_step(launched: bool) -> None:
    """cuda_graphs.py settles the store of inputs after each of them; a loop that launches all keeps its buffers."""
    words = {**KNOWN, "weights": "host", "activations": "offload", "launched": launched}
    model, choice = sketched(shape()), replace(Choice.in_words(28, **words), kept_layers=4)
    assert choice.captured(model) != launched
    replay = Replay(model, choice, AROUND)
    replay.load()
    replay.training()
    assert "return buffers of offloaded inputs" in replay.device.totals
    assert replay.device.has(("return", 0)) == launched
    assert replay.device.totals.get("captured micro-step: its own gradients", 0) == 0, "they were added up"


def test_what_the_compiler_tries_is_there_the_first_time_alone() -> None:
    stage = Stage(sketched(shape()), Choice.in_words(28, **KNOWN, compiled=True), AROUND)
    trace: Trace = (("a", Line(2**20, 0)), (TRIAL, Line(2**30, 0)), (TRIAL, None), ("a", None))
    rows, peaks = Rows(512, 1, 1, False), []
    for _ in range(2):
        stage.device.begin()
        stage.run(trace, "layer being computed", ("layer", 0), rows)
        peaks.append(stage.device.end())
    assert [moment.allocated for moment in peaks] == [2**30 + 2**20, 2**20]
    assert peaks[0].lines["compiler's trial of a kernel"] == 2**30


def test_loading_a_small_model_holds_its_weights_once() -> None:
    """The self-check borrows one layer at a time, within what training needs (rehearse.room_for_check)."""
    small = shape(layers=1)
    made = ledger_of(small, **KNOWN | {"precision": "bf16"})
    loading = next(phase for phase in made.phases if phase.phase == PHASES[0])
    assert loading.bytes("device") - AROUND.context_bytes < 1.3 * 2 * small.parameters
