"""What recomputation keeps of a layer: its input, on the device or offloaded to page-locked host memory.

Offloading is hidden behind compute. The copy out of a layer's input runs on its own stream while the layer computes;
the next `put` makes the compute stream wait for it before the memory can be used again, so no block is held back from
the allocator (`record_stream` would hold back one per layer, because the host runs far ahead of the device). The way
back uses two fixed buffers in turn: while backward works on one, the input of the layer before it arrives in the
other. On a CPU the same code copies plainly, so the path is tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drawplate.layout.buffers import RETURN_BUFFERS
from drawplate.model.base.arena import private_bytes

WITHOUT = "memory.activations: recompute"
"""What needs no page-locked memory for activations."""


@dataclass
class SavedInput:
    """One saved tensor: on the device, or in host memory, in a `block` of bytes, on its way out or back."""

    kept: Tensor | None = None
    host: Tensor | None = None
    block: Tensor | None = None
    returning: int | None = None
    back_event: torch.cuda.Event | None = None
    previous: SavedInput | None = field(default=None, repr=False)


class InputStore:
    """Saves layer inputs in forward order and gives them back in backward order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: list[Tensor] = []
        self._last: SavedInput | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._return_buffers: list[Tensor] = []
        self._next_buffer = 0
        self._copying = False  # since the last `settle`
        self.host_bytes = 0

    def put(self, hidden: Tensor, *, offload: bool) -> SavedInput:
        """Save a detached tensor; with `offload`, in host memory."""
        if not offload:
            return SavedInput(kept=hidden.detach())
        block = self._host_block(hidden.nbytes)
        host = block[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        self._last = saved = SavedInput(host=host, block=block, previous=self._last)
        if self._stream is None:
            host.copy_(hidden)
            return saved
        self.let_leave()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._copying = True
        with torch.cuda.stream(self._stream):
            host.copy_(hidden.detach(), non_blocking=True)
            gone = torch.cuda.Event()
            gone.record(self._stream)
        self._leaving = (hidden.detach(), gone)
        return saved

    def let_leave(self) -> None:
        """Work queued from now on waits for the copy that is on its way out; its tensor is let go."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def expect(self) -> None:
        """Backward will soon ask for what was put last: it begins its way back."""
        if self._last is not None:
            self.let_leave()
            self._begin_return(self._last)

    def take(self, saved: SavedInput) -> Tensor:
        """The tensor that was put, good until the second `take` after this one; the one put before it begins its way
        back."""
        if saved.kept is not None:
            return saved.kept
        self.let_leave()
        self._begin_return(saved)
        if self._stream is not None:
            assert saved.back_event is not None
            torch.cuda.current_stream(self.device).wait_event(saved.back_event)
        if saved.previous is not None:
            self._begin_return(saved.previous)
        if self._last is saved:
            self._last = saved.previous
        assert saved.returning is not None
        assert saved.block is not None
        self._spare.append(saved.block)
        saved.host, saved.block, saved.previous = None, None, None
        return self._return_buffers[saved.returning]

    def forget(self) -> None:
        """Drop what was put and never taken (a forward without a backward)."""
        while self._last is not None:
            if self._last.block is not None:
                self._spare.append(self._last.block)
            self._last = self._last.previous
        if self._leaving is not None:
            self.let_leave()

    def settle(self) -> None:
        """Let the current stream wait for all copies; the device buffers are made anew. After a backward."""
        if self._copying and self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._copying, self._leaving, self._return_buffers = False, None, []

    def _begin_return(self, saved: SavedInput) -> None:
        if saved.returning is not None or saved.host is None:
            return
        saved.returning = self._next_buffer
        self._next_buffer = (self._next_buffer + 1) % RETURN_BUFFERS
        buffer = self._return_buffer(saved.returning, saved.host)
        if self._stream is None:
            buffer.copy_(saved.host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever used the buffer before is queued
        with torch.cuda.stream(self._stream):
            buffer.copy_(saved.host, non_blocking=True)
            saved.back_event = torch.cuda.Event()
            saved.back_event.record(self._stream)

    def _return_buffer(self, index: int, like: Tensor) -> Tensor:
        """One of the two device buffers, made anew when micro-batches change their shape."""
        buffers = self._return_buffers
        if not buffers or buffers[index].shape != like.shape or buffers[index].dtype != like.dtype:
            if self._stream is not None and buffers:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._return_buffers = [torch.empty_like(like, device=self.device) for _ in range(RETURN_BUFFERS)]
        return self._return_buffers[index]

    def _host_block(self, size: int) -> Tensor:
        """The smallest spare block that is large enough, whatever shape it was used for before, or a new one.

        The largest micro-batch of a run comes first, in the rehearsal, so all others fit into its blocks."""
        fitting = [i for i, block in enumerate(self._spare) if block.numel() >= size]
        if fitting:
            return self._spare.pop(min(fitting, key=lambda i: self._spare[i].numel()))
        self.host_bytes += size
        return private_bytes(size, pinned=self.device.type == "cuda", without=WITHOUT)
