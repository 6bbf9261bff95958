"""What recomputation keeps of a layer: its input, on the device or offloaded to page-locked host memory.

Offloading is hidden behind compute: the copy out runs on its own stream while the layer computes, and when backward takes
the input of layer i, the copy back of the one saved before it begins. Host buffers are reused by size. On a CPU the same
code copies plainly, so the path is tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SavedInput:
    """One saved tensor: on the device, or in a host buffer on its way out or back."""

    kept: Tensor | None = None
    host: Tensor | None = None
    out_event: torch.cuda.Event | None = None
    returning: Tensor | None = None
    back_event: torch.cuda.Event | None = None
    previous: SavedInput | None = field(default=None, repr=False)


class InputStore:
    """Saves layer inputs in forward order and gives them back in backward order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._last: SavedInput | None = None
        self.host_bytes = 0

    def put(self, hidden: Tensor, *, offload: bool) -> SavedInput:
        """Save a detached tensor; with `offload`, in host memory."""
        if not offload:
            return SavedInput(kept=hidden.detach())
        saved = SavedInput(host=self._buffer(hidden), previous=self._last)
        self._last = saved
        assert saved.host is not None
        if self._stream is None:
            saved.host.copy_(hidden)
            return saved
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            saved.host.copy_(hidden.detach(), non_blocking=True)
            saved.out_event = torch.cuda.Event()
            saved.out_event.record(self._stream)
        hidden.record_stream(self._stream)
        return saved

    def take(self, saved: SavedInput) -> Tensor:
        """The tensor that was put; the one put before it begins its way back."""
        if saved.kept is not None:
            return saved.kept
        self._begin_return(saved)
        if saved.previous is not None:
            self._begin_return(saved.previous)
        if self._last is saved:
            self._last = saved.previous
        assert saved.returning is not None
        assert saved.host is not None
        if saved.back_event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(saved.back_event)
            saved.returning.record_stream(stream)
        hidden, saved.returning = saved.returning, None
        self._spare[(saved.host.shape, saved.host.dtype)].append(saved.host)
        saved.host, saved.previous = None, None
        return hidden

    def forget(self) -> None:
        """Drop what was put and never taken (a forward without a backward)."""
        self._last = None

    def _begin_return(self, saved: SavedInput) -> None:
        if saved.returning is not None or saved.host is None:
            return
        if self._stream is None:
            saved.returning = saved.host.clone()
            return
        with torch.cuda.stream(self._stream):
            saved.returning = torch.empty_like(saved.host, device=self.device)
            saved.returning.copy_(saved.host, non_blocking=True)
            saved.back_event = torch.cuda.Event()
            saved.back_event.record(self._stream)

    def _buffer(self, like: Tensor) -> Tensor:
        spare = self._spare.setdefault((like.shape, like.dtype), [])
        if spare:
            return spare.pop()
        self.host_bytes += like.numel() * like.element_size()
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")
