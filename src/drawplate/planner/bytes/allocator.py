"""What an allocator has reserved beside the blocks that it gave: torch's on a device, the C library's on the host.

What a process holds and what its allocator has reserved differ by rounding and by gaps between blocks, by 1 to 20 %.
Gaps follow from the order in which blocks come and go, so they are found by replaying that order under the allocator's
rules, address by address (planner/bytes/addresses.py). torch's (expandable segments, one stream):

- a request is rounded up to 512 bytes; up to 1 MiB it comes from the small pool, else from the large one;
- where the cache is emptied (before a CUDA graph is captured, when graphs are dropped) whatever can be
  unmapped is;
- a capture has pools of its own (model/cuda_graphs.py).

Left out: other streams (they only copy here).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from drawplate.machine.heap import MAPPED_FROM_BYTES
from drawplate.planner.bytes.addresses import Addresses
from drawplate.units import KIB, MIB

ROUNDING = 512
LARGEST_SMALL = MIB
CACHE_LINE = 64
HEAP_GRANULE = 128 * KIB
"""By how much the heap grows (DEFAULT_TOP_PAD)."""
GRANULE = {"small": 2 * MIB, "large": 20 * MIB}


class CachingAllocator:
    """Blocks by name. `reserved` shrinks only when the cache is emptied.

    Attributes:
        pools: from which blocks are taken now.
        allocated: bytes of all blocks.
        highest_reserved: the most bytes reserved; whoever reads it may set it back.
    """

    def __init__(self) -> None:
        self.pools = _pools()
        self._outside: dict[str, Addresses] = {}  # a capture, while there is one
        self._captured: list[Addresses] = []
        self._blocks: dict[object, tuple[Addresses, int, int]] = {}
        self.allocated = self.highest_reserved = 0

    @property
    def reserved(self) -> int:
        """Bytes taken of the device."""
        return sum(pool.reserved for pool in self._all())

    def empty_cache(self) -> None:
        """Whatever part of any pool can be given back is."""
        for pool in self._all():
            pool.give_back()

    def begin_capture(self) -> None:
        """The cache is emptied, and blocks come from pools of the graph's own."""
        self.empty_cache()
        self.pools, self._outside = _pools(), self.pools

    def end_capture(self) -> None:
        """The graph's pools keep what they have, but no new block comes from them."""
        self._captured += self.pools.values()
        self.pools, self._outside = self._outside, {}

    def forget_capture(self) -> None:
        """The cache is emptied, where there was a capture."""
        if self._captured:
            self.empty_cache()

    def _all(self) -> Iterator[Addresses]:
        return chain(self.pools.values(), self._outside.values(), self._captured)

    def take(self, name: object, size: int) -> int:
        """A new block; returns its size."""
        rounded = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        pool = self.pools["small" if rounded <= LARGEST_SMALL else "large"]
        before = pool.reserved
        self._blocks[name] = (pool, pool.take(rounded), rounded)
        self.allocated += rounded
        if pool.reserved > before:
            self.highest_reserved = max(self.highest_reserved, self.reserved)
        return rounded

    def give(self, name: object) -> None:
        """The block of that name is let go of."""
        pool, start, size = self._blocks.pop(name)
        pool.give(start)
        self.allocated -= size

    def rename(self, old: object, new: object) -> None:
        """The block goes by another name."""
        self._blocks[new] = self._blocks.pop(old)


def _pools() -> dict[str, Addresses]:
    return {name: Addresses(granule) for name, granule in GRANULE.items()}


class ProcessMemory:
    """A process's own, as the C library's malloc keeps it (glibc): `reserved` is what the process holds.

    Blocks below `MAPPED_FROM_BYTES` (machine/heap.py) come from a heap that grows at its end. Freed, they stay with the
    process and are used again where they are large enough. Larger blocks are mapped, and gone when they are freed.
    """

    def __init__(self) -> None:
        self._heap = Addresses(HEAP_GRANULE)
        self._in_heap: dict[object, int] = {}
        self._sizes: dict[object, int] = {}
        self.allocated = self.highest_reserved = 0
        self._mapped_bytes = 0

    @property
    def reserved(self) -> int:
        """What is held, and what was and stays with the process."""
        return self._heap.reserved + self._mapped_bytes

    def take(self, name: object, size: int) -> int:
        """A new block; returns its size."""
        rounded = max(CACHE_LINE, -(-size // CACHE_LINE) * CACHE_LINE)
        if rounded < MAPPED_FROM_BYTES:
            self._in_heap[name] = self._heap.take(rounded)
        else:
            self._mapped_bytes += rounded
        self._sizes[name] = rounded
        self.allocated += rounded
        self.highest_reserved = max(self.highest_reserved, self.reserved)
        return rounded

    def give(self, name: object) -> None:
        """The block of that name is let go of."""
        size = self._sizes.pop(name)
        if name in self._in_heap:
            self._heap.give(self._in_heap.pop(name))
        else:
            self._mapped_bytes -= size
        self.allocated -= size

    def rename(self, old: object, new: object) -> None:
        """The block goes by another name."""
        self._sizes[new] = self._sizes.pop(old)
        if old in self._in_heap:
            self._in_heap[new] = self._in_heap.pop(old)
