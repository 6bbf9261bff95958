"""Layers that keep their activations in host memory on paper, as model/host_activations.py does it.

    forward of such a layer    as of a kept one; its copy out begins when it has run
    end of its `due`           what it saved is let go of, but for blocks below SENT_FROM_BYTES
    backward at its `due`      its blocks come back, once as many layers are through with what they kept
    its backward               as of a kept one

Copies wait for each other on the bus, so layers are due at even distances. Left out: the time that copies take, which
is plan/cost.py's.
"""

from __future__ import annotations

from functools import lru_cache

from drawplate.footprints import SENT_FROM_BYTES, Footprint
from drawplate.plan.blocks import Name
from drawplate.plan.rows import Rows
from drawplate.plan.shape import DTYPE_BYTES, Choice, ModelShape
from drawplate.plan.stage import Stage, input_of

LINE = "activations on their way to host memory and back"
PLACE_BYTES = 256

_SENT: dict[tuple[int, int, int], tuple[Footprint, dict[str, int]]] = {}
_MOST_REMEMBERED = 4096
"""By the footprint's id; the footprint is kept, so that its id stays its own."""


def sent_blocks(part: Footprint, tokens: int, borders: int = 0) -> dict[str, int]:
    """Bytes by name of what a layer saves in its forward and sends to the host; its input is not among them.

    Remembered, because a search asks thousands of times."""
    key = (id(part), tokens, borders)
    if key not in _SENT:
        if len(_SENT) >= _MOST_REMEMBERED:
            _SENT.clear()
        saved: dict[str, int] = {}
        for name, line in part.forward:
            if line is None:
                saved.pop(name, None)
            else:
                saved[name] = line.bytes(tokens, borders)
        sent = {name: size for name, size in saved.items() if name != "out" and size >= SENT_FROM_BYTES}
        _SENT[key] = (part, sent)
    return _SENT[key][1]


def sent_input_bytes(part: Footprint, hidden_bytes: int) -> int:
    """Of a layer's input, where that is sent too; the first's is not, because the body's caller holds the embedding."""
    return hidden_bytes if part.keeps_input and hidden_bytes >= SENT_FROM_BYTES else 0


def due_of(layers: int, count: int) -> dict[int, int]:
    """For each layer whose activations are kept in host memory, at the end of whose forward they have left."""
    return {layer: max(layer, -(-(layer + 1) * layers // count) - 1) for layer in range(count)}


@lru_cache(maxsize=1024)
def leaving(layers: int, count: int) -> tuple[int, int]:
    """Of so many layers on the host, the most whose blocks are on the device during the forward of one of them, itself
    among them, and during that of the first layer after them."""
    due = due_of(layers, count)
    there = [sum(start <= now <= end for start, end in due.items()) for now in range(count + 1)]
    return max(there[:count], default=0), there[count]


@lru_cache(maxsize=1024)
def most_back(layers: int, count: int, kept: int) -> int:
    """Of so many layers on the host, the most whose blocks are on the device again during a backward, the last `kept`
    layers having kept theirs there."""
    due, most = due_of(layers, count), 0
    for now in range(layers):
        over = max(0, count - 1 - now)
        begun = min(min(kept, layers - 1 - now) + over, sum(end >= now for end in due.values()))
        most = max(most, begun - over, int(now < count))
    return most


class HostKept:
    """What these layers give and take of the device."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, stage.device
        layers, choice = stage.model.layers, stage.choice
        self._due = due_of(layers, choice.on_host(layers))
        self._keeps = [layer in self._due or layer >= layers - choice.kept_layers for layer in range(layers)]
        self._away: dict[int, dict[Name, int]] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._due

    def end_forward(self, layer: int, rows: Rows) -> None:
        """After the forward of any layer: those that are due by now have left."""
        for gone, due in self._due.items():
            if due == layer:
                self._away[gone] = self._sent(gone, rows)
                self.device.give_all(self._away[gone])

    def begin_backward(self, layer: int) -> None:
        """Before the backward of any layer: what is due and has room comes back, and its own."""
        through = sum(self._keeps[layer + 1 :])
        due = sum(due >= layer for due in self._due.values())
        for returning in sorted(self._due, reverse=True)[: min(through, due)]:
            self._bring_back(returning)
        self._bring_back(layer)

    def _bring_back(self, layer: int) -> None:
        for name, size in self._away.pop(layer, {}).items():
            self.device.take(LINE, name, size)

    def _sent(self, layer: int, rows: Rows) -> dict[Name, int]:
        part = self.stage.kinds[layer].footprints[self.stage.kept[layer]]
        blocks = sent_blocks(part, rows.tokens, rows.borders).items()
        sent: dict[Name, int] = {("layer", layer, name): size for name, size in blocks}
        hidden = sent_input_bytes(part, rows.tokens * self.stage.model.hidden * self.stage.size)
        return sent | ({input_of(layer): hidden} if layer and hidden else {})


def locked_bytes(model: ModelShape, choice: Choice, rows: Rows) -> int:
    """Page-locked host memory that all of them need, each block rounded up to 256 bytes."""
    total, hidden = 0, rows.tokens * model.hidden * DTYPE_BYTES[choice.compute_dtype]
    for layer in range(choice.on_host(model.layers)):
        part = model.kinds[model.kind_of_layer[layer]].footprints[choice.mode(choice.tier(layer), kept=True)]
        sizes = sent_blocks(part, rows.tokens, rows.borders).values()
        total += sum(-(-size // PLACE_BYTES) * PLACE_BYTES for size in sizes)
        total += sent_input_bytes(part, hidden) if layer else 0
    return total
