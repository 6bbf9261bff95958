"""How much of the loss is done at a time: the shape of a tile of logits, its buffers, and the bytes all that takes.

Shapes: C tokens that count, B tokens of a tile, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton
from drawplate.kernels.vocabulary_tile import MAX_COLUMNS
from drawplate.model.ends.head import Head
from drawplate.units import MIB

TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
WORKSPACE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
"""A tile of logits should stay in a CPU's last-level cache, where its passes cost little, and keep a GPU busy."""

COLUMN_MULTIPLE = 256
ROW_MULTIPLE = 8
"""Rows of a tile begin at multiples of 16 bytes, in whatever dtype, where a GPU multiplies them."""


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """The numbers that the loss's memory depends on.

    Attributes:
        vocab: rows of the head.
        hidden: their length.
        dtype: of the hidden states.
        device: cpu or cuda.
        training: whether a gradient is made.
        softcapped: whether the head has a soft cap.
        chunk_rows: rows of the head that are on the device at a time; None for all.
        workspace_bytes: what a tile of logits may take; None for the device's default.
        impl: the kernels' choice.
    """

    vocab: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    training: bool = True
    softcapped: bool = False
    chunk_rows: int | None = None
    workspace_bytes: int | None = None
    impl: Impl = "auto"

    @classmethod
    def of(cls, hidden_NH: Tensor, head: Head, impl: Impl = "auto", *, training: bool = True) -> LossShape:
        """The shape of a call of `head_cross_entropy`."""
        return cls(
            vocab=head.vocab,
            hidden=head.weights.hidden,
            dtype=hidden_NH.dtype,
            device=hidden_NH.device,
            training=training,
            softcapped=head.softcap is not None,
            chunk_rows=head.weights.chunk_rows,
            workspace_bytes=head.workspace_bytes,
            impl=impl,
        )


def loss_workspace_bytes(shape: LossShape, tokens: int, *, counted: int | None = None) -> int:
    """Peak bytes that `head_cross_entropy` allocates while it runs; the head itself and its slots are not among them.

    One tile of logits and 11 numbers of 4 to 8 bytes for each token that counts. If some do not count, a copy of the
    hidden states of those that do (C * H elements). In training also their float32 accumulator and their targets'
    rows (C * H elements each), and where products cannot add to float32 (a CPU in bf16) one block's product (B * H
    elements). Afterwards only the gradient stays until backward, which makes another N * H.
    Blind to the allocator's rounding and to the workspace of cuBLAS and oneDNN.

    Args:
        shape: the numbers, from a head (`LossShape.of`) or from a configuration.
        tokens: of the micro-batch.
        counted: those whose target is not ignored; None for all.
    """
    counted = tokens if counted is None else counted
    size, tile = shape.dtype.itemsize, Tile.of(shape, counted)
    total = tile.bytes + counted * 11 * 4
    if counted < tokens:
        total += counted * shape.hidden * size
    if shape.training:
        total += counted * shape.hidden * (tile.sum_dtype.itemsize + size)
    return total


@dataclass
class Tile:
    """The buffers for one tile of logits, allocated once a pass, and the two products that use them.

    Three ways to multiply, by what the device offers. Same dtype for products and sums: straight into the buffers. A
    GPU: low-precision products that leave and accumulate float32, no extra pass. A CPU with bfloat16: its products only
    leave bfloat16, so each is followed by a pass that converts (logits) or adds (gradient).

    The kernel writes the gradient's weights over the logits they come from; its twin needs a buffer for them.
    """

    tokens: int
    columns: int
    product_dtype: torch.dtype
    sum_dtype: torch.dtype
    shape: LossShape
    impl: Impl

    @classmethod
    def of(cls, shape: LossShape, tokens: int) -> Tile:
        """The tile for so many tokens that count: as large as the workspace allows, and all of a size."""
        kind = "cpu" if shape.device.type == "cpu" else "cuda"
        blocks = max(1, math.ceil(tokens / TILE_TOKENS[kind]))
        sum_dtype = torch.promote_types(shape.dtype, torch.float32)
        fused = sum_dtype == torch.float32 and uses_triton(shape.device, shape.impl)
        rows = min(shape.vocab, shape.chunk_rows or shape.vocab)
        tile = cls(
            tokens=max(1, math.ceil(tokens / blocks)),
            columns=rows,
            # A CPU multiplies fp16 far more slowly than float32.
            product_dtype=torch.float32 if (kind, shape.dtype) == ("cpu", torch.float16) else shape.dtype,
            sum_dtype=sum_dtype,
            shape=shape,
            impl="triton" if fused else "torch",
        )
        fitting = (shape.workspace_bytes or WORKSPACE_BYTES[kind]) // (tile.tokens * tile.element_bytes)
        most = max(COLUMN_MULTIPLE, fitting - fitting % COLUMN_MULTIPLE)
        pieces = math.ceil(rows / (min(most, MAX_COLUMNS) if fused else most))
        tile.columns = min(rows, math.ceil(rows / pieces / COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
        return tile

    @property
    def training(self) -> bool:
        """Whether weights are wanted."""
        return self.shape.training

    @property
    def element_bytes(self) -> int:
        """Bytes for each logit: in the sums' dtype, the products', and for the soft cap's slope."""
        return self.sum_dtype.itemsize * (2 if self._has_slope else 1) + self._has_low * self.product_dtype.itemsize

    @property
    def bytes(self) -> int:
        """What `allocate` allocates."""
        product = self.tokens * self.shape.hidden * self.product_dtype.itemsize if self._has_product else 0
        return self._elements * self.element_bytes + product

    @property
    def _elements(self) -> int:
        return self.tokens * self._row_elements(self.columns)

    @property
    def _mixed(self) -> bool:
        return self.product_dtype != self.sum_dtype

    @property
    def _has_low(self) -> bool:
        on_cpu = self.shape.device.type == "cpu"
        return self._mixed and (on_cpu or (self.training and self.impl == "torch"))

    @property
    def _has_slope(self) -> bool:
        return self.training and self.shape.softcapped and self.impl == "torch"

    @property
    def _has_product(self) -> bool:
        return self.training and self._mixed and self.shape.device.type == "cpu"

    def allocate(self, hidden: int) -> None:
        """Make the buffers."""
        device, elements = self.shape.device, self._elements
        self._logits = torch.empty(elements, dtype=self.sum_dtype, device=device)
        self._low = torch.empty(elements if self._has_low else 0, dtype=self.product_dtype, device=device)
        self._slope = torch.empty(elements if self._has_slope else 0, dtype=self.sum_dtype, device=device)
        tokens = self.tokens if self._has_product else 0
        self._product_BH = torch.empty(tokens, hidden, dtype=self.product_dtype, device=device)

    def _row_elements(self, columns: int) -> int:
        return columns if self.impl == "torch" else math.ceil(columns / ROW_MULTIPLE) * ROW_MULTIPLE

    def _window(self, buffer: Tensor, tokens: int, columns: int) -> Tensor:
        row = self._row_elements(columns)
        return buffer[: tokens * row].view(tokens, row)[:, :columns]

    def logits(self, hidden_BH: Tensor, rows_VH: Tensor) -> Tensor:
        """hidden @ rows.T, in the sums' dtype."""
        logits_BV = self._window(self._logits, len(hidden_BH), len(rows_VH))
        hidden_BH = hidden_BH.to(self.product_dtype)
        if not self._mixed:
            return torch.mm(hidden_BH, rows_VH.T, out=logits_BV)
        if self.shape.device.type != "cpu":
            return torch.mm(hidden_BH, rows_VH.T, out_dtype=self.sum_dtype, out=logits_BV)
        low_BV = self._window(self._low, len(hidden_BH), len(rows_VH))
        return logits_BV.copy_(torch.mm(hidden_BH, rows_VH.T, out=low_BV))

    def weights(self, logits_BV: Tensor) -> Tensor | None:
        """Where the gradient's weights go, in the products' dtype."""
        tokens, columns = logits_BV.shape
        if not self.training:
            return None
        if not self._mixed:
            return logits_BV
        if self.impl == "torch":
            return self._window(self._low, tokens, columns)
        row = self._row_elements(columns)
        low = self._logits[: tokens * row].view(self.product_dtype)
        return low.view(tokens, -1)[:, :columns]

    def slope(self, logits_BV: Tensor) -> Tensor | None:
        """Scratch for the soft cap's slope."""
        return self._window(self._slope, *logits_BV.shape) if self._has_slope else None

    def accumulate(self, gradient_BH: Tensor, weights_BV: Tensor, rows_VH: Tensor) -> None:
        """gradient += weights @ rows."""
        if not self._mixed:
            gradient_BH.addmm_(weights_BV, rows_VH)
        elif self.shape.device.type != "cpu":
            torch.addmm(gradient_BH, weights_BV, rows_VH, out_dtype=self.sum_dtype, out=gradient_BH)
        else:
            gradient_BH.add_(torch.mm(weights_BV, rows_VH, out=self._product_BH[: len(weights_BV)]))
