"""Where each stored tensor of a layer lies in one run of bytes, so that moving a layer is one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drawplate.layout.stored_linear import aligned


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies in its layer's run of bytes."""

    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerLayout:
    """The places of all stored tensors of a layer, in a run of `bytes` bytes; offsets are multiples of 256."""

    places: dict[str, TensorPlace]
    bytes: int

    @classmethod
    def of(cls, specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> LayerLayout:
        """A layout for tensors given as name -> (shape, dtype)."""
        places, offset = {}, 0
        for name, (shape, dtype) in specs.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            places[name] = TensorPlace(offset, size, tuple(shape), dtype)
            offset += aligned(size)
        return cls(places, offset)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a uint8 buffer of at least `bytes` bytes."""
        return {
            name: buffer[p.offset : p.offset + p.bytes].view(p.dtype).view(p.shape) for name, p in self.places.items()
        }
