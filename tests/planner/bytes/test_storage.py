"""The plan's arithmetic agrees with the code that allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawplate.layout.footprint import LayerShape, LinearShape
from drawplate.layout.stored_linear import StoredLinear
from drawplate.model.base import precision as storage
from drawplate.model.base.layer_layout import LayerLayout
from drawplate.model.ends.loss_tile import LossShape, Tile
from drawplate.planner.bytes.storage import layer_bytes, loss_buffers
from drawplate.planner.shape import Choice, ModelShape

PRECISIONS = ["nf4", "fp4", "int8", "fp8", "fp8_both", "bf16", "fp16", "fp32"]


@given(st.sampled_from(PRECISIONS), st.booleans(), st.integers(1, 300), st.integers(1, 300))
def test_a_layer_is_as_large_as_its_layout(precision: str, double_quant: bool, out: int, inner: int) -> None:
    specs = {f"w.{n}": s for n, s in storage.Storage(precision, double_quant).specs(out, inner).items()}
    layout = LayerLayout.of({**specs, "norm": ((inner,), torch.bfloat16)})
    kind = LayerShape(linears=(LinearShape(out_features=out, in_features=inner),), plain=(inner,))
    assert layer_bytes(kind, StoredLinear(precision, double_quant), 2) == layout.bytes


MODEL = ModelShape(
    parameters=1, layers=1, linear_parameters=1, outside_parameters=1, hidden=64, intermediate=1, vocab=5000,
    attention_width=1, trained_parameters=1, max_positions=1,
)  # fmt: skip
CHOICE = Choice.in_words(
    1, weights="device", activations="keep", precision="bf16", double_quant=False, compute_dtype="bfloat16",
    device="cpu", micro_batch_tokens=1,
)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@given(st.integers(1, 20_000), st.integers(300, 200_000), st.booleans(), st.booleans(), st.sampled_from([0, 512, 8192]))
def test_the_losses_tile_is_as_large_as_the_code_makes_it(
    dtype: str, device: str, counted: int, vocab: int, training: bool, softcap: bool, head_rows: int
) -> None:
    shape = LossShape(
        vocab=vocab, hidden=64, dtype=getattr(torch, dtype), device=torch.device(device), training=training,
        softcapped=softcap, chunk_rows=head_rows or None, impl="triton" if device == "cuda" else "torch",
    )  # fmt: skip
    model = replace(MODEL, vocab=vocab, softcap=softcap)
    choice = replace(CHOICE, device=device, compute_dtype=dtype, head_rows=head_rows)  # type: ignore[arg-type]
    assert sum(loss_buffers(model, choice, counted, training=training)) == Tile.of(shape, counted).bytes
