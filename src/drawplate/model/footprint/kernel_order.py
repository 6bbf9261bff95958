"""In which order the compiler runs a graph's kernels: of a few topological orders the one with the lowest peak.

torch's inductor estimates the peak of its own order and of three others (least memory first, breadth first, depth
first; torch/_inductor/memory.py, on by default as `reorder_for_peak_memory`) and takes the best. This is the same
choice over the kernels of model/footprint/compiled.py, because which blocks are held together follows from it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

Buffer = Hashable


@dataclass
class Job:
    """A kernel as the order sees it: bytes of what it writes, and what it reads.

    Attributes:
        index: its place in the order so far.
        writes: bytes of each buffer that it makes.
        reads: buffers made by others, and those inputs that can be let go of.
    """

    index: int
    writes: Mapping[Buffer, int]
    reads: frozenset[Buffer]
    before: set[int] = field(default_factory=set)
    after: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that it makes."""
        return sum(self.writes.values())


@dataclass
class Jobs:
    """All kernels of a graph, the sizes of the inputs that can be let go of, and what must stay."""

    jobs: Sequence[Job]
    inputs: Mapping[Buffer, int]
    outputs: frozenset[Buffer]

    def __post_init__(self) -> None:
        maker = {buffer: job.index for job in self.jobs for buffer in job.writes}
        self.sizes = {**self.inputs, **{b: size for job in self.jobs for b, size in job.writes.items()}}
        self.readers: dict[Buffer, list[int]] = {}
        for job in self.jobs:
            job.before = {maker[b] for b in job.reads if b in maker} - {job.index}
            for buffer in job.reads:
                self.readers.setdefault(buffer, []).append(job.index)
        for job in self.jobs:
            for i in sorted(job.before):
                self.jobs[i].after.append(job.index)

    def best_order(self) -> list[int]:
        """The order with the lowest estimated peak; the one so far among equals."""
        orders = [list(range(len(self.jobs))), self._least_memory(), self._breadth_first(), self._depth_first()]
        return min(orders, key=self._peak)

    def _peak(self, order: Sequence[int]) -> int:
        held = highest = sum(self.inputs.values())
        uses = {buffer: len(readers) for buffer, readers in self.readers.items()}
        for i in order:
            job = self.jobs[i]
            held += job.size
            highest = max(highest, held)
            for buffer in job.reads:
                uses[buffer] -= 1
                if uses[buffer] == 0 and buffer not in self.outputs:
                    held -= self.sizes[buffer]
            held -= sum(s for b, s in job.writes.items() if b not in self.readers and b not in self.outputs)
        return highest

    def _least_memory(self) -> list[int]:
        left = {buffer: len(readers) for buffer, readers in self.readers.items()}
        for buffer in self.outputs:
            left[buffer] = left.get(buffer, 0) + 1
        waiting = {job.index: len(job.before) for job in self.jobs}
        ready = [i for i, count in waiting.items() if count == 0]
        held = sum(self.inputs.values())
        highest = max(held, sum(self.sizes[b] for b in self.outputs if b in self.sizes))
        order: list[int] = []

        def freed(job: Job) -> int:
            unread = sum(size for buffer, size in job.writes.items() if left.get(buffer, 0) == 0)
            return unread + sum(self.sizes[buffer] for buffer in job.reads if left[buffer] == 1)

        def key(i: int) -> tuple[int, int, int]:
            job = self.jobs[i]
            return (job.size if job.size > highest - held else 0, job.size - freed(job), i)

        while ready:
            chosen = min(ready, key=key)
            ready.remove(chosen)
            order.append(chosen)
            job = self.jobs[chosen]
            held += job.size
            highest = max(highest, held)
            held -= freed(job)
            for buffer in job.reads:
                left[buffer] -= 1
            for i in job.after:
                waiting[i] -= 1
                if waiting[i] == 0:
                    ready.append(i)
        return order

    def _breadth_first(self) -> list[int]:
        place: dict[int, int] = {}
        waiting = {job.index: len(job.before) for job in self.jobs}
        ready: list[tuple[list[int], int]] = [([], i) for i, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        while ready:
            _, i = heapq.heappop(ready)
            place[i] = len(place)
            for j in self.jobs[i].after:
                waiting[j] -= 1
                if waiting[j] == 0:
                    heapq.heappush(ready, (sorted({place[k] for k in self.jobs[j].before}), j))
        return list(place)

    def _depth_first(self) -> list[int]:
        weight = {job.index: job.size + sum(self.sizes[b] for b in job.reads) for job in self.jobs}
        order: dict[int, None] = {}

        def visit(i: int) -> None:
            if i in seen:
                return
            seen.add(i)
            for j in sorted(self.jobs[i].before, key=lambda k: (weight[k], k)):
                visit(j)
            order[i] = None

        seen: set[int] = set()
        for i in sorted(weight, key=lambda k: (weight[k], k)):
            visit(i)
        return list(order)
