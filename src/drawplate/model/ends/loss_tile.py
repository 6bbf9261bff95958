"""One tile of logits: its buffers, and the products that fill them.

Shapes: C tokens that count, B tokens of a tile, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton
from drawplate.layout.loss_tile import LossTile
from drawplate.model.ends.head import Head


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


@dataclass
class Tile:
    """The buffers for one tile of logits (layout/loss_tile.py), made once a pass, and the two products that use them.

    The kernel writes the gradient's weights over the logits they come from; its twin needs a buffer for them.
    """

    tokens: int
    columns: int
    product_dtype: torch.dtype
    sum_dtype: torch.dtype
    shape: LossShape
    layout: LossTile

    @classmethod
    def of(cls, shape: LossShape, tokens: int) -> Tile:
        """The tile for so many tokens that count."""
        kind = "cpu" if shape.device.type == "cpu" else "cuda"
        sum_dtype = torch.promote_types(shape.dtype, torch.float32)
        # A CPU multiplies fp16 far more slowly than float32.
        product_dtype = torch.float32 if (kind, shape.dtype) == ("cpu", torch.float16) else shape.dtype
        layout = LossTile(
            device=kind,
            sum_bytes=sum_dtype.itemsize,
            product_bytes=product_dtype.itemsize,
            fused=sum_dtype == torch.float32 and uses_triton(shape.device, shape.impl),
            training=shape.training,
            softcapped=shape.softcapped,
            most_bytes=shape.workspace_bytes,
        )
        most, columns = layout.size(tokens, min(shape.vocab, shape.chunk_rows or shape.vocab))
        return cls(most, columns, product_dtype, sum_dtype, shape, layout)

    @property
    def impl(self) -> Impl:
        """Which of the two kernels is used."""
        return "triton" if self.layout.fused else "torch"

    @property
    def training(self) -> bool:
        """Whether weights are wanted."""
        return self.shape.training

    @property
    def bytes(self) -> int:
        """What `allocate` allocates."""
        return sum(self.layout.buffers(self.tokens, self.columns, self.shape.hidden))

    def allocate(self, hidden: int) -> None:
        """Make the buffers."""
        device, layout = self.shape.device, self.layout
        elements = self.tokens * layout.row_elements(self.columns)
        self._logits = torch.empty(elements, dtype=self.sum_dtype, device=device)
        self._low = torch.empty(elements if layout.has_low else 0, dtype=self.product_dtype, device=device)
        self._slope = torch.empty(elements if layout.has_slope else 0, dtype=self.sum_dtype, device=device)
        tokens = self.tokens if layout.has_product else 0
        self._product_BH = torch.empty(tokens, hidden, dtype=self.product_dtype, device=device)

    def _window(self, buffer: Tensor, tokens: int, columns: int) -> Tensor:
        row = self.layout.row_elements(columns)
        return buffer[: tokens * row].view(tokens, row)[:, :columns]

    def logits(self, hidden_BH: Tensor, rows_VH: Tensor) -> Tensor:
        """hidden @ rows.T, in the sums' dtype."""
        logits_BV = self._window(self._logits, len(hidden_BH), len(rows_VH))
        hidden_BH = hidden_BH.to(self.product_dtype)
        if not self.layout.mixed:
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
        if not self.layout.mixed:
            return logits_BV
        if self.impl == "torch":
            return self._window(self._low, tokens, columns)
        row = self.layout.row_elements(columns)
        low = self._logits[: tokens * row].view(self.product_dtype)
        return low.view(tokens, -1)[:, :columns]

    def slope(self, logits_BV: Tensor) -> Tensor | None:
        """Scratch for the soft cap's slope."""
        return self._window(self._slope, *logits_BV.shape) if self.layout.has_slope else None

    def accumulate(self, gradient_BH: Tensor, weights_BV: Tensor, rows_VH: Tensor) -> None:
        """gradient += weights @ rows."""
        if not self.layout.mixed:
            gradient_BH.addmm_(weights_BV, rows_VH)
        elif self.shape.device.type != "cpu":
            torch.addmm(gradient_BH, weights_BV, rows_VH, out_dtype=self.sum_dtype, out=gradient_BH)
        else:
            gradient_BH.add_(torch.mm(weights_BV, rows_VH, out=self._product_BH[: len(weights_BV)]))
