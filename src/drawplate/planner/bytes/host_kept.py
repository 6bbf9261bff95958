"""Layers that keep their activations in host memory on paper, as model/stream/host_activations.py does it.

    forward of such a layer      as of a kept one; what it saved queues up, but for blocks below SENT_FROM_BYTES
    end of any layer's forward   what began to leave two layers before is let go of, and the next share begins
    backward of any layer        the next share comes back, of layers for which others made room
    its own backward             as of a kept one

layout/even_pace.py says which blocks a share are. Left out: the time that copies take, which is
planner/seconds/cost.py's.
"""

from __future__ import annotations

from functools import lru_cache

from drawplate.layout.even_pace import LEAVING_LAYERS, BlockAt, EvenPace
from drawplate.layout.footprint import INPUT, SENT_FROM_BYTES, Footprint
from drawplate.layout.stored_linear import DTYPE_BYTES, aligned
from drawplate.planner.bytes.batch_rows import Rows
from drawplate.planner.bytes.blocks import Name
from drawplate.planner.bytes.stage import Stage, input_of
from drawplate.planner.shape import Choice, ModelShape

LINE = "activations on their way to host memory and back"

_SENT: dict[tuple[int, int, int, int], tuple[Footprint, dict[str, int]]] = {}
_MOST_REMEMBERED = 4096
"""By the footprint's id; the footprint is kept, so that its id stays its own."""


def sent_blocks(part: Footprint, tokens: int, borders: int = 0, hidden_bytes: int = 0) -> dict[str, int]:
    """Bytes by name of what a layer saves in its forward and sends to the host, in the order in which it is saved.

    Its input is among them where it has `hidden_bytes` and is saved; the first layer's is not sent, because the body's
    caller holds the embedding. Remembered, because a search asks thousands of times."""
    key = (id(part), tokens, borders, hidden_bytes)
    if key not in _SENT:
        if len(_SENT) >= _MOST_REMEMBERED:
            _SENT.clear()
        saved: dict[str, int] = {}
        for name, line in part.forward:
            if line is None:
                saved.pop(name, None)
            else:
                saved[name] = line.bytes(tokens, borders)
        saved |= {INPUT: hidden_bytes} if part.keeps_input else {}
        order = {name: place for place, name in enumerate(dict.fromkeys(part.saved))}
        names = sorted(saved, key=lambda name: order.get(name, len(order)))
        sent = {name: saved[name] for name in names if name != "out" and saved[name] >= SENT_FROM_BYTES}
        _SENT[key] = (part, sent)
    return _SENT[key][1]


@lru_cache(maxsize=4096)
def due_back(layers: int, count: int, kept: int) -> float:
    """Of so many layers on the host, those whose blocks are to be back before backward reaches the first of them, the
    last `kept` layers having kept theirs on the device."""
    return count * EvenPace(layers, range(count), range(layers - kept, layers)).over(count - 1) if count else 0.0


@lru_cache(maxsize=4096)
def leaving(layers: int, count: int, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Of so many layers on the host, with blocks of such sizes, the most bytes on the device during the forward of one
    of them, its own not counted, during that of the first layer after them, and during that of the model's last."""
    pace, left, there, found = EvenPace(layers, range(count), ()), [0] * LEAVING_LAYERS, 0, []
    for layer in range(layers):
        found.append(there)  # what has not left by the end of the layer before
        if layer < count:
            pace.sends(layer, sizes)
            there += sum(sizes)
        left.append(sum(sizes[block.number] for block in pace.leaving(layer)))
        there -= left[layer]
    after = found[count] if count < layers else there
    return max(found[:count], default=0), after, found[-1]


@lru_cache(maxsize=4096)
def most_back(layers: int, count: int, kept: int, sizes: tuple[int, ...]) -> int:
    """Of such layers, the most bytes that are on the device again during a backward, the last `kept` layers having kept
    theirs there."""
    pace, there, most = EvenPace(layers, range(count), range(layers - kept, layers)), 0, 0
    for layer in range(count):
        pace.sends(layer, sizes)
    for layer in reversed(range(layers)):
        there += sum(sizes[block.number] for block in pace.returning(layer))
        if layer < count:
            there += sum(size for number, size in enumerate(sizes) if pace.needed(BlockAt(layer, number)))
        most = max(most, there)
        there -= sum(sizes) if layer < count else 0
    return most


class HostKept:
    """What these layers give and take of the device."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, stage.device
        self._layers, self._count = stage.model.layers, stage.choice.on_host(stage.model.layers)
        self._begin()

    def _begin(self) -> None:
        """A new micro-batch."""
        kept = range(self._layers - self.stage.choice.kept_layers, self._layers)
        self._pace = EvenPace(self._layers, range(self._count), kept)
        self._sent: dict[int, list[tuple[Name, int]]] = {}
        self._leaving: list[list[Name]] = []

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and layer < self._count

    def end_forward(self, layer: int, rows: Rows) -> None:
        """After the forward of any layer."""
        if layer == 0:
            self._begin()
        if layer in self:
            self._sent[layer] = self._sent_by(layer, rows)
            self._pace.sends(layer, [size for _, size in self._sent[layer]])
        self._let_go(LEAVING_LAYERS - 1)
        self._leaving.append([self._sent[at.layer][at.number][0] for at in self._pace.leaving(layer)])
        if layer == self._layers - 1:
            self._let_go()

    def begin_backward(self, layer: int) -> None:
        """Before the backward of any layer: what is due and has room comes back, and all of its own."""
        own = [BlockAt(layer, number) for number in range(len(self._sent.get(layer, ())))]
        for at in [*self._pace.returning(layer), *filter(self._pace.needed, own)]:
            self.device.take(LINE, *self._sent[at.layer][at.number])

    def _let_go(self, but: int = 0) -> None:
        while len(self._leaving) > but:
            self.device.give_all(self._leaving.pop(0))

    def _sent_by(self, layer: int, rows: Rows) -> list[tuple[Name, int]]:
        part = self.stage.kinds[layer].footprints[self.stage.kept[layer]]
        hidden = rows.tokens * self.stage.model.hidden * self.stage.size if layer else 0
        blocks = sent_blocks(part, rows.tokens, rows.borders, hidden).items()
        return [(input_of(layer) if name == INPUT else ("layer", layer, name), size) for name, size in blocks]


def locked_bytes(model: ModelShape, choice: Choice, rows: Rows) -> int:
    """Page-locked host memory that all of them need, each block rounded up to 256 bytes."""
    total, hidden = 0, rows.tokens * model.hidden * DTYPE_BYTES[choice.compute_dtype]
    for layer in range(choice.on_host(model.layers)):
        part = model.kinds[model.kind_of_layer[layer]].footprints[choice.mode(choice.tier(layer), "kept")]
        sizes = sent_blocks(part, rows.tokens, rows.borders, hidden if layer else 0).values()
        total += sum(aligned(size) for size in sizes)
    return total
