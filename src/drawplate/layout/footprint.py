"""What parts of a model do to memory, as numbers: measured by model/footprint, replayed by planner/bytes/replay.py.

A `Trace` is the order in which blocks of memory come and go while something runs; each block's size is a line in the
number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple


class Line(NamedTuple):
    """Bytes as a function of a micro-batch: `fixed + per_token * tokens + per_border * borders`.

    Borders are those between the documents of a packed row, whose number is rounded up to a power of two; attention's
    backward pads each document to 128 tokens.
    """

    fixed: float
    per_token: float
    per_border: float = 0.0

    def bytes(self, tokens: int, borders: int = 0) -> int:
        """For so many tokens and borders."""
        return int(self.fixed + self.per_token * tokens + self.per_border * borders)


Trace = tuple[tuple[str, Line | None], ...]
"""Blocks by name in the order in which they come (with their size) and go (None).

Names with a meaning: `out` is returned, `grad_in` is the gradient to the input, `grad:0` ... those to trained tensors.
`grad_out` is the gradient that comes in, where the part itself lets go of it.
`TRIAL` is what the compiler takes while it tries kernels, at the trace's highest moment, the first time alone.
"""

TRIAL = "trial"
INPUT = "in"
"""A part's input, which is in no trace of its own, among what is `saved`."""

SENT_FROM_BYTES = 2**20
"""Of a layer that keeps its activations in host memory, smaller blocks stay on the device: a copy of each costs more
than the room it makes."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a part of the model does to memory, beside its stored tensors and its input.

    Attributes:
        inference: a forward without gradients; ends with `out`.
        forward: one that is differentiated later; ends with `out` and what autograd keeps.
        backward: goes on from there; ends with the gradients.
        keeps_input: autograd keeps the input too.
        saved: what autograd keeps, in the order in which it does: blocks of `forward`, and INPUT.
        keys: trained linear layers, each of which has a dropout key per token.
    """

    inference: Trace = ()
    forward: Trace = ()
    backward: Trace = ()
    keeps_input: bool = True
    saved: tuple[str, ...] = ()
    keys: int = 0


class Mode(NamedTuple):
    """What a footprint depends on beside shapes.

    `stored` is the precision of weights that have to be dequantized, empty where they come in the compute dtype;
    `whole` says that this happens a layer at a time, before the layer's function is called. A layer's footprint has the
    traces of its `use` alone: `inference` without gradients, `kept` forward and backward, `again` the same where the
    layer is computed a second time for its backward.
    """

    device: str
    compute_dtype: str
    compiled: bool
    stored: str
    whole: bool
    dropout: bool
    packing: bool
    use: Literal["inference", "kept", "again"] = "inference"


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """A linear layer of a decoder layer; `rank` of its adapter, 0 for none; `again` if it is computed a second time
    where the layer's activations are not kept."""

    out_features: int
    in_features: int
    rank: int = 0
    again: bool = True


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A decoder layer in numbers.

    Attributes:
        linears: its linear layers, whose weights are stored in the plan's precision.
        plain: elements of every other frozen tensor (norms, biases), stored in the compute dtype.
        trained: elements of every trained tensor.
        footprints: by mode; may be measured only when asked for, which can take seconds.
        stand_ins: the same without measuring anything on a device; None where nothing is.
    """

    linears: tuple[LinearShape, ...]
    plain: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()
    footprints: Mapping[Mode, Footprint] = field(default_factory=dict)
    stand_ins: Mapping[Mode, Footprint] | None = None

    def unmeasured(self) -> LayerShape:
        """The same, for figures that are not worth a measurement."""
        return self if self.stand_ins is None else replace(self, footprints=self.stand_ins)
