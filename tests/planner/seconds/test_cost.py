"""Seconds as named lines: the laws they follow, and what was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.data.batches import cut_packed, cut_padded
from drawplate.errors import UsageError
from drawplate.planner.bytes.host_kept import due_back
from drawplate.planner.seconds.cost import BESIDE_STREAMED, Cost, Walk, carried_layers, step_cost, step_seconds
from drawplate.planner.seconds.gpus import GPUS, gpu_named, typical_speed
from drawplate.planner.seconds.unit_cost import head_copy_seconds, layer_copy_seconds, product_seconds, units_of
from drawplate.planner.seconds.work import Cut, StepWork, step_work
from drawplate.planner.shape import Choice
from drawplate.records import DeviceSpeed, Sequence
from tests.planner.bytes.test_ledger import shape

H100 = gpu_named("H100").speed("bfloat16")
MODEL = shape()


def choice_of(weights: str = "device", activations: str = "keep", **changes: Any) -> Choice:
    values: dict[str, Any] = {
        "precision": "bf16",
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "device": "cuda",
        "micro_batch_tokens": 8192,
        "compiled": True,
        "dequantize": "layer",
    }
    return Choice.in_words(MODEL.layers, weights=weights, activations=activations, **{**values, **changes})


def work_of(tokens: float = 8192, length: float = 2048, micro_batches: float = 1) -> StepWork:
    return StepWork(micro_batches=micro_batches, positions=tokens, tokens=tokens, squares=tokens * length)


def cost_of(weights: str = "device", activations: str = "keep", work: StepWork | None = None, **changes: Any) -> Cost:
    return step_cost(MODEL, choice_of(weights, activations, **changes), work or work_of(), H100)


def line(cost: Cost, name: str) -> float:
    return next((x.seconds for x in cost.lines if x.name == name), 0.0)


def test_products_take_four_flops_a_weight_and_token() -> None:
    flops = 4 * MODEL.linear_parameters * 8192
    assert line(cost_of(), "matrix products of the layers") == pytest.approx(
        flops / H100.product_rates[-1][1], rel=0.05
    )


def test_recomputing_costs_one_more_forward_and_offloading_only_the_gaps_between_launches() -> None:
    kept, again, offloaded = cost_of(), cost_of(activations="recompute"), cost_of(activations="offload")
    assert 1.2 < again.seconds / kept.seconds < 1.5
    gaps = line(offloaded, "gaps between kernels") - line(again, "gaps between kernels")
    assert offloaded.seconds - again.seconds == pytest.approx(gaps)
    assert gaps > 0, "offloading cannot be captured"


def test_streaming_is_free_above_the_tokens_that_docs_streaming_names_and_not_below() -> None:
    """T* = bytes per weight * FLOP/s / (2 * bytes/s); other work than products makes it smaller."""
    rate = H100.product_rates[-1][1]
    free = 2 * rate / (2 * H100.to_device_rate)
    above, below = work_of(2 * free), work_of(free / 8)
    name = "waiting for streamed layers"
    copies = 2 * (MODEL.layers - 2) * layer_copy_seconds(MODEL, choice_of(), H100)
    assert line(cost_of("host", "offload", above), name) < 0.2 * copies, "next to nothing"
    waiting = line(cost_of("host", "offload", below), name)
    assert 0.2 * copies < waiting < copies


def test_packed_documents_cost_the_sum_of_their_squares_and_what_each_position_takes() -> None:
    whole, long, short = (line(cost_of(work=work_of(length=n)), "attention") for n in (8192, 4096, 2048))
    each = 2 * long - whole
    assert 0 < each < short, "what does not grow with the length"
    assert whole - long == pytest.approx(2 * (long - short))


def test_a_small_micro_batch_waits_for_the_host_unless_it_is_captured() -> None:
    small = cost_of(activations="offload", work=work_of(256))
    assert line(small, "waiting for the host") > 0.3 * small.seconds
    assert line(cost_of(activations="offload", work=work_of(32768)), "waiting for the host") == 0
    captured = cost_of(work=work_of(256))
    assert line(captured, "waiting for the host") == 0
    assert captured.seconds < 0.5 * small.seconds


@pytest.mark.parametrize(
    ("changes", "captured"),
    [
        ({}, True),
        ({"activations": "recompute"}, True),
        ({"weights": "dequantized"}, True),
        ({"activations": "offload"}, False),
        ({"activations": "offload", "kept": 1}, True),
        ({"weights": "host"}, True),
        ({"weights": "host", "activations": "recompute"}, False),
        ({"weights": "host", "activations": "offload", "kept": 2}, True),
        ({"head_rows": 4096}, True),
        ({"head_rows": 4096, "activations": "recompute"}, False),
        ({"embedding": "host"}, True),
        ({"embedding": "host", "activations": "recompute"}, True),
        ({"device": "cpu"}, False),
        ({"packing": True, "compute_dtype": "float32"}, False),
        ({"packing": False, "compute_dtype": "float32"}, True),
    ],
)
def test_micro_steps_are_captured_where_nothing_crosses_the_bus_or_there_is_room(
    changes: dict[str, Any], captured: bool
) -> None:
    words = {name: value for name, value in changes.items() if name != "kept"}
    choice = choice_of(**words)
    assert replace(choice, kept_layers=changes.get("kept", choice.kept_layers)).captured(MODEL) == captured


@pytest.mark.parametrize(("packing", "captured"), [(True, False), (False, True)])
def test_packed_documents_that_are_attended_to_one_by_one_are_launched(packing: bool, captured: bool) -> None:
    """Gemma 2 on a GPU: capture fails where the host has to know the borders."""
    assert choice_of(packing=packing).captured(replace(MODEL, one_by_one=True)) == captured


def test_dequantization_is_paid_at_every_pass_unless_the_layers_are_dequantized() -> None:
    name = "dequantization"
    assert line(cost_of(), name) == 0
    assert line(cost_of("dequantized", precision="nf4"), name) == 0
    whole = line(cost_of("device", "recompute", precision="nf4"), name)
    assert whole == pytest.approx(2 * MODEL.linear_parameters / H100.dequantize_rate)
    largest_again = MODEL.linear_parameters - MODEL.layers * MODEL.hidden * MODEL.intermediate
    passes = 2 + largest_again / MODEL.linear_parameters
    by_product = line(cost_of("device", "recompute", precision="nf4", dequantize="product"), name)
    assert by_product == pytest.approx(passes * whole / 2, rel=1e-3)


def test_fp8_is_transposed_once_for_backward_unless_the_transpose_is_stored() -> None:
    name = "dequantization"
    assert line(cost_of("dequantized", precision="fp8"), name) == 0
    kept, again = (line(cost_of("device", activations, precision="fp8"), name) for activations in ("keep", "recompute"))
    assert kept == again > 0
    assert kept < 0.1 * cost_of("device", precision="fp8").seconds


def test_a_streamed_head_costs_what_its_copy_takes_longer_than_its_products() -> None:
    work = work_of(64, 64)
    copy = head_copy_seconds(MODEL, choice_of(head_rows=8192), H100)
    assert 0.5 * copy < line(cost_of(work=work, head_rows=8192), "waiting for the streamed head") < copy
    assert line(cost_of(work=work), "waiting for the streamed head") == 0


def test_rows_of_an_embedding_on_the_host_cross_the_bus() -> None:
    untied, work, name = replace(MODEL, tied=False), work_of(2048), "embedding in host memory"
    crossing = 2048 * MODEL.hidden * 2 / H100.to_device_rate
    for changes in ({"embedding": "host"}, {"head_rows": 8192}):
        assert line(step_cost(untied, choice_of(**changes), work, H100), name) == pytest.approx(crossing)
    assert line(step_cost(untied, choice_of(), work, H100), name) == 0
    tied = replace(MODEL, tied=True)
    assert line(step_cost(tied, choice_of(embedding="host"), work, H100), name) == 0


@given(st.sampled_from(["device", "host"]), st.sampled_from(["keep", "recompute", "offload"]), st.integers(16, 40000))
@settings(deadline=None, max_examples=30)
def test_the_lines_sum_to_the_step(weights: str, activations: str, tokens: int) -> None:
    choice, work = choice_of(weights, activations, precision="nf4"), work_of(tokens, 500, micro_batches=2.5)
    cost = step_cost(MODEL, choice, work, H100)
    assert cost.seconds == pytest.approx(step_seconds(MODEL, choice, work, H100, units_of(MODEL, choice, work, H100)))
    assert cost.tokens_per_second == pytest.approx(work.step_tokens / cost.seconds)


@given(
    st.integers(0, 27),
    st.integers(0, 28),
    st.sampled_from([0, 5, 28]),
    st.sampled_from(["recompute", "offload"]),
    st.integers(128, 20000),
)
@settings(deadline=None, max_examples=60)
def test_more_layers_that_keep_their_activations_are_never_slower(
    kept: int, host: int, on_host: int, policy: str, tokens: int
) -> None:
    """What the search halves on."""

    def seconds(count: int) -> float:
        choice = replace(choice_of(), kept_layers=count, device_layers=28 - host, policy=policy)  # type: ignore[arg-type]
        return cost_of_choice(replace(choice, host_kept_layers=on_host), work_of(tokens, 500))

    assert seconds(kept + 1) <= seconds(kept) * (1 + 1e-12)


@given(
    st.integers(0, 28),
    st.integers(2, 20),
    st.sampled_from(["recompute", "offload"]),
    st.sampled_from(["nf4", "bf16"]),
    st.integers(1024, 20000),
)
@settings(deadline=None, max_examples=60)
def test_what_the_bus_carries_for_nothing_takes_no_time_and_one_more_layer_does(
    host: int, kept: int, policy: str, precision: str, tokens: int
) -> None:
    work = work_of(tokens, 500)
    choice = replace(choice_of(precision=precision), kept_layers=kept, device_layers=28 - host, policy=policy)  # type: ignore[arg-type]
    units = units_of(MODEL, replace(choice, host_kept_layers=1), work, H100)
    walk = Walk.of(MODEL, choice)
    count = carried_layers(choice, walk, units)

    def copied(on_host: int) -> tuple[float, float]:
        """Seconds of copies beyond the compute beside them: out, and back."""
        away = Walk.of(MODEL, replace(choice, host_kept_layers=on_host))
        inputs = away.rest if policy == "offload" else 0
        once = away.quantized * units.dequantize
        arriving = (away.host - away.turning) * units.layer_copy
        leaving = inputs * units.input_out + on_host * units.kept_out
        out = max(leaving, (leaving + arriving) / units.both_ways) - (27 * units.forward.total + once)
        back = inputs * units.input_back + on_host * units.kept_back + arriving
        return out, back - (28 * units.backward.total + away.rest * units.again.total + once)

    assert 0 <= count <= 28 - kept
    assert count == 0 or max(copied(count)) <= 1e-9
    more = math.ceil((count + 1) / (BESIDE_STREAMED if host else 1))
    assert more > 28 - kept or max(copied(more)) > -1e-9


def test_a_layer_kept_in_host_memory_is_not_computed_again_and_waits_for_a_slow_bus_only() -> None:
    choice = replace(choice_of(), kept_layers=8)
    fast, slow = H100, replace(H100, to_host_rate=H100.to_host_rate / 100)

    def lines(on_host: int, speed: DeviceSpeed) -> tuple[float, float]:
        cost = step_cost(MODEL, replace(choice, host_kept_layers=on_host), work_of(), speed)
        return line(cost, "recomputation"), line(cost, "waiting for streamed layers")

    (all_again, _), (again, waiting) = lines(0, fast), lines(2, fast)
    assert again == pytest.approx(all_again * 18 / 20)
    assert waiting == 0
    assert lines(2, slow)[1] > 0
    assert lines(0, slow) == lines(0, fast)


def test_what_comes_back_waits_for_room_that_kept_layers_make_and_for_its_turn() -> None:
    """Two kept layers make room for two before the first is reached, six for the five that are due by then."""
    choice, speed = replace(choice_of(), host_kept_layers=6), replace(H100, to_host_rate=1e15)
    units = units_of(MODEL, choice, work_of(), speed)
    short = 6 * (units.kept_back - units.backward.total)
    assert short > 0, "a copy takes longer than a backward"
    waiting = {
        kept: line(step_cost(MODEL, replace(choice, kept_layers=kept), work_of(), speed), "waiting for streamed layers")
        for kept in (0, 2, 6)
    }
    for kept in waiting:
        late = 6 - min(kept, due_back(28, 6, kept))
        assert waiting[kept] == pytest.approx(max(0.0, late * units.kept_back - 6 * units.backward.total))
    assert waiting[0] > waiting[2] > waiting[6]


def cost_of_choice(choice: Choice, work: StepWork) -> float:
    return step_cost(MODEL, choice, work, H100).seconds


def test_a_products_seconds_are_those_measured_at_its_size_and_between() -> None:
    speed = replace(H100, product_rates=((1e9, 1e12), (1e11, 3e12)))
    assert product_seconds(speed, 1000, 1000, 500) == pytest.approx(1e9 / 1e12)
    assert product_seconds(speed, 1, 1, 1) == pytest.approx(1e9 / 1e12), "a tiny one takes as long as the smallest"
    assert product_seconds(speed, 1000, 1000, 5000) == pytest.approx(1e10 / 2e12)
    assert product_seconds(speed, 1e4, 1e4, 5000) == pytest.approx(1e12 / 3e12)


# --- the work of a step ------------------------------------------------------------------------------------------


def sequences_of(lengths: list[int]) -> list[Sequence]:
    return [
        Sequence(index=i, document=str(i), input_ids=np.zeros(n, np.int32), counted=np.ones(n, bool), text_bytes=n)
        for i, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.booleans(), st.sampled_from([16, 64]))
@settings(deadline=None, max_examples=40)
def test_a_step_of_the_whole_corpus_is_cut_as_the_loop_cuts_it(
    lengths: list[int], packing: bool, multiple: int
) -> None:
    work = step_work(lengths, len(lengths), Cut(packing=packing, tokens=512, sequences=5, multiple=multiple))
    cut = (
        cut_packed(sequences_of(lengths), 512, multiple, 0)
        if packing
        else cut_padded(sequences_of(lengths), 5, multiple, 0)
    )
    assert work.micro_batches == pytest.approx(len(cut))
    assert work.positions * len(cut) == pytest.approx(sum(batch.input_ids_BT.numel() for batch in cut))
    assert work.tokens * len(cut) == pytest.approx(sum(lengths))


def test_a_large_corpus_is_sampled() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 2000, 100_000).tolist()
    work = step_work(lengths, 64, Cut(packing=True, tokens=8192, sequences=64, multiple=16))
    assert work.step_tokens == pytest.approx(64 * np.mean(lengths), rel=0.02)
    assert work.tokens > 0.85 * 8192 * work.micro_batches / np.ceil(work.micro_batches)


# --- cards that are not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "geforce rtx-4090"])
def test_a_card_is_found_however_its_name_is_written(name: str) -> None:
    assert gpu_named(name).name == "RTX 4090"


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"RTX 4095.*\n.*\n.*RTX 4090"):
        gpu_named("RTX 4095")


def test_every_card_has_a_source_and_figures_in_their_order() -> None:
    for gpu in GPUS:
        assert "https://" in gpu.source
        assert gpu.fp8 == 0 or gpu.fp8 >= gpu.fp16 >= gpu.bf16 > 0
        speed = gpu.speed("float16")
        assert speed.to_device_rate < speed.memory_rate
        assert speed.product_rates[0][1] < speed.product_rates[-1][1]
    assert (
        gpu_named("T4").speed("bfloat16").product_rates[-1][1] < gpu_named("T4").speed("float16").product_rates[-1][1]
    )
    assert typical_speed("cpu").product_rates


# --- what was measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activations", "precision", "tokens", "length", "tokens_per_second"),
    [
        ("recompute", "bf16", 8192, 2048, 28091),
        ("keep", "bf16", 4096, 2048, 36640),
        ("keep", "nf4", 2048, 2048, 30768),
        ("keep", "fp8", 14336, 2048, 48895),
    ],
)
def test_an_h100_is_predicted_within_a_tenth(
    activations: str, precision: str, tokens: int, length: int, tokens_per_second: float
) -> None:
    """Profiles of a 3B on an H100 (docs/speed.md, bench/results); its speed was probed, none of it is published."""
    probed = replace(
        H100,
        product_rates=((2.1e9, 7.9e13), (8.6e9, 3.1e14), (3.4e10, 6.15e14), (1.37e11, 7.2e14), (1.9e12, 6.9e14)),
        attention_rate=4.1e14,
        memory_rate=2.8e12,
        dequantize_rate=6e11,
        launch_seconds=1.06e-5,
        row_attention=(),
    )
    choice = choice_of(activations=activations, precision=precision, dequantize="product", packing=False)
    predicted = step_cost(MODEL, choice, work_of(tokens, length), probed)
    assert predicted.tokens_per_second == pytest.approx(tokens_per_second, rel=0.1)


@pytest.mark.parametrize(("documents", "length", "seconds"), [(16, 512, 0.0243), (4, 512, 0.0085), (28, 137, 0.0109)])
def test_short_packed_documents_are_attended_to_at_the_rate_of_their_own_kernels(
    documents: int, length: int, seconds: float
) -> None:
    """Kernels of attention in a 3B's micro-step (bench/results/profile-packed-large-h100.json and others).
    The rate of long documents is assumed."""
    probed = replace(H100, packed_attention=((512.0, 1.04e14), (2048.0, 2.2e14)))
    work = replace(work_of(documents * length, length), squares=float(documents * length**2))
    choice = replace(choice_of(activations="keep", precision="bf16"), packing=True)
    units = units_of(MODEL, choice, work, probed)
    predicted = MODEL.layers * (units.forward.attention + units.backward.attention)
    assert predicted == pytest.approx(seconds, rel=0.35)
    padded = units_of(MODEL, replace(choice, packing=False), work, probed)
    assert padded.forward.attention < units.forward.attention
