"""torch's caching allocator on paper: which addresses it would give, and so how much of the device it would reserve.

What a process holds and what its allocator has reserved differ by rounding and by gaps between blocks, by 1 to 20 %.
Gaps follow from the order in which blocks come and go, so they are found by replaying that order under the allocator's
rules (c10/cuda/CUDACachingAllocator.cpp, torch 2.11, expandable segments, one stream):

- a request is rounded up to 512 bytes; up to 1 MiB it comes from the small pool, else from the large one;
- it gets the smallest free block that is large enough, the lowest in address among equals, and what is left over of the
  block stays free;
- the free block at the end of a segment counts as if the segment were already as large as it can become;
- if none is large enough the segment grows, by 2 MiB (small pool) or 20 MiB (large pool) at a time;
- a block that is let go of joins its free neighbours;
- before a CUDA graph is captured, whatever part of a segment holds no block is given back, and the capture has pools of
  its own (model/graphed.py).

Left out: other streams (they only copy here), and where exactly a segment grows again after it was given back in parts.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from drawplate.units import KIB, MIB

ROUNDING = 512
LARGEST_SMALL = MIB
CACHE_LINE = 64
LARGEST_IN_HEAP = 32 * MIB
"""glibc's largest threshold (DEFAULT_MMAP_THRESHOLD_MAX), to which it rises as large blocks are let go of."""
HEAP_GRANULE = 128 * KIB
"""By how much the heap grows (DEFAULT_TOP_PAD)."""
GRANULE = {"small": 2 * MIB, "large": 20 * MIB}


class Pool:
    """One segment that grows: its free blocks, by size and by address."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.reserved = 0
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._used: dict[int, int] = {}

    @property
    def bytes_in_use(self) -> int:
        """Of the parts by which it grew, those that hold a block."""
        parts = {part for start, size in self._used.items() for part in self._parts(start, size)}
        return len(parts) * self.granule

    def _parts(self, start: int, size: int) -> range:
        return range(start // self.granule, (start + size - 1) // self.granule + 1)

    def take(self, size: int) -> int:
        """The address of a new block."""
        at = bisect_left(self._by_size, (size, 0))
        if at < len(self._by_size):
            found, start = self._by_size[at]
            last = self._start_of_end.get(self.reserved)
            if start == last and at + 1 < len(self._by_size):  # the last block could grow: the next larger goes first
                found, start = self._by_size[at + 1]
            self._remove(start)
        else:
            start = self._start_of_end.get(self.reserved, self.reserved)
            found = self.reserved - start
            if found:
                self._remove(start)
            grown = -(-(size - found) // self.granule) * self.granule
            self.reserved += grown
            found += grown
        if found > size:
            self._add(start + size, found - size)
        self._used[start] = size
        return start

    def give(self, start: int) -> None:
        """The block at an address is free again."""
        size = self._used.pop(start)
        after = self._size_at.get(start + size)
        if after is not None:
            self._remove(start + size)
            size += after
        before = self._start_of_end.get(start)
        if before is not None:
            size += self._size_at[before]
            self._remove(before)
            start = before
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of_end[start + size] = start

    def _remove(self, start: int) -> None:
        size = self._size_at.pop(start)
        del self._by_size[bisect_left(self._by_size, (size, start))]
        del self._start_of_end[start + size]


class CachingAllocator:
    """Blocks by name. `reserved` shrinks only when a capture begins.

    Attributes:
        pools: from which blocks are taken now.
        allocated: bytes of all blocks.
        highest_reserved: the most bytes reserved; whoever reads it may set it back.
    """

    def __init__(self) -> None:
        self.pools = _pools()
        self._beside: dict[str, Pool] = {}
        self._given_back = 0
        self._blocks: dict[object, tuple[Pool, int, int]] = {}
        self.allocated = self.highest_reserved = 0

    @property
    def reserved(self) -> int:
        """Bytes taken of the device; where parts were given back and are taken again, at least what is held."""
        return max(self.allocated, self._grown - self._given_back)

    @property
    def _grown(self) -> int:
        return sum(pool.reserved for pool in (*self.pools.values(), *self._beside.values()))

    def begin_capture(self) -> None:
        """What holds no block is given back, and blocks come from pools of the graph's own."""
        self._given_back = sum(pool.reserved - pool.bytes_in_use for pool in self.pools.values())
        self.pools, self._beside = _pools(), self.pools

    def end_capture(self) -> None:
        """The graph's pools keep what they have, but no new block comes from them."""
        self.pools, self._beside = self._beside, self.pools

    def forget_capture(self) -> None:
        """Whatever part of any pool holds no block is given back, where there was a capture."""
        if self._beside:
            kept = sum(pool.bytes_in_use for pool in (*self.pools.values(), *self._beside.values()))
            self._given_back = self._grown - kept

    def take(self, name: object, size: int) -> int:
        """A new block; returns its size."""
        rounded = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        pool = self.pools["small" if rounded <= LARGEST_SMALL else "large"]
        before = pool.reserved
        self._blocks[name] = (pool, pool.take(rounded), rounded)
        self.allocated += rounded
        if pool.reserved > before or self._given_back:
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


def _pools() -> dict[str, Pool]:
    return {name: Pool(granule) for name, granule in GRANULE.items()}


class ProcessMemory:
    """A process's own, as the C library's malloc keeps it (glibc): `reserved` is what the process holds.

    Blocks below `LARGEST_IN_HEAP` come from a heap that grows at its end; what is let go of in it stays with the
    process, and is used again where it is large enough. Larger ones are mapped, and gone when they are let go of.
    """

    def __init__(self) -> None:
        self._heap = Pool(HEAP_GRANULE)
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
        if rounded < LARGEST_IN_HEAP:
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
