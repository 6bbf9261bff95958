"""A layer's run without gradients, and its forward and backward, as traces of the blocks that come and go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from drawplate.layout.footprint import INPUT, Footprint, Trace
from drawplate.model.footprint.recorder import Recorder, Watch
from drawplate.model.footprint.trial import Trial
from drawplate.model.layer.functions import functions

Function = Callable[..., Any]
"""A layer's, as model/layer/functions.py makes it."""


class Watching(Protocol):
    """Records the blocks of a run, stretch by stretch."""

    recorder: Recorder

    def __call__(self) -> AbstractContextManager[Any]:
        """One stretch."""

    def know(self, *tensors: Tensor) -> None:
        """These were there before."""

    def key_of(self, tensor: Tensor) -> int:
        """By which its block is known as long as it is there."""

    def name_of(self, key: int) -> str:
        """The block, at the end of a stretch; empty for one that was there before."""


def uncompiled_footprint(trial: Trial) -> Footprint:
    """Of a layer as transformers wrote it, run without data."""
    (function,) = functions([trial.layer])
    watch = Watch(Recorder(), [*trial.given, trial.hidden])
    if trial.mode.use == "inference":
        return Footprint(inference=inference_pass(trial, function, watch), keys=trial.dropout_keys)
    return training_pass(trial, function, watch)


def inference_pass(trial: Trial, function: Function, watch: Watching) -> Trace:
    """Without gradients; ends with `out`."""
    with torch.no_grad():
        with watch():
            out = trial.call(function, trial.hidden)
        return watch.recorder.cut(0, None, {watch.name_of(watch.key_of(out)): "out"})


def training_pass(trial: Trial, function: Function, watch: Watching) -> Footprint:
    """Forward and backward; of a layer that is computed again, the output is let go of between them."""
    recorder, saved, again = watch.recorder, dict[int, None](), trial.mode.use == "again"
    trained = [tensor.requires_grad_() for tensor in trial.trained.values()]
    leaf, grad_out = torch.zeros_like(trial.hidden).requires_grad_(), torch.zeros_like(trial.hidden)
    watch.know(leaf, grad_out)

    def see(tensor: Tensor) -> Tensor:
        saved[watch.key_of(tensor)] = None
        return tensor

    with watch():
        hidden = leaf * 1  # not a leaf: those are kept by autograd itself
    edge, key_in, block_in = get_gradient_edge(hidden), watch.key_of(hidden), watch.name_of(watch.key_of(hidden))
    start = len(recorder.events)
    with watch():
        with saved_tensors_hooks(see, lambda tensor: tensor):
            out = trial.call(function, hidden)
        end, key_out = get_gradient_edge(out), watch.key_of(out)
        del hidden
        if again:
            del out
    turn = len(recorder.events)
    kept = [INPUT if key == key_in else watch.name_of(key) for key in saved]
    names = {watch.name_of(key_out): "out"} if not again or key_out in saved else {}
    with watch():
        # A module that its layer never calls leaves its adapter unused.
        grad_in, *gradients = torch.autograd.grad(end, [edge, *trained], grad_out, allow_unused=True)  # type: ignore[arg-type]
    blocks = [watch.name_of(watch.key_of(g)) if g is not None else "" for g in gradients]
    names |= {block: f"grad:{i}" for i, block in enumerate(blocks) if block}
    names[watch.name_of(watch.key_of(grad_in))] = "grad_in"
    forward, backward = (
        tuple(event for event in recorder.cut(begin, stop, names) if event[0] != block_in)
        for begin, stop in ((start, turn), (turn, None))
    )
    return Footprint(
        forward=forward,
        backward=backward,
        keeps_input=(block_in, None) not in recorder.events[:turn],
        saved=tuple(names.get(block, block) for block in kept if block),
        keys=trial.dropout_keys,
    )
