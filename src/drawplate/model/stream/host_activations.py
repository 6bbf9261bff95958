"""Activations that autograd keeps, in page-locked host memory between forward and backward.

The bus is idle while layers compute, and it runs both ways at once: what a layer saves is copied out while the layers
after it compute, and comes back while backward is at them. Where that hides a copy, keeping a layer costs neither
memory of the device nor time, where computing it again costs a forward.

    a layer on the host has run   what it saved queues up, block by block
    end of any layer's forward    what began to leave two layers before is let go of, and the next of the queue begin:
                                  as many as keep an even pace over the whole forward
    backward comes to any layer   the next begin to come back, at an even pace too, into memory of layers that are
                                  through with what they kept
    backward of the layer itself  finds all of it as it left it

A bus is a queue: without the pace, streamed weights and offloaded inputs would wait behind a whole layer's activations.
The order in which memory comes and goes (layout/even_pace.py) is the same in every micro-batch and in the plan, and can
be captured into a CUDA graph. What a layer was given (weights, adapters, keys, what all layers share) and blocks below
SENT_FROM_BYTES stay where they are. On a CPU the same code copies plainly; with `poison`, blocks are filled with 0xFF
bytes before they are let go of, so that a stale read cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drawplate.layout.even_pace import LEAVING_LAYERS, BlockAt, EvenPace
from drawplate.layout.footprint import SENT_FROM_BYTES
from drawplate.layout.stored_linear import aligned
from drawplate.model.base.arena import private_bytes
from drawplate.model.stream.layer_inputs import WITHOUT
from drawplate.model.stream.weight_ring import POISON
from drawplate.units import MIB

PIECE_BYTES = 16 * MIB
"""What is copied at once: whatever else crosses the bus waits no longer than for one of these."""


@dataclass(eq=False)
class _Block:
    """One storage that a layer saved: its bytes on the device, while they are there, and its place on the host.

    `pace` is its micro-batch's, `arrived` the last copy of it: out, then back."""

    pace: EvenPace
    at: BlockAt
    size: int
    device: Tensor | None
    host: Tensor | None = None
    uses: int = 0
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class SentTensor:
    """A saved tensor as a view of a block, `offset` in elements."""

    block: _Block
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass
class _MicroBatch:
    """What the layers of one micro-batch have sent: for each that has run, its blocks by where they were; and those
    that are on their way out, by when they began."""

    last: int
    pace: EvenPace
    blocks: dict[int, dict[int, _Block]] = field(default_factory=dict)
    leaving: list[list[_Block]] = field(default_factory=list)

    @classmethod
    def of(cls, policies: Sequence[str]) -> _MicroBatch:
        """One whose layers have these policies."""
        on_host, kept = ([i for i, policy in enumerate(policies) if policy == word] for word in ("host", "keep"))
        return cls(len(policies) - 1, EvenPace(len(policies), on_host, kept))

    def found(self, places: Iterable[BlockAt]) -> list[_Block]:
        """Blocks by where they are."""
        return [tuple(self.blocks[layer].values())[number] for layer, number in places]


class HostActivations:
    """Takes the tensors that layers save, and gives them back in backward."""

    def __init__(self, device: torch.device, *, poison: bool = False) -> None:
        self.device, self._poison = device, poison
        self._out, self._back = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._copying: set[torch.cuda.Stream] = set()  # since the last `settle`
        self._places: dict[int, Tensor] = {}
        self._now = _MicroBatch.of(())

    @property
    def host_bytes(self) -> int:
        """Page-locked so far."""
        return sum(place.numel() for place in self._places.values())

    @property
    def used(self) -> bool:
        """Whether any layer of this micro-batch sends what it saves."""
        return bool(self._now.pace.on_host)

    def begin(self, policies: Sequence[str]) -> None:
        """A new micro-batch; those before it are over, and what was not taken of them cannot be any more."""
        self._let_go(self._now)
        self._now = _MicroBatch.of(policies)

    def packing(self, layer: int, given: Iterable[Tensor]) -> Callable[[Tensor], Tensor | SentTensor]:
        """A hook for the tensors that a layer saves.

        Args:
            layer: one whose policy is host.
            given: tensors that were there before the layer was called, its input apart.
        """
        now, stays = self._now, {x.untyped_storage().data_ptr() for x in given}
        blocks = now.blocks.setdefault(layer, {})

        def pack(tensor: Tensor) -> Tensor | SentTensor:
            storage = tensor.untyped_storage()
            if tensor.device != self.device or storage.nbytes() < SENT_FROM_BYTES or storage.data_ptr() in stays:
                return tensor
            block = blocks.get(storage.data_ptr())
            if block is None:
                whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
                block = blocks[storage.data_ptr()] = _Block(
                    now.pace, BlockAt(layer, len(blocks)), storage.nbytes(), whole
                )
            block.uses += 1
            return SentTensor(block, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

        return pack

    def send(self, layer: int) -> None:
        """The layer has run: what it saved may leave."""
        blocks = self._now.blocks[layer].values()
        self._give_places(layer, blocks)
        self._now.pace.sends(layer, [block.size for block in blocks])

    def end_forward(self, layer: int) -> None:
        """The forward of a layer, of any policy, has been issued."""
        now = self._now
        self._let_go(now, LEAVING_LAYERS - 1)
        now.leaving.append(now.found(now.pace.leaving(layer)))
        self._copy(self._out, [(block, block.host, block.device) for block in now.leaving[-1]])
        if layer == now.last:
            self._let_go(now)

    def begin_backward(self, layer: int) -> None:
        """Backward comes to a layer, of any policy."""
        self._bring_back(self._now.found(self._now.pace.returning(layer)))

    def take(self, tensor: SentTensor) -> Tensor:
        """A saved tensor, for backward.

        Raises:
            RuntimeError: another micro-batch has begun since.
        """
        block = tensor.block
        if block.pace is not self._now.pace:
            raise RuntimeError("backward came after the forward of another micro-batch: its activations are gone")
        if self._now.pace.needed(block.at):
            self._bring_back([block])
        self._wait_for(block)
        assert block.device is not None, "a tensor was taken more often than it was saved"
        storage = block.device.untyped_storage()
        block.uses -= 1
        if block.uses == 0:
            block.device = None
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return empty.set_(storage, tensor.offset, tensor.shape, tensor.stride)

    def settle(self) -> None:
        """A micro-step is over: let the current stream wait for copies that nobody asked for."""
        for stream in self._copying:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        self._copying.clear()
        self._now = _MicroBatch.of(())

    def _let_go(self, now: _MicroBatch, but: int = 0) -> None:
        """Of what is on its way out, but for what began last."""
        while len(now.leaving) > but:
            for block in now.leaving.pop(0):
                self._wait_for(block)
                if self._poison and block.device is not None:
                    block.device.fill_(POISON)
                block.device = None

    def _bring_back(self, blocks: Sequence[_Block]) -> None:
        for block in blocks:
            block.device = torch.empty(block.size, dtype=torch.uint8, device=self.device)
        self._copy(self._back, [(block, block.device, block.host) for block in blocks])

    def _copy(
        self, stream: torch.cuda.Stream | None, copies: Sequence[tuple[_Block, Tensor | None, Tensor | None]]
    ) -> None:
        """Copies of blocks (to, from), once what is queued now is through."""
        if stream is not None and copies:
            stream.wait_stream(torch.cuda.current_stream(self.device))
            self._copying.add(stream)
        with torch.no_grad(), torch.cuda.stream(stream):  # of None: does nothing
            for block, to, source in copies:
                assert to is not None
                assert source is not None
                for part, same in zip(to.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True):
                    part.copy_(same, non_blocking=True)
                if stream is not None:
                    block.arrived = torch.cuda.Event()
                    block.arrived.record(stream)

    def _wait_for(self, block: _Block) -> None:
        if block.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(block.arrived)
            block.arrived = None

    def _give_places(self, layer: int, blocks: Iterable[_Block]) -> None:
        sizes = {block: aligned(block.size) for block in blocks}
        place = self._places.get(layer)
        if sizes and (place is None or place.numel() < sum(sizes.values())):
            if place is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # copies into the old place may be on their way
            pinned = self.device.type == "cuda"
            place = self._places[layer] = private_bytes(sum(sizes.values()), pinned=pinned, without=WITHOUT)
        offset = 0
        for block, size in sizes.items():
            assert place is not None
            block.host = place[offset : offset + block.size]
            offset += size
