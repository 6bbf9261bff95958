"""Whole micro-steps as CUDA graphs: forward, loss and backward of one shape, launched at once.

A micro-step issues some 2,000 kernels, and below 8,000 tokens or so the host takes longer to issue them than the GPU to
run them. A shape runs once as always (which compiles and warms up what has to be), is captured when it comes again,
and replayed from then on. What differs between replays (ids, positions, targets, borders, dropout keys, the loss's
scale) is copied into the tensors that the graph reads; gradients are added to buffers that do not move.

Memory: a graph keeps what a micro-step allocates at its peak, in a pool that all graphs share. Nothing else ever adds
to it: a shape not seen before gives the pool back before it runs, a shape larger than those captured too, and whoever
needs memory for something else (evaluation) calls `forget()`. Capturing again costs little more than a micro-step.

Copies to and from the host are captured too, on their streams: of streamed layers, of the head, of offloaded inputs and
activations. A graph begins with the layers in the ring's slots that were there when it was captured, so they are put
there before a replay where something else (evaluation) has moved them; and no event of the time before is waited for in
a capture, nor one of a capture after it. Left out: graphs for evaluation; the adapter in host memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drawplate.model.adapter import Adapter
from drawplate.model.device_batch import DeviceBatch
from drawplate.model.residency import Residency

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
        ring: of the layers that `step` streams.
        settle: lets the current stream wait for all copies of a step, and nothing later for what was before.
    """

    def __init__(self, step: Step, adapter: Adapter, ring: Residency, settle: Callable[[], None]) -> None:
        self._step, self._adapter, self._ring, self._settle = step, adapter, ring, settle
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
        graph = self._graphs[batch.shape]
        self._settle()
        self._ring.hold(graph.before)
        nats = graph.replay(batch, scale)
        self._ring.believe(graph.after)
        return nats

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
        self._settle()
        before = self._ring.holds()
        graph = _Graph(batch.copied(), torch.ones((), device=batch.targets_N.device), torch.cuda.CUDAGraph(), before)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph.graph, pool=self._pool):  # empties the allocator's cache first
                graph.nats = self._add_gradients(graph.batch, graph.scale)
                self._settle()
            graph.after = self._ring.holds()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused = str(error).partition("\n")[0]
            before = (None,) * len(before)
            warnings.warn(f"Micro-steps are launched kernel by kernel: capture failed ({self.refused}).", stacklevel=2)
            return False
        finally:
            self._settle()
            self._ring.believe(before)  # its copies were recorded, not made
        self._graphs[batch.shape] = graph
        return True

    def _add_gradients(self, batch: DeviceBatch, scale: Tensor) -> Tensor:
        with self._adapter.aliased() as leaves:
            loss, nats_N = self._step(batch, scale)
            # A module that its layer never calls leaves its adapter unused.
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = [(_gradient(p), g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])
        return nats_N.sum(dtype=torch.float64)


@dataclass
class _Graph:
    """What one graph reads, and what it leaves; the layers in the ring before and after it."""

    batch: DeviceBatch
    scale: Tensor
    graph: torch.cuda.CUDAGraph
    before: tuple[int | None, ...]
    after: tuple[int | None, ...] = ()
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
