"""A micro-batch where it is computed, in one of few shapes.

A compiled layer is made for one shape, and so is a captured micro-step: every new width of a row, number of segments
or longest segment costs seconds. So on a GPU rows are widened to one of `WIDTHS` widths, and the bounds on segments
only ever grow. What is added is padding: positions without a target, in a packed row a segment of its own.

Shapes: B rows, T positions of a row, N = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drawplate.data.batches import NOT_COUNTED, PADDING_SEQUENCE, Batch
from drawplate.layout.widths import FEWEST_BORDERS, SHORTEST_BOUND, WIDTHS, power_of_two, roomier

WIDTH_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """Tensors, and the numbers that the work's shape depends on.

    Attributes:
        ids_BT: int64.
        position_ids_BT: int64.
        targets_N: int64, flat.
        token_keys_BT: int32; None switches dropout off.
        borders: int32, the packed segments' borders; None for padded rows.
        longest: bound on a segment's length; 0 for padded rows.
        segments: the borders on the host, where no GPU is; () elsewhere.
        counted: tokens whose target counts, or more.
    """

    ids_BT: Tensor
    position_ids_BT: Tensor
    targets_N: Tensor
    token_keys_BT: Tensor | None
    borders: Tensor | None
    longest: int
    segments: tuple[int, ...]
    counted: int

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return len(self.targets_N)

    @property
    def attention(self) -> dict[str, Any]:
        """What attention needs to know of a packed row; nothing for padded ones, whose padding is on the right."""
        if self.borders is None:
            return {}
        both = {"cu_seq_lens_q": self.borders, "cu_seq_lens_k": self.borders}
        bounds = {"max_length_q": self.longest, "max_length_k": self.longest}
        return both | bounds | ({"segments": self.segments} if self.segments else {})

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for micro-batches that the same work serves."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in values)

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def copied(self) -> DeviceBatch:
        """The same in tensors of its own."""
        copies: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            copies[field.name] = value.clone() if isinstance(value, Tensor) else value
        return DeviceBatch(**copies)

    def roomier(self) -> DeviceBatch:
        """With `counted` rounded up to an eighth of the tokens, so that few shapes differ by it alone."""
        return replace(self, counted=roomier(self.counted, self.tokens))


@dataclass
class ShapeBounds:
    """The largest micro-batch so far; bounds of segments are powers of two.

    Attributes:
        width: positions of the widest row.
        longest: no segment is longer.
        borders: of packed rows, the first and the last included.
    """

    width: int = 0
    longest: int = SHORTEST_BOUND
    borders: int = FEWEST_BORDERS

    def fit(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """-> (the micro-batch in one of few shapes, its borders in a tensor of one length; None for padded rows)."""
        wide = self._widened(batch)
        if wide.cu_seqlens is None:
            return wide, None
        self.longest = max(self.longest, power_of_two(wide.max_seqlen))
        self.borders = max(self.borders, power_of_two(len(wide.cu_seqlens)))
        empty = wide.cu_seqlens[-1:].expand(self.borders - len(wide.cu_seqlens))
        return replace(wide, max_seqlen=self.longest), torch.cat([wide.cu_seqlens, empty])

    def _widened(self, batch: Batch) -> Batch:
        width = batch.input_ids_BT.shape[1]
        self.width = max(self.width, width)
        step = -(-self.width // (WIDTHS * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE
        more = min(self.width, -(-width // step) * step) - width
        if more == 0:
            return batch
        borders = batch.cu_seqlens
        positions_BT = F.pad(batch.position_ids_BT, (0, more))
        positions_BT[:, width:] = torch.arange(more)
        return replace(
            batch,
            input_ids_BT=F.pad(batch.input_ids_BT, (0, more)),
            targets_BT=F.pad(batch.targets_BT, (0, more), value=NOT_COUNTED),
            position_ids_BT=positions_BT,
            sequence_ids_BT=F.pad(batch.sequence_ids_BT, (0, more), value=PADDING_SEQUENCE),
            cu_seqlens=None if borders is None else torch.cat([borders, borders[-1:] + more]),
            max_seqlen=max(batch.max_seqlen, more) if borders is not None else width + more,
        )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On its way to the device; through page-locked memory, from which a copy need not be waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
