"""The frozen head: its weight matrix, on the device or streamed from the host in chunks of rows, and what follows it.

Left out: a head that trains, and a head in any precision but that of the hidden states.

Shapes: N tokens, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drawplate.kernels.vocabulary_tile import Columns


class HeadRows(Protocol):
    """The head's weight matrix, handed out in runs of rows: all at once, or through a ring of slots.

    Attributes:
        vocab: rows in all.
        hidden: their length.
        chunk_rows: rows of the largest run.
    """

    vocab: int
    hidden: int
    chunk_rows: int

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first_row, weight_VH)` in order, covering every row once.

        A view is good only until the next one is asked for, by work queued on the current stream.
        """
        ...

    def settle(self) -> None:
        """Let the current stream wait for all copies, and nothing later for what was before. Between passes."""
        ...


class ResidentRows:
    """A head that lives on the device: one tensor, one chunk."""

    def __init__(self, weight_VH: Tensor) -> None:
        self.weight_VH = weight_VH.detach()
        self.vocab, self.hidden = weight_VH.shape
        self.chunk_rows = self.vocab

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the whole matrix."""
        yield 0, self.weight_VH

    def settle(self) -> None:
        """Nothing is copied."""


class StreamedRows:
    """A head that lives on the host and passes through two device slots of `slot_rows` rows each.

    The life of one slot; chunk i uses slot i % 2, and the copy of chunk i + 2 is queued when chunk i is done with::

        free --(copy stream: wait for consumed, copy)--> filling --(copied)--> ready
          ^                                                                       |  compute stream waits for copied
          +------(compute stream records consumed)------ in use <----(yield)------+

    On a CPU the same code runs with plain copies and no events. Call `prefetch()` some work ahead of the loss (before
    the last decoder layer, say) to hide the first two copies as well.

    Args:
        host_VH: the rows, page-locked where the device is a GPU (pageable memory works, but copies then block).
        device: where the slots are.
        slot_rows: rows of one slot; the slots take `2 * slot_rows * H` elements.
        poison: fill a slot with NaN as soon as it is free, so that a view used too late is noticed. For tests.
    """

    SLOTS = 2

    def __init__(self, host_VH: Tensor, device: torch.device, *, slot_rows: int, poison: bool = False) -> None:
        self.host_VH = host_VH.detach()
        self.vocab, self.hidden = host_VH.shape
        self.chunk_rows = min(slot_rows, self.vocab)
        self.poison = poison
        self._slots = [host_VH.new_empty(self.chunk_rows, self.hidden, device=device) for _ in range(self.SLOTS)]
        self._queued = 0  # chunks of the present pass whose copy has been queued
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        # Of each slot the copy into it, and the work that read it last; None where there is nothing to wait for.
        self._copied: list[torch.cuda.Event | None] = [None] * self.SLOTS
        self._consumed: list[torch.cuda.Event | None] = [None] * self.SLOTS

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(slot.nbytes for slot in self._slots)

    def prefetch(self) -> None:
        """Queue the copies of the first chunks of the next pass, unless they are queued already."""
        while self._queued < self.SLOTS:
            self._queue_copy()

    def settle(self) -> None:
        """As in HeadRows."""
        if self._stream is not None and any(self._copied):
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._queued, self._copied, self._consumed = 0, [None] * self.SLOTS, [None] * self.SLOTS

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield every chunk in order. One pass at a time."""
        self.prefetch()
        try:
            for index, first_row in enumerate(range(0, self.vocab, self.chunk_rows)):
                slot = index % self.SLOTS
                copied = self._copied[slot]
                if self._stream is not None and copied is not None:
                    torch.cuda.current_stream(self._stream.device).wait_event(copied)
                try:
                    yield first_row, self._slots[slot][: self.vocab - first_row]
                finally:
                    self._release(slot)
                self._queue_copy()
        finally:
            self._queued = 0

    def _release(self, slot: int) -> None:
        if self.poison:
            self._slots[slot].fill_(math.nan)
        if self._stream is not None:
            consumed = self._consumed[slot] = self._consumed[slot] or torch.cuda.Event()
            consumed.record(torch.cuda.current_stream(self._stream.device))

    def _queue_copy(self) -> None:
        rows_VH = self.host_VH[self._queued * self.chunk_rows :][: self.chunk_rows]
        slot = self._queued % self.SLOTS
        self._queued += 1
        if self._stream is None:
            self._slots[slot][: len(rows_VH)].copy_(rows_VH)
            return
        consumed = self._consumed[slot]
        if consumed is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        else:
            self._stream.wait_event(consumed)
        copied = self._copied[slot] = self._copied[slot] or torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._slots[slot][: len(rows_VH)].copy_(rows_VH, non_blocking=True)
            copied.record(self._stream)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A frozen head: `logits = softcap * tanh(z / softcap)`, with `z = logit_scale * (hidden @ weight.T + bias)`.

    Args:
        weights: the weight matrix, resident or streamed.
        bias: (V,), on the device, or None.
        softcap: `final_logit_softcapping` of Gemma 2, or None.
        logit_scale: `logit_scale` of Cohere, `1 / logits_scaling` of Granite.
        workspace_bytes: what a tile of logits may take; None for the device's default.
    """

    weights: HeadRows
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    workspace_bytes: int | None = None

    @property
    def vocab(self) -> int:
        """Rows of the head."""
        return self.weights.vocab

    def columns(self, first: int, count: int) -> Columns:
        """What becomes of the product with the rows `first ...`."""
        bias_V = None if self.bias is None else self.bias[first : first + count]
        return Columns(first=first, bias_V=bias_V, scale=self.logit_scale, softcap=self.softcap)
