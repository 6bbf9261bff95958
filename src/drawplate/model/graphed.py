"""Whole micro-steps as CUDA graphs: forward, loss and backward of one shape, launched at once.

A micro-step issues some 2,000 kernels, and below 8,000 tokens or so the host takes longer to issue them than the GPU to
run them. A shape runs once as always (which compiles and warms up what has to be), is captured when it comes again,
and replayed from then on. What differs between replays (ids, positions, targets, borders, dropout keys, the loss's
scale) is copied into the tensors that the graph reads; gradients are added to buffers that do not move.

Memory: a graph keeps what a micro-step allocates at its peak, in a pool that all graphs share. Nothing else ever adds
to it: a shape not seen before gives the pool back before it runs, a shape larger than those captured too, and whoever
needs memory for something else (evaluation) calls `forget()`. Capturing again costs little more than a micro-step.

Only where nothing of a micro-step depends on the host: every layer and the head on the device, no offloaded inputs.
Activations that lie in host memory are copied on streams that part and meet again within the step. Left out: graphs for
evaluation; streamed layers, whose capture was tried (docs/log.md).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drawplate.model.adapter import Adapter
from drawplate.model.device_batch import DeviceBatch

MOST_GRAPHS = 16

Step = Callable[[DeviceBatch, Tensor], tuple[Tensor, Tensor]]
"""(micro-batch, scale) -> (loss, nats of each token)."""


class GraphedSteps:
    """Runs micro-steps of one model and adds their gradients.

    The life of a shape::

        new --(run: drop all graphs, launch)--> known --(run: capture, replay)--> captured --(run: replay)--> captured
         ^                                        ^                                  |
         +-----------------(forget)---------------+---------(graphs dropped)---------+

    Args:
        step: forward and loss.
        adapter: what is trained; the `grad` of its tensors must be buffers that stay (`Adapter.zero_gradients`).
        settle: called when a step has been issued, so that all its streams come together again.
    """

    def __init__(self, step: Step, adapter: Adapter, settle: Callable[[], None]) -> None:
        self._step, self._adapter, self._settle = step, adapter, settle
        self._parameters = adapter.parameters()
        self._known: set[object] = set()
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None
        self._gradients_at: int | None = None
        self.replays, self.refused = 0, ""

    def run(self, batch: DeviceBatch, scale: float) -> Tensor:
        """Add the gradients of `scale` times the nats; returns the sum of nats in float64, good until the next call."""
        batch = batch.roomier()
        if self._gradients_at != _gradient(self._parameters[0]).data_ptr():
            self._drop()
            self._gradients_at = _gradient(self._parameters[0]).data_ptr()
        if batch.shape not in self._known:
            self._drop()
            nats = self._add_gradients(batch, torch.full((), scale, device=batch.targets_N.device))
            self._known.add(batch.shape)
            return nats
        if batch.shape not in self._graphs and not self._capture(batch):
            return self._add_gradients(batch, torch.full((), scale, device=batch.targets_N.device))
        self.replays += 1
        return self._graphs[batch.shape].replay(batch, scale)

    def forget(self) -> None:
        """Give the graphs' memory back, and begin anew: how a step is done may be about to change."""
        self._known.clear()
        self._drop()

    def _drop(self) -> None:
        if self._graphs:
            # A replay may be running, on another stream than the one the allocator knows its memory by.
            torch.cuda.synchronize()
            self._graphs.clear()
            self._pool = None
            torch.cuda.empty_cache()

    def _capture(self, batch: DeviceBatch) -> bool:
        """Whether it could be captured: an architecture that waits for the device in its forward cannot."""
        if self.refused:
            return False
        tokens = [graph.batch.tokens for graph in self._graphs.values()]
        if len(tokens) == MOST_GRAPHS or (tokens and batch.tokens > max(tokens)):
            self._drop()  # the largest goes first: smaller ones then fit into its memory
        graph = _Graph(batch.copied(), torch.ones((), device=batch.targets_N.device), torch.cuda.CUDAGraph())
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        why, out_of_memory = self._record(graph)
        if not why:
            self._graphs[batch.shape] = graph
            return True
        del graph
        gc.collect()  # what the step had made lies in cycles, and in the graphs' pool
        torch.cuda.empty_cache()
        if out_of_memory:
            raise torch.OutOfMemoryError(why)
        self.refused = why.partition("\n")[0]
        warnings.warn(f"Micro-steps are launched kernel by kernel: capture failed ({self.refused}).", stacklevel=2)
        return False

    def _record(self, graph: _Graph) -> tuple[str, bool]:
        """What of torch went wrong, empty for nothing, and whether memory was short. Whatever else ended the step is
        raised: the end of a capture that was broken off has a complaint of its own, which would hide it."""
        cause: BaseException | None = None
        try:
            with torch.cuda.graph(graph.graph, pool=self._pool):  # empties the allocator's cache first
                try:
                    graph.nats = self._add_gradients(graph.batch, graph.scale)
                except BaseException as error:
                    cause = error
                    raise
        except RuntimeError as error:
            cause = cause or error
            if not isinstance(cause, RuntimeError):
                raise cause from None
            return str(cause) or type(cause).__name__, isinstance(cause, torch.OutOfMemoryError)
        return "", False

    def _add_gradients(self, batch: DeviceBatch, scale: Tensor) -> Tensor:
        with self._adapter.aliased() as leaves:
            loss, nats_N = self._step(batch, scale)
            # A module that its layer never calls leaves its adapter unused.
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        self._settle()
        pairs = [(_gradient(p), g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])
        return nats_N.sum(dtype=torch.float64)


@dataclass
class _Graph:
    """What one graph reads, and what it leaves."""

    batch: DeviceBatch
    scale: Tensor
    graph: torch.cuda.CUDAGraph
    nats: Tensor | None = None

    def replay(self, batch: DeviceBatch, scale: float) -> Tensor:
        for own, given in zip(self.batch.tensors(), batch.tensors(), strict=True):
            own.copy_(given)
        self.scale.fill_(scale)
        self.graph.replay()
        assert self.nats is not None
        return self.nats


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "call Adapter.zero_gradients before the first micro-step"
    return parameter.grad
