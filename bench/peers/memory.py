"""What a process may hold of the card, and what it holds: the same count for every system.

A budget is a card of that size: it holds the allocator's memory and, beside it, CUDA's context, loaded kernels and
libraries. So the allocator's cap is the budget less what the driver counts for the process outside of it, taken anew
whenever steps begin, because the context grows as kernels are loaded. Where the driver does not count by process (some
containers) a typical context stands for it.
"""

from __future__ import annotations

import os

import torch

TYPICAL_CONTEXT_BYTES = 840 * 2**20
"""Of a process after compiled steps on an H100 (docs/log.md)."""


def process_device_bytes() -> int | None:
    """Device memory of this process, context included, as the driver counts it; None where it does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(0).uuid  # of the device this process sees, whatever its number
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
    except Exception:  # a figure beside the main one: its absence is recorded as null
        return None


def allocator_room(budget_bytes: int, process_bytes: int | None, reserved_bytes: int) -> int:
    """What of a budget is left to the allocator.

    >>> allocator_room(6000, process_bytes=1700, reserved_bytes=1000)
    5300
    """
    beside = TYPICAL_CONTEXT_BYTES if process_bytes is None else max(0, process_bytes - reserved_bytes)
    return max(1, budget_bytes - beside)


def cap_allocator(budget_bytes: int) -> int:
    """Let the allocator reserve what of the budget is its; returns those bytes."""
    torch.cuda.synchronize()
    room = allocator_room(budget_bytes, process_device_bytes(), torch.cuda.memory_reserved())
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    return room
