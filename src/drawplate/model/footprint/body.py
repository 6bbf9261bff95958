"""What the body of a model does to memory outside of its decoder layers, from running it without data.

transformers' own forward runs with layers that do nothing: what it makes before the first (rotary tables, what all
layers share), what it hands to each layer, and the norm after the last, forward and backward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from drawplate.layout.footprint import Footprint, Mode, Trace
from drawplate.model.footprint.recorder import TRACED_BORDERS, TRACED_TOKENS, Recorder, Watch
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.support.walk import walked


def stand_in(mode: Mode) -> torch.device:
    """Where tensors without data stand in for the mode's device."""
    return torch.device("meta" if mode.device == "cuda" else "cpu")


class _Passage(nn.Module):
    """Stands in for a decoder layer: remembers what it was called with, and hands over what it was given to."""

    def __init__(self, layer: nn.Module, on_call: Callable[..., Tensor], extras: int | None) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.extras = extras
        self.on_call = on_call
        self.called_with: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.called_with = (args, kwargs)
        out = self.on_call(hidden, *args, **kwargs)
        return out if self.extras is None else (out, *[None] * self.extras)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "layer"), name)


@contextmanager
def _hollow(anatomy: Anatomy, on_call: Callable[..., Tensor]) -> Iterator[list[_Passage]]:
    """The body with layers that do nothing but call `on_call(index, hidden, ...)`, for a while."""
    layers = anatomy.skeleton.get_submodule(anatomy.layers_path)
    assert isinstance(layers, nn.ModuleList)
    kept, implementation = list(layers), anatomy.config._attn_implementation
    extras = walked(anatomy).extras
    passages = [_Passage(layer, functools.partial(on_call, i), extras[i]) for i, layer in enumerate(kept)]
    try:
        anatomy.config._attn_implementation = attention.NAME
        for i, passage in enumerate(passages):
            layers[i] = passage
        yield passages
    finally:
        anatomy.config._attn_implementation = implementation
        for i, layer in enumerate(kept):
            layers[i] = layer


def _run_body(anatomy: Anatomy, embedded: Tensor, mode: Mode, outside: dict[str, Tensor]) -> Tensor:
    """transformers' own forward of the body, as model/causal_lm.py calls it."""
    positions = torch.zeros(1, TRACED_TOKENS, dtype=torch.int64, device=embedded.device)
    inputs = {"inputs_embeds": embedded, "position_ids": positions, "use_cache": False, "return_dict": True}
    if anatomy.inputs_by_layer:
        rows = (1, TRACED_TOKENS, *anatomy.inputs_by_layer)
        inputs["per_layer_inputs"] = torch.zeros(rows, dtype=embedded.dtype, device=embedded.device)
    out = functional_call(anatomy.body, outside, (), inputs | _packing(embedded, mode))
    hidden: Tensor = out.last_hidden_state
    return hidden


def _outside_tensors(anatomy: Anatomy, mode: Mode, device: torch.device) -> dict[str, Tensor]:
    """The body's tensors outside of its layers."""
    layers = f"{anatomy.layers_path.rpartition('.')[2]}."
    return _tensors_of(
        ((name, tensor) for name, tensor in _named_tensors(anatomy.body) if not name.startswith(layers)), mode, device
    )


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _tensors_of(named: Iterable[tuple[str, Tensor]], mode: Mode, device: torch.device) -> dict[str, Tensor]:
    """Of the same shapes on a device: parameters in the mode's dtype, buffers in their own."""
    dtype = getattr(torch, mode.compute_dtype)
    return {
        name: torch.zeros(
            tensor.shape, dtype=dtype if isinstance(tensor, nn.Parameter) else tensor.dtype, device=device
        )
        for name, tensor in named
    }


def arguments_of(anatomy: Anatomy, index: int, hidden: Tensor, mode: Mode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the body passes to a layer, and what the layers before it leave there where they share state."""
    layers, leave = list(anatomy.layers), bool(walked(anatomy).obstacle)

    def on_call(i: int, passed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if leave and i < index:
            functional_call(
                layers[i], _tensors_of(_named_tensors(layers[i]), mode, hidden.device), (passed, *args), kwargs
            )
        return passed

    with _hollow(anatomy, on_call) as passages, torch.no_grad():
        _run_body(anatomy, hidden, mode, _outside_tensors(anatomy, mode, hidden.device))
    return passages[index].called_with


def measure_outer(anatomy: Anatomy, mode: Mode) -> tuple[Footprint, Footprint]:
    """What the body does before its first layer (all of it in `inference`, which holds what the layers share), and the
    norm after the last."""
    attention.register()
    with FakeTensorMode(allow_non_fake_inputs=True) if mode.device == "cpu" else nullcontext():
        outside = _outside_tensors(anatomy, mode, stand_in(mode))
        shape, dtype = (1, TRACED_TOKENS, anatomy.config.hidden_size), getattr(torch, mode.compute_dtype)
        embedded = torch.empty(shape, dtype=dtype, device=stand_in(mode))
        opening, inference, _, _ = _outer_traces(anatomy, mode, outside, embedded)
        with torch.enable_grad():
            _, forward, backward, kept = _outer_traces(anatomy, mode, outside, embedded, training=True)
    nothing = Footprint(inference=opening, forward=opening, backward=())
    return nothing, Footprint(inference=inference, forward=forward, backward=backward, keeps_input=kept)


def _outer_traces(
    anatomy: Anatomy, mode: Mode, outside: dict[str, Tensor], embedded: Tensor, *, training: bool = False
) -> tuple[Trace, Trace, Trace, bool]:
    """(before the first layer, after the last, backward of that, whether the last layer's output is kept)."""
    recorder, last = Recorder(), len(anatomy.layers) - 1
    marks: dict[str, Any] = {}
    watch = Watch(recorder, [*outside.values(), embedded])

    def on_call(index: int, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        if index == 0:
            marks["first"] = len(recorder.events)
        if index != last:
            return hidden
        leaf = torch.empty_like(hidden).requires_grad_(training)
        last_output = leaf * 1  # not a leaf: those are kept by autograd itself
        marks["input"] = {watch.block_of(leaf), watch.block_of(last_output)}
        marks["last"] = len(recorder.events)
        if training:
            edges.append(get_gradient_edge(last_output))
        kept.append(weakref.ref(last_output))
        return last_output

    edges: list[Any] = []
    kept: list[Any] = []
    with _hollow(anatomy, on_call), torch.set_grad_enabled(training), watch:
        out = _run_body(anatomy, embedded, mode, outside)
        names, turn = {watch.block_of(out): "out"}, len(recorder.events)
        keeps_input = kept[0]() is not None
        if training:
            gradient, incoming, not_its = _differentiated(watch, out, edges[0])
            names |= {watch.block_of(gradient): "grad_in", incoming: "grad_out"}
            marks["input"] |= not_its
        events = recorder.cut(0, None, names)
    first, start, beside = marks["first"], marks["last"], marks["input"]
    beside |= {name for name, _ in events[:first]}
    closing = [e for e in events[start:turn] if e[0] not in beside]
    backward = [e for e in events[turn:] if e[0] not in beside and (e[0] != "grad_out" or e[1] is None)]
    return events[:first], tuple(closing), tuple(backward), keeps_input


def _differentiated(watch: Watch, out: Tensor, edge: Any) -> tuple[Tensor, str, set[str]]:
    """Run backward from `out` to an edge -> the gradient that arrives there, the block of the one that came in, and the
    blocks that are only here: an operation more makes the one that comes in, or its caller would hold it to the end."""
    come: list[str] = []
    doubled, gradient = out * 2, torch.empty_like(out)
    out.grad_fn.register_prehook(lambda grads: come.append(watch.block_of(grads[0])))  # type: ignore[union-attr]
    arrived = torch.autograd.grad(doubled, edge, gradient)[0]
    return arrived, come[0], {watch.block_of(doubled), watch.block_of(gradient)}


def _packing(hidden: Tensor, mode: Mode) -> dict[str, Any]:
    if not mode.packing:
        return {}
    borders = torch.linspace(0, TRACED_TOKENS, TRACED_BORDERS, device=hidden.device).to(torch.int32)
    longest = {"max_length_q": TRACED_TOKENS, "max_length_k": TRACED_TOKENS}
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "segments": (0, TRACED_TOKENS), **longest}
