"""torch's caching allocator on paper: which addresses it would give, and so how much of the device it would reserve.

What a process holds and what its allocator has reserved differ by rounding and by gaps between blocks, by 1 to 20 %.
Gaps follow from the order in which blocks come and go, so they are found by replaying that order under the allocator's
rules (c10/cuda/CUDACachingAllocator.cpp, torch 2.11, expandable segments, one stream):

- a request is rounded up to 512 bytes; up to 1 MiB it comes from the small pool, else from the large one;
- it gets the smallest free block that is large enough, the lowest in address among equals, and what is left over of the
  block stays free;
- the free block at the end of a segment counts as if the segment were already as large as it can become;
- if none is large enough the segment grows, by 2 MiB (small pool) or 20 MiB (large pool) at a time;
- a block that is let go of joins its free neighbours.

Left out: other streams (they only copy here), and giving memory back.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from drawplate.units import MIB

ROUNDING = 512
LARGEST_SMALL = MIB
CACHE_LINE = 64
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
    """Blocks by name. `reserved` never shrinks."""

    def __init__(self) -> None:
        self.pools = {name: Pool(granule) for name, granule in GRANULE.items()}
        self._blocks: dict[object, tuple[Pool, int, int]] = {}
        self.allocated = 0

    @property
    def reserved(self) -> int:
        """Bytes taken of the device."""
        return sum(pool.reserved for pool in self.pools.values())

    def take(self, name: object, size: int) -> int:
        """A new block; returns its size."""
        rounded = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        pool = self.pools["small" if rounded <= LARGEST_SMALL else "large"]
        self._blocks[name] = (pool, pool.take(rounded), rounded)
        self.allocated += rounded
        return rounded

    def give(self, name: object) -> None:
        """The block of that name is let go of."""
        pool, start, size = self._blocks.pop(name)
        pool.give(start)
        self.allocated -= size

    def rename(self, old: object, new: object) -> None:
        """The block goes by another name."""
        self._blocks[new] = self._blocks.pop(old)


class PlainMemory:
    """A CPU's: what is let go of is gone, and nothing is rounded but to a cache line."""

    def __init__(self) -> None:
        self._blocks: dict[object, int] = {}
        self.allocated = 0

    @property
    def reserved(self) -> int:
        """What is held."""
        return self.allocated

    def take(self, name: object, size: int) -> int:
        """A new block; returns its size."""
        rounded = -(-size // CACHE_LINE) * CACHE_LINE
        self._blocks[name] = rounded
        self.allocated += rounded
        return rounded

    def give(self, name: object) -> None:
        """The block of that name is let go of."""
        self.allocated -= self._blocks.pop(name)

    def rename(self, old: object, new: object) -> None:
        """The block goes by another name."""
        self._blocks[new] = self._blocks.pop(old)
