"""Every byte a named line: the formulas, and that more of anything never costs less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.plan.ledger import Choice, ModelShape, kept_bytes_per_token_and_layer, ledger, stored_bits
from drawplate.records import LedgerLine

CHOICE = Choice(
    precision="nf4",
    double_quant=True,
    compute_dtype="bfloat16",
    weights="device",
    activations="recompute",
    micro_batch_tokens=2048,
    device="cuda",
)
choices = st.builds(
    Choice,
    precision=st.sampled_from(["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    weights=st.sampled_from(["device", "dequantized", "host"]),
    activations=st.sampled_from(["keep", "recompute", "offload"]),
    micro_batch_tokens=st.integers(16, 10**6),
    device=st.sampled_from(["cpu", "cuda"]),
)


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


def lines_of(model: ModelShape, choice: Choice) -> dict[str, LedgerLine]:
    lines = ledger(model, choice, base_bytes=10**8, loss_workspace_bytes=10**8)
    assert len({line.name for line in lines}) == len(lines)
    return {line.name: line for line in lines}


def total(model: ModelShape, choice: Choice) -> int:
    return sum(line.bytes for line in lines_of(model, choice).values())


@given(
    choices, st.integers(1, 10**5), st.integers(1, 100), st.integers(1, 100), st.integers(1, 256), st.integers(1, 64)
)
def test_more_tokens_layers_or_rank_never_cost_less(
    choice: Choice, tokens: int, layers: int, more_layers: int, rank: int, more_rank: int
) -> None:
    base = total(shape(layers, rank), choice)
    assert total(shape(layers, rank), replace(choice, micro_batch_tokens=choice.micro_batch_tokens + tokens)) > base
    assert total(shape(layers + more_layers, rank), choice) > base
    assert total(shape(layers, rank + more_rank), choice) > base


@given(choices)
def test_spending_less_memory_is_predicted_to_need_less(choice: Choice) -> None:
    def device(**changes: Any) -> int:
        where = "device" if choice.device == "cuda" else "host"
        lines = lines_of(shape(), replace(choice, **changes)).values()
        return sum(line.bytes for line in lines if line.where == where)

    assert device(activations="recompute") < device(activations="keep")
    if choice.device == "cuda":
        assert device(activations="offload") < device(activations="recompute")
        assert device(weights="host") < device(weights="device")
    assert device(weights="device", precision="nf4") < device(weights="device", precision="int8")
    assert device(weights="device", precision="int8") < device(weights="device", precision="bf16")


@given(choices)
def test_on_a_cpu_every_byte_is_the_hosts(choice: Choice) -> None:
    assert {line.where for line in lines_of(shape(), replace(choice, device="cpu")).values()} == {"host"}


def test_stored_bits_are_those_of_the_format() -> None:
    assert stored_bits("nf4", True) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert stored_bits("fp4", False) == 4.5
    assert [stored_bits(p, True) for p in ("int8", "bf16", "fp16", "fp32")] == [8, 16, 16, 32]


def test_the_lines_of_a_known_case() -> None:
    lines = lines_of(shape(), CHOICE)
    assert lines["frozen weights of the layers"].bytes == int(2_818_572_288 * 4.126953125 / 8)
    assert lines["embedding, head and norms"].bytes == 2 * (128_256 * 3072 + 57 * 3072)
    assert lines["adapter"].bytes == lines["adapter gradients"].bytes == 4 * 2_293_760
    assert lines["optimizer moments"].bytes == 8 * 2_293_760
    assert lines["layer inputs kept"].bytes == 28 * 2048 * 3072 * 2
    streamed = lines_of(shape(), replace(CHOICE, weights="host"))
    assert streamed["frozen weights of the layers"].where == "host"
    assert streamed["ring slots"].bytes == 2 * (lines["frozen weights of the layers"].bytes // 28)


@given(st.sampled_from([2, 4]))
def test_a_layers_activations_are_more_than_its_linear_inputs_and_outputs(size: int) -> None:
    """Input, q, k, v, attention's output, gate, up, product: the least that autograd keeps of a Llama layer."""
    least = (3072 + 5120 + 3072 + 3 * 8192) * size
    assert least < kept_bytes_per_token_and_layer(shape(), size) < 3 * least
