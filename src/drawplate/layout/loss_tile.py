"""How many logits the loss has at a time, and in which buffers.

Three ways to multiply, by what the device offers. Same dtype for products and sums: straight into the buffers. A GPU:
low-precision products that leave and accumulate float32, no extra pass. A CPU with bfloat16: its products only leave
bfloat16, so each is followed by a pass that converts (logits) or adds (gradient).

Shapes: B tokens of a tile, V columns of it (rows of the head), H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drawplate.units import MIB

TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
TILE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
"""A tile of logits should stay in a CPU's last-level cache, where its passes cost little, and keep a GPU busy."""
COLUMN_MULTIPLE = 256
MAX_FUSED_COLUMNS = 16384
"""The widest row that the fused kernel reads at once."""
FUSED_ROW_MULTIPLE = 8
"""Rows of a tile begin at multiples of 16 bytes, in whatever dtype, where a GPU multiplies them."""


@dataclass(frozen=True, kw_only=True)
class LossTile:
    """What decides a tile's size and its buffers.

    Attributes:
        device: cpu or cuda.
        sum_bytes: of a number that sums are kept in.
        product_bytes: of a number that products take.
        fused: one kernel turns logits into the gradient's weights in place; its twin needs a buffer for them.
        training: whether a gradient is made.
        softcapped: whether the head has a soft cap.
        most_bytes: what a tile may take; None for the device's usual.
    """

    device: str
    sum_bytes: int
    product_bytes: int
    fused: bool
    training: bool
    softcapped: bool
    most_bytes: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether products and sums have dtypes of their own."""
        return self.product_bytes != self.sum_bytes

    @property
    def has_low(self) -> bool:
        """Whether there is a buffer of logits or weights in the products' dtype."""
        return self.mixed and (self.device == "cpu" or (self.training and not self.fused))

    @property
    def has_slope(self) -> bool:
        """Whether there is a buffer for the soft cap's slope."""
        return self.training and self.softcapped and not self.fused

    @property
    def has_product(self) -> bool:
        """Whether a product of the gradient needs a buffer before it is added."""
        return self.training and self.mixed and self.device == "cpu"

    def size(self, counted: int, rows: int) -> tuple[int, int]:
        """(B, V) for so many target tokens and rows of the head: as large as allowed, and all of a size."""
        blocks = max(1, math.ceil(counted / TILE_TOKENS[self.device]))
        tokens = max(1, math.ceil(counted / blocks))
        element_bytes = self.sum_bytes * (1 + self.has_slope) + self.has_low * self.product_bytes
        fitting = (self.most_bytes or TILE_BYTES[self.device]) // (tokens * element_bytes)
        most = max(COLUMN_MULTIPLE, fitting - fitting % COLUMN_MULTIPLE)
        pieces = math.ceil(rows / (min(most, MAX_FUSED_COLUMNS) if self.fused else most))
        return tokens, min(rows, math.ceil(rows / pieces / COLUMN_MULTIPLE) * COLUMN_MULTIPLE)

    def row_elements(self, columns: int) -> int:
        """Elements from the beginning of a row of V columns to the next."""
        return math.ceil(columns / FUSED_ROW_MULTIPLE) * FUSED_ROW_MULTIPLE if self.fused else columns

    def buffers(self, tokens: int, columns: int, hidden: int) -> tuple[int, int, int, int]:
        """Bytes of the logits, their low-precision copy, the soft cap's slope, and a product of the gradient."""
        elements = tokens * self.row_elements(columns)
        return (
            elements * self.sum_bytes,
            elements * self.product_bytes * self.has_low,
            elements * self.sum_bytes * self.has_slope,
            tokens * hidden * self.product_bytes * self.has_product,
        )
