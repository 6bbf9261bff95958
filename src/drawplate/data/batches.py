"""The sequences of an optimizer step -> micro-batches.

How a step is cut into micro-batches changes nothing that the loss counts: resuming, or cutting a step finer after
running out of memory, sees the same numbers. There is no loader with workers here: windows are already in memory (4
bytes a token), and building a micro-batch takes microseconds beside the model's pass over it.

Shapes: B rows of a micro-batch, T positions of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from drawplate.records import Sequence

NOT_COUNTED = -100
PADDING_SEQUENCE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch.

    Padding is always at the end of a row, is numbered from position 0 like a document of its own, and is neither
    counted by the loss nor by `tokens`.

    Attributes:
        input_ids_BT: int64.
        targets_BT: int64; at each position the id of the NEXT token of the same document, -100 where the loss does not
            count it.
        position_ids_BT: int64, from 0 at the start of each sequence.
        sequence_ids_BT: int64, `Sequence.index` at each position, -1 in padding: dropout keys are made of it.
        cu_seqlens: int32, the borders of the segments of a packed row from 0 to T, padding being the last segment; None
            for a padded batch, where each row is one sequence.
        max_seqlen: positions of the longest segment (packed), or T (padded).
        tokens: positions that are not padding.
        counted_tokens: positions that the loss counts.
        documents: names of the documents in it, each once.
    """

    input_ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    sequence_ids_BT: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    tokens: int
    counted_tokens: int
    documents: tuple[str, ...]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest sequence; padding, which is numbered like one, counts only where it is longer."""
        return int(self.position_ids_BT.max()) + 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; to CUDA from pinned memory, without waiting for the copy."""
        device = torch.device(device)
        cuda = device.type == "cuda"
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.pin_memory() if cuda and value.device.type == "cpu" else value
                moved[field.name] = value.to(device, non_blocking=cuda)
        return dataclasses.replace(self, **moved)


def cut_padded(
    sequences: Iterable[Sequence], micro_batch_sequences: int, pad_to_multiple_of: int, pad_id: int
) -> list[Batch]:
    """Micro-batches of at most `micro_batch_sequences` rows, one sequence a row, padded on the right.

    Rows are sorted by length so that neighbours need little padding; the longest come first, so that a step that does
    not fit fails at once.
    """
    ordered = _longest_first(sequences)
    groups = [ordered[i : i + micro_batch_sequences] for i in range(0, len(ordered), micro_batch_sequences)]
    return [_batch([[s] for s in group], pad_to_multiple_of, pad_id, packed=False) for group in groups]


def cut_packed(
    sequences: Iterable[Sequence], micro_batch_tokens: int, pad_to_multiple_of: int, pad_id: int
) -> list[Batch]:
    """Micro-batches of one row (B = 1) that holds several sequences end to end, by first-fit-decreasing bin packing.

    A row, padding included, holds at most `micro_batch_tokens` positions, except that a sequence longer than that gets
    a row of its own. First-fit-decreasing needs at most 11/9 of the fewest possible rows plus one (Johnson 1973).
    """
    capacity = max(micro_batch_tokens // pad_to_multiple_of * pad_to_multiple_of, 1)
    ordered = _longest_first(sequences)
    rows: list[list[Sequence]] = []
    room = np.zeros(len(ordered), dtype=np.int64)
    for sequence in ordered:
        fits = np.flatnonzero(room[: len(rows)] >= len(sequence))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(sequence)
        room[row] -= len(sequence)
    return [_batch([row], pad_to_multiple_of, pad_id, packed=True) for row in rows]


def _longest_first(sequences: Iterable[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda sequence: (-len(sequence), sequence.index))


def _batch(rows: Seq[Seq[Sequence]], pad_to_multiple_of: int, pad_id: int, *, packed: bool) -> Batch:
    tokens = [sum(len(sequence) for sequence in row) for row in rows]
    width = -(-max(tokens) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, NOT_COUNTED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    sequence_ids = np.full(shape, PADDING_SEQUENCE, dtype=np.int64)
    borders = [0]
    for b, row in enumerate(rows):
        start = 0
        for sequence in row:
            end = start + len(sequence)
            input_ids[b, start:end] = sequence.input_ids
            targets[b, start : end - 1] = np.where(sequence.counted[1:], sequence.input_ids[1:], NOT_COUNTED)
            positions[b, start:end] = np.arange(len(sequence))
            sequence_ids[b, start:end] = sequence.index
            borders.append(end)
            start = end
        positions[b, start:] = np.arange(width - start)
    borders += [width] if borders[-1] < width else []
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids),
        targets_BT=torch.from_numpy(targets),
        position_ids_BT=torch.from_numpy(positions),
        sequence_ids_BT=torch.from_numpy(sequence_ids),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32) if packed else None,
        max_seqlen=int(np.diff(borders).max()) if packed else width,
        tokens=sum(tokens),
        counted_tokens=int((targets != NOT_COUNTED).sum()),
        documents=tuple(dict.fromkeys(sequence.document for row in rows for sequence in row)),
    )


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How sequences become micro-batches: packed rows of at most `tokens`, or padded rows of `sequences`."""

    packing: bool
    tokens: int
    sequences: int = 1
    pad_to_multiple_of: int = 16
    pad_id: int = 0

    def __call__(self, sequences: Seq[Sequence]) -> list[Batch]:
        """The micro-batches of some sequences, in a fixed order."""
        if self.packing:
            return cut_packed(sequences, self.tokens, self.pad_to_multiple_of, self.pad_id)
        return cut_padded(sequences, self.sequences, self.pad_to_multiple_of, self.pad_id)

    def halved(self) -> Cutting | None:
        """Micro-batches half as large, None where that is impossible."""
        if self.packing:
            return replace(self, tokens=self.tokens // 2) if self.tokens // 2 >= self.pad_to_multiple_of else None
        return replace(self, sequences=self.sequences // 2) if self.sequences > 1 else None

    @property
    def size(self) -> str:
        """Of a micro-batch, in words."""
        return f"{self.tokens:,} tokens" if self.packing else f"{self.sequences} sequences"
