"""Bytes of what a choice stores, and of the loss's tile."""

from __future__ import annotations

from drawplate.layout.footprint import LayerShape
from drawplate.layout.loss_tile import LossTile
from drawplate.layout.stored_linear import DTYPE_BYTES, StoredLinear, run_of
from drawplate.planner.shape import Choice, ModelShape


def stored_linear(choice: Choice, tier: str) -> StoredLinear:
    """Of a tier: dequantized layers are in the compute dtype, those in fp8 have their transposes beside them."""
    if tier == "dequantized" and choice.precision == "fp8":
        return StoredLinear("fp8_both", False)
    if tier == "dequantized":
        return StoredLinear({4: "fp32", 2: "bf16"}[DTYPE_BYTES[choice.compute_dtype]], False)
    return StoredLinear(choice.precision, choice.double_quant)


def layer_bytes(kind: LayerShape, stored: StoredLinear, dtype_bytes: int) -> int:
    """A layer's run of bytes."""
    tensors = [part for linear in kind.linears for part in stored.sizes(linear.out_features, linear.in_features)]
    return run_of([*tensors, *(count * dtype_bytes for count in kind.plain)])


def loss_buffers(model: ModelShape, choice: Choice, counted: int, *, training: bool) -> tuple[int, ...]:
    """Bytes of the buffers for one tile of logits."""
    size = DTYPE_BYTES[choice.compute_dtype]
    tile = LossTile(
        device=choice.device,
        sum_bytes=4,
        product_bytes=4 if (choice.device, choice.compute_dtype) == ("cpu", "float16") else size,
        fused=choice.device == "cuda",
        training=training,
        softcapped=model.softcap,
    )
    tokens, columns = tile.size(counted, min(model.vocab, choice.head_rows or model.vocab))
    return tuple(part for part in tile.buffers(tokens, columns, model.hidden) if part)
