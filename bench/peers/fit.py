"""How many layers' activations fit into a budget: measured on two steps, then tried."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

SHARE_OF_ROOM = 0.95
PROBED_LAYERS = 2
STEP_BACK = 2


def fit_kept_layers(peer: Any, steps: Callable[[], Any], room: Callable[[], int]) -> int:
    """Set `peer.keep` to the most layers whose activations fit, and say how many.

    Args:
        peer: has `layers` and `keep(count)`.
        steps: takes two training steps.
        room: caps the allocator at what of the budget is its, so that a wrong guess shows, and says how much that is;
            asked once the first steps have loaded their kernels.

    Raises:
        torch.OutOfMemoryError: not even recomputing every layer fits.
    """

    def peak_bytes(count: int) -> int:
        peer.keep(count)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps()
        return torch.cuda.max_memory_allocated()

    none = peak_bytes(0)
    room_bytes = room()
    try:
        cost = max(peak_bytes(PROBED_LAYERS) - none, 1) / PROBED_LAYERS
    except torch.OutOfMemoryError:
        cost = room_bytes
    count = max(0, min(int((room_bytes * SHARE_OF_ROOM - none) / cost), peer.layers))
    while count > 0 and not _fits(peak_bytes, count):
        count = max(0, count - STEP_BACK)
    peer.keep(count)
    return count


def _fits(peak_bytes: Callable[[int], int], count: int) -> bool:
    try:
        peak_bytes(count)
    except torch.OutOfMemoryError:
        return False
    return True
