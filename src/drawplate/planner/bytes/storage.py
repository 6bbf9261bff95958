"""Bytes of what is stored, and of the loss's tile, by the rules of the code that allocates them.

The rules are those of model/base/precision.py (`Storage.specs`), model/stream/weight_ring.py (`LayerLayout`),
model/ends/loss.py (`_Tile`); tests hold the two sides together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drawplate.layout.footprint import LayerShape
from drawplate.planner.shape import BLOCK, DTYPE_BYTES, PLAIN, SCALE_BLOCK, Choice, ModelShape
from drawplate.units import MIB

ALIGNMENT = 256
TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
TILE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
COLUMN_MULTIPLE = 256
MOST_FUSED_COLUMNS = 16384
FUSED_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class Storage:
    """How the weights of a layer are stored."""

    precision: str
    double_quant: bool

    @classmethod
    def of(cls, choice: Choice, tier: str) -> Storage:
        """Of a tier: dequantized layers are in the compute dtype, those in fp8 have their transposes beside them."""
        if tier == "dequantized" and choice.precision == "fp8":
            return cls("fp8_both", False)
        if tier == "dequantized":
            return cls({4: "fp32", 2: "bf16"}[DTYPE_BYTES[choice.compute_dtype]], False)
        return cls(choice.precision, choice.double_quant)

    def tensors(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Bytes of the stored tensors of one weight."""
        count = out_features * in_features
        if self.precision in PLAIN:
            return (count * PLAIN[self.precision],)
        if self.precision == "int8":
            return (count, out_features * 4)
        if self.precision in ("fp8", "fp8_both"):
            return (count, out_features * 4, *((count,) if self.precision == "fp8_both" else ()))
        blocks = math.ceil(count / BLOCK)
        packed = math.ceil(count / 2)
        return (packed, blocks, math.ceil(blocks / SCALE_BLOCK) * 4, 4) if self.double_quant else (packed, blocks * 4)


def layer_bytes(kind: LayerShape, storage: Storage, dtype_bytes: int) -> int:
    """A layer's run of bytes: every tensor begins at a multiple of 256."""
    tensors = [part for linear in kind.linears for part in storage.tensors(linear.out_features, linear.in_features)]
    tensors += [count * dtype_bytes for count in kind.plain]
    return sum(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in tensors)


def loss_tile(model: ModelShape, choice: Choice, counted: int, *, training: bool) -> tuple[int, ...]:
    """Bytes of the buffers for one tile of logits."""
    fused, size = choice.device == "cuda", DTYPE_BYTES[choice.compute_dtype]
    mixed = size != 4
    blocks = max(1, math.ceil(counted / TILE_TOKENS[choice.device]))
    tokens = max(1, math.ceil(counted / blocks))
    rows = min(model.vocab, choice.head_rows or model.vocab)
    low = size if mixed and not fused and choice.compute_dtype != "float16" else 0
    slope = 4 if training and model.softcap and not fused else 0
    fitting = TILE_BYTES[choice.device] // (tokens * (4 + slope + low))
    most = max(COLUMN_MULTIPLE, fitting - fitting % COLUMN_MULTIPLE)
    pieces = math.ceil(rows / (min(most, MOST_FUSED_COLUMNS) if fused else most))
    columns = min(rows, math.ceil(rows / pieces / COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
    if fused:
        columns = math.ceil(columns / FUSED_ROW_MULTIPLE) * FUSED_ROW_MULTIPLE
    product = tokens * model.hidden * size if training and low else 0
    parts = (tokens * columns * 4, tokens * columns * low, tokens * columns * slope, product)
    return tuple(part for part in parts if part)
