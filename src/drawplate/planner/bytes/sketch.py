"""A decoder layer drawn from a model's sizes alone, for a plan without the module (tests, or a table of known models).

It keeps what autograd keeps of a Llama-like layer: two norms their input and a float32 copy, attention q, k, v and its
output, the feed-forward gate, up, their activation and product, each linear layer its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from drawplate.layout.footprint import Footprint, LayerShape, Line, LinearShape, Mode, Trace
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.shape import ModelShape


def kept_bytes_per_token_and_layer(model: ModelShape, dtype_bytes: int) -> int:
    """What autograd keeps of a Llama-like layer for one token, in bytes."""
    norms = 2 * (model.hidden * dtype_bytes + 2 * model.hidden * 4)
    attention = (2 * model.attention_width + 2 * model.hidden) * dtype_bytes
    feed_forward = (4 * model.intermediate + model.hidden) * dtype_bytes
    return norms + attention + feed_forward


def sketched(model: ModelShape) -> ModelShape:
    """The model with layers drawn from its sizes, where it has none; the same for the same model."""
    if model.kinds:
        return model
    if id(model) not in _SKETCHES:
        if len(_SKETCHES) >= MOST_SKETCHES:
            _SKETCHES.clear()
        _SKETCHES[id(model)] = (model, _sketch(model))
    return _SKETCHES[id(model)][1]


LINEARS = 7
MOST_SKETCHES = 64
_SKETCHES: dict[int, tuple[ModelShape, ModelShape]] = {}
"""By the model's id; the model is kept, so that its id stays its own."""


def _sketch(model: ModelShape) -> ModelShape:
    width = max(1, model.linear_parameters // model.layers // model.hidden)
    widths = [width // LINEARS] * (LINEARS - 1) + [width - width // LINEARS * (LINEARS - 1)]
    kind = LayerShape(
        linears=tuple(LinearShape(out_features=each, in_features=model.hidden) for each in widths),
        trained=(model.trained_parameters // model.layers,),
        footprints=_Drawn(model, inside=True),
    )
    outer = _Drawn(model, inside=False)
    return replace(model, kinds=(kind,), kind_of_layer=(0,) * model.layers, opening=_Nothing(), closing=outer)


class _Drawn(Mapping[Mode, Footprint]):
    def __init__(self, model: ModelShape, *, inside: bool) -> None:
        self.model, self.inside = model, inside
        self._made: dict[Mode, Footprint] = {}

    def __getitem__(self, mode: Mode) -> Footprint:
        if mode not in self._made:
            self._made[mode] = self._draw(mode)
        return self._made[mode]

    def _draw(self, mode: Mode) -> Footprint:
        model, size = self.model, DTYPE_BYTES[mode.compute_dtype]
        output = Line(0, model.hidden * size)
        kept = Line(0, kept_bytes_per_token_and_layer(model, size) if self.inside else 8 * model.hidden)
        weights = Line(model.linear_parameters / model.layers * size if self.inside and mode.stored else 0, 0)
        trained = Line(model.trained_parameters / model.layers * 4, 0)
        done: Trace = (("work", None), ("weights", None))
        work: Trace = (("weights", weights), ("work", kept), ("out", output), *done)
        forward: Trace = (("weights", weights), ("kept", kept), ("out", output))
        backward: Trace = (("grad_in", output), ("kept", None), ("weights", None))
        if not mode.whole:  # only while a product needs them
            forward = (*forward, ("weights", None))
            backward = (("weights", weights), *backward)
        if self.inside:
            backward = (("grad:0", trained), *backward)
        return Footprint(inference=work, forward=forward, backward=backward, keeps_input=self.inside)

    def __iter__(self) -> Iterator[Mode]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Nothing(_Drawn):
    def __init__(self) -> None:
        self._made = {}

    def _draw(self, mode: Mode) -> Footprint:
        return Footprint(inference=(), forward=(), backward=())
