"""Blocks of memory as torch's own allocator reports them, while something runs with data.

A GPU's allocator keeps a history of what it hands out (torch.cuda.memory); a CPU's is reported to torch's profiler.
Both give each block's address and size in the order in which blocks come and go. What a layer does to memory is taken
from there, so that it is known of compiled layers too, whatever the compiler's version makes of them.

Left out: what kernels take past torch's allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from drawplate.model.footprint.recorder import Recorder, Sizes

MOST_EVENTS = 200_000
"""Of one recording; a decoder layer makes some hundreds."""
TAKEN, LET_GO = "alloc", "free_completed"
"""What torch calls these in its history."""


class AllocatorEvent(NamedTuple):
    """A block is handed out (`size` above 0, in bytes) or comes back."""

    address: int
    size: int


@contextmanager
def recorded(device: torch.device) -> Iterator[list[AllocatorEvent]]:
    """Whatever the allocator does within, in order; the list is filled at the end.

    Args:
        device: whose allocator.
    """
    events: list[AllocatorEvent] = []
    yield from _of_gpu(device, events) if device.type == "cuda" else _of_cpu(events)


def _of_gpu(device: torch.device, events: list[AllocatorEvent]) -> Iterator[list[AllocatorEvent]]:
    memory = torch.cuda.memory
    memory._record_memory_history("all", None, "python", MOST_EVENTS, clear_history=True)
    try:
        yield events
        history = memory._snapshot(device)["device_traces"]
    finally:
        memory._record_memory_history(None)
    index = torch.cuda.current_device() if device.index is None else device.index
    for entry in history[index]:
        if entry["action"] in (TAKEN, LET_GO):
            events.append(AllocatorEvent(entry["addr"], entry["size"] if entry["action"] == TAKEN else 0))


def _of_cpu(events: list[AllocatorEvent]) -> Iterator[list[AllocatorEvent]]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield events
    found, waiting = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    events += [AllocatorEvent(address, max(0, size)) for _, address, size in sorted(found)]


class RealWatch:
    """Records a run's blocks, in one stretch or several; between them nothing may come or go.

    Args:
        recorder: is given the blocks at the end of each stretch.
        device: where it runs.
        sizes: how a block's bytes grow with the micro-batch.
    """

    def __init__(self, recorder: Recorder, device: torch.device, sizes: Sizes) -> None:
        self.recorder, self.device, self.sizes = recorder, device, sizes
        self._names: dict[int, str] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One stretch."""
        with recorded(self.device) as events:
            yield
        for address, size in events:
            if size:
                self._names[address] = self.recorder.take(self.sizes.line_of(size))
            elif address in self._names:
                self.recorder.give(self._names.pop(address))

    def know(self, *tensors: Tensor) -> None:
        """These were there before: what comes within no stretch has no name anyway."""

    def key_of(self, tensor: Tensor) -> int:
        """By which its block is known as long as it is there."""
        return tensor.untyped_storage().data_ptr()

    def name_of(self, key: int) -> str:
        """The block, at the end of a stretch; empty for one that was there before."""
        return self._names.get(key, "")
