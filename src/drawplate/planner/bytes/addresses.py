"""A run of addresses on paper: which of them a block would get, and how many of them are mapped to memory.

The rules are those of torch's expandable segments (c10/cuda/CUDACachingAllocator.cpp, torch 2.11: `get_free_block`,
`try_allocate_expandable_block`, `unmap_block`):

- addresses are mapped to memory in whole granules, as many as a request needs;
- a request gets the smallest free block that is large enough, the lowest in address among equals, and what is left over
  of the block stays free. A free block that unmapped addresses follow counts as if it were as large as they let it
  become, so the next larger ones go first;
- where none is large enough, the lowest run of free and unmapped addresses that is large enough is mapped;
- a block that is let go of joins its free neighbours;
- when they are given back, whole granules inside a free block are unmapped.

In 13 traces taken on an H100 every block got the address that this gives it
(bench/results/plan-calibration-h100.json).
"""

from __future__ import annotations

from bisect import bisect_left, insort

ENDLESS = 1 << 60
USED, FREE, UNMAPPED = range(3)


class _Block:
    """A run of addresses in one state, and its neighbours."""

    __slots__ = ("after", "before", "size", "start", "state")

    def __init__(self, start: int, size: int, state: int) -> None:
        self.start, self.size, self.state = start, size, state
        self.before: _Block | None = None
        self.after: _Block | None = None

    @property
    def can_become(self) -> int:
        """Bytes with the unmapped addresses behind it."""
        after = self.after
        return self.size + (after.size if after is not None and after.state == UNMAPPED else 0)


class Addresses:
    """One run of them, mapped by granules of so many bytes. `reserved` counts what is mapped."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.reserved = 0
        self._free: list[tuple[int, int]] = []
        self._unmapped: list[int] = []
        self._at: dict[int, _Block] = {}
        self._insert(_Block(0, ENDLESS, UNMAPPED))

    def take(self, size: int) -> int:
        """The address of a new block."""
        block = self._smallest_free(size) or self._mapped(size)
        self._remove(block)
        if block.size > size:
            self._cut(block, size, FREE)
        block.state = USED
        self._insert(block)
        return block.start

    def give(self, start: int) -> None:
        """The block at an address is free again."""
        block = self._at[start]
        block.state = FREE
        self._insert(self._joined(block))

    def give_back(self) -> None:
        """What can be unmapped is."""
        for _, start in list(self._free):
            block = self._at[start]
            low = -(-start // self.granule) * self.granule
            high = (start + block.size) // self.granule * self.granule
            if low >= high:
                continue
            self._remove(block)
            if high < start + block.size:
                self._cut(block, high - start, FREE)
            if low > start:
                rest = self._cut(block, low - start, UNMAPPED)
                self._insert(block)
                self._remove(rest)
                block = rest
            block.state = UNMAPPED
            self.reserved -= high - low
            self._insert(self._joined(block))

    def _smallest_free(self, size: int) -> _Block | None:
        free, at = self._free, bisect_left(self._free, (size, 0))
        if at == len(free):
            return None
        block = self._at[free[at][1]]
        while block.can_become > block.size and at + 1 < len(free):
            at += 1
            larger = self._at[free[at][1]]
            if larger.can_become >= block.can_become:
                break
            block = larger
        return block

    def _mapped(self, size: int) -> _Block:
        """The lowest run that has the room, mapped as far as it needs to be, as one free block."""
        block = next(found for start in self._unmapped if (found := self._run_from(start, size)))
        if block.state == UNMAPPED:
            block = self._map(block, size)
        while block.size < size:
            assert block.after is not None  # the run has the room, and what follows a free block of it is unmapped
            block = self._map(block.after, size - block.size)
        return block

    def _run_from(self, start: int, size: int) -> _Block | None:
        """The first block of a run with the room, from an unmapped one or the free one before it."""
        first = self._at[start]
        if first.before is not None and first.before.state == FREE:
            first = first.before
        room, block = 0, first
        while block is not None and block.state != USED and room < size:
            room += block.size
            block = block.after  # type: ignore[assignment]
        return first if room >= size else None

    def _map(self, block: _Block, size: int) -> _Block:
        """Map as much of an unmapped block -> the free block that it is part of then."""
        self._remove(block)
        count = min(block.size, -(-size // self.granule) * self.granule)
        if count < block.size:
            self._cut(block, count, UNMAPPED)
        block.state = FREE
        self.reserved += count
        joined = self._joined(block)
        self._insert(joined)
        return joined

    def _cut(self, block: _Block, size: int, state: int) -> _Block:
        """A block becomes so large; what follows is another, of that state -> the other."""
        rest = _Block(block.start + size, block.size - size, state)
        rest.before, rest.after, block.size = block, block.after, size
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        self._insert(rest)
        return rest

    def _joined(self, block: _Block) -> _Block:
        """A block that is in no list and its neighbours of the same state, as one, in no list."""
        for neighbour in (block.before, block.after):
            if neighbour is None or neighbour.state != block.state:
                continue
            self._remove(neighbour)
            first, second = (neighbour, block) if neighbour.start < block.start else (block, neighbour)
            first.size += second.size
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            self._at.pop(second.start, None)
            block = first
        return block

    def _insert(self, block: _Block) -> None:
        self._at[block.start] = block
        if block.state == FREE:
            insort(self._free, (block.size, block.start))
        elif block.state == UNMAPPED:
            insort(self._unmapped, block.start)

    def _remove(self, block: _Block) -> None:
        if block.state == FREE:
            del self._free[bisect_left(self._free, (block.size, block.start))]
        elif block.state == UNMAPPED:
            del self._unmapped[bisect_left(self._unmapped, block.start)]
