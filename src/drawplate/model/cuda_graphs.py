"""Whole micro-steps as CUDA graphs: forward, loss and backward of one shape, launched at once.

A micro-step issues some 2,000 kernels, and below 8,000 tokens or so the host takes longer to issue them than the GPU to
run them. A shape runs once as always (which compiles and warms up what has to be), is captured when it comes again,
and replayed from then on. What differs between replays (ids, positions, targets, borders, dropout keys, the loss's
scale) is copied into the tensors that the graph reads; gradients are added to buffers that do not move.

Memory: a graph keeps what a micro-step allocates at its peak, in a pool that all graphs share. Nothing else ever adds
to it: a shape not seen before gives the pool back before it runs, a shape larger than those captured too, and whoever
needs memory for something else (evaluation) calls `forget()`. Capturing again costs little more than a micro-step.

What crosses the bus is captured too, each kind of copy on its stream, which parts from the step's and meets it again
within it: streamed layers, the head, offloaded inputs, activations. A graph begins with the layers that were in the
ring's slots when it was captured, so they are put there before a replay where something else (evaluation) has moved
them. No event of the time before is waited for in a capture, nor one of a capture after it. Host memory that a graph
copies to or from stays as long as the model: the ring's, the head's, and what two stores keep for every shape that they
have seen (model/stream/layer_inputs.py, model/stream/host_activations.py); a new shape, for which they may make it
anew, drops all graphs first. Left out: graphs for evaluation; an adapter in host memory.

While it captures, torch's allocator gives no cached memory back to find room: a capture needs what the plan says, at
once. One that breaks off brings its streams together before it ends, or torch would keep its memory for good.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drawplate.model.device_batch import DeviceBatch
from drawplate.model.layer.adapter import Adapter
from drawplate.model.stream.weight_ring import Residency
from drawplate.units import format_bytes

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
        assert graph.after is not None
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
        graph = _Graph(
            batch.copied(), torch.ones((), device=batch.targets_N.device), torch.cuda.CUDAGraph(), self._ring.holds()
        )
        gc.collect()  # what the compiler left in cycles holds memory, and torch 2.11 does not collect it
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
            # Where the end of a capture fails, torch leaves its own stream as the current one.
            with (
                _capped_at_its_end(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph.graph, pool=self._pool),  # empties the allocator's cache first
            ):
                try:
                    graph.nats = self._add_gradients(graph.batch, graph.scale)
                except BaseException as error:
                    cause = error
                    self._come_together()
                    raise
            graph.after = self._ring.holds()
        except RuntimeError as error:
            cause = cause or error
            if not isinstance(cause, RuntimeError):
                raise cause from None
            return str(cause) or type(cause).__name__, isinstance(cause, torch.OutOfMemoryError)
        finally:
            self._settle()
            # Its copies were recorded, not made; of a capture that broke off that is not certain.
            self._ring.believe(graph.before if graph.after is not None else (None,) * len(graph.before))
            if graph.after is None:
                self._give_up(graph.graph)
        return "", False

    def _come_together(self) -> None:
        """A capture cannot end while its streams are apart. If it cannot go on either, this fails and its end will."""
        with suppress(RuntimeError):
            self._settle()

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let go of the pool of a graph that was not captured. Where torch could not end the capture it would keep that
        pool, and give nothing of any pool back to make room, for as long as the process lives."""
        try:
            graph.pool()  # refused where the capture did not end
        except RuntimeError:
            device = torch.cuda.current_device()
            with suppress(RuntimeError):  # it had not begun
                torch._C._cuda_endAllocateToPool(device, self._pool)
                torch._C._cuda_releasePool(device, self._pool)
        if not self._graphs:
            self._pool = None

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
    """What one graph reads, and what it leaves; the layers in the ring's slots before and after it."""

    batch: DeviceBatch
    scale: Tensor
    graph: torch.cuda.CUDAGraph
    before: tuple[int | None, ...]
    after: tuple[int | None, ...] | None = None
    nats: Tensor | None = None

    def replay(self, batch: DeviceBatch, scale: float) -> Tensor:
        for own, given in zip(self.batch.tensors(), batch.tensors(), strict=True):
            own.copy_(given)
        self.scale.fill_(scale)
        self.graph.replay()
        assert self.nats is not None
        return self.nats


@contextmanager
def _capped_at_its_end() -> Iterator[None]:
    """The cap on torch's allocator (memory.vram) holds for what is reserved once a capture is over.

    The allocator compares the cap with what is reserved and the whole of a new block, though its segment grows by what
    is missing of it, and gives cached blocks back to try again: not within a capture, which would need up to a block
    more than on a card of that size.

    Raises:
        OutOfMemoryError: more is reserved than the cap allows.
    """
    share = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(share)
    reserved, device = torch.cuda.memory_reserved(), torch.cuda.current_device()
    if share < 1.0 and reserved > (room := int(share * torch.cuda.get_device_properties(device).total_memory)):
        raise torch.OutOfMemoryError(
            f"Out of memory: a captured micro-step needs {format_bytes(reserved)}, {format_bytes(room)} are allowed."
        )


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "call Adapter.zero_gradients before the first micro-step"
    return parameter.grad
