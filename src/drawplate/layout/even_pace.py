"""Which of the blocks that layers send to host memory leave when, and when they come back: sizes in, blocks out.

What is sent leaves at an even pace over the whole forward and comes back at an even pace over the whole backward, so
that what else crosses the bus never waits behind a whole layer's activations. model/stream/host_activations.py copies
by it and planner/bytes/host_kept.py counts by it. How large a layer is that has not run yet is taken from those that
have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

KEEPS_TIME, AGAIN_TIME = 2, 3
"""How long backward takes with a layer that kept its activations, and with one that it computes again."""
LEAVING_LAYERS = 2
"""Layers beside whose forward a block leaves: the copies of one may take longer than it does."""


class BlockAt(NamedTuple):
    """A block by the layer that sent it and its number there."""

    layer: int
    number: int


class EvenPace:
    """The blocks of one micro-batch.

    Args:
        layers: of the model.
        on_host: those that send what they save, ascending.
        kept: those that keep it on the device.
    """

    def __init__(self, layers: int, on_host: Sequence[int], kept: Sequence[int]) -> None:
        self.on_host = tuple(on_host)
        self._last, self._keeps = layers - 1, {*on_host, *kept}
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._queue: list[BlockAt] = []
        self._back: set[BlockAt] = set()
        self._bytes_out = self._bytes_back = 0
        times = [KEEPS_TIME if layer in self._keeps else AGAIN_TIME for layer in range(layers)]
        self._after = [0, *accumulate(reversed(times[1:]))][::-1]  # of each layer, the time of those after it

    def sends(self, layer: int, sizes: Sequence[int]) -> None:
        """A layer has run, and these are the bytes of its blocks."""
        self._sizes[layer] = tuple(sizes)
        self._queue += [BlockAt(layer, number) for number in range(len(sizes))]

    def leaving(self, layer: int) -> list[BlockAt]:
        """The blocks that begin to leave at the end of a layer's forward; two layers later they have left, or at the
        end of the last one."""
        pace, found = self._expected * min(1.0, (layer + 1) / max(1, self._last - LEAVING_LAYERS + 1)), []
        while self._queue and (self._bytes_out < pace or layer == self._last):
            found.append(self._queue.pop(0))
            self._bytes_out += self._size(found[-1])
        return found

    def returning(self, layer: int) -> list[BlockAt]:
        """The blocks that begin to come back when backward comes to a layer: of as many layers as are through with what
        they kept, the last first."""
        through = sum(keeps > layer for keeps in self._keeps)
        pace, found = self._expected * self.over(layer), []
        for index in sorted(self._sizes, reverse=True)[:through]:
            for number in range(len(self._sizes[index])):
                block = BlockAt(index, number)
                if block not in self._back and self._bytes_back < pace:
                    found.append(block)
                    self.needed(block)
        return found

    def over(self, layer: int) -> float:
        """The share of the backward's time that is over when it comes to a layer: all of it at the second one, so that
        nothing is left for the first."""
        return min(1.0, self._after[layer] / max(1, self._after[min(1, self._last)]))

    def needed(self, block: BlockAt) -> bool:
        """Whether a block that backward asks for has yet to be brought back; from now on it has been."""
        if block in self._back:
            return False
        self._back.add(block)
        self._bytes_back += self._size(block)
        return True

    def _size(self, block: BlockAt) -> int:
        return self._sizes[block.layer][block.number]

    @property
    def _expected(self) -> float:
        return sum(map(sum, self._sizes.values())) / max(1, len(self._sizes)) * len(self.on_host)
