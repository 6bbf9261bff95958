"""Activations that autograd keeps, in page-locked host memory between forward and backward.

The bus is idle while layers compute, and it runs both ways at once: what a layer saves is copied out while the layers
after it compute, and comes back while backward is at them. Where that hides a copy, keeping a layer costs neither
memory of the device nor time, where computing it again costs a forward.

    forward of a layer on the host   its blocks are saved as always; their copy out begins when the layer has run
    end of the forward of its `due`  the compute stream waits for the copy, and the blocks are let go of
    backward at its `due`            its blocks come back, once there is room: as many layers are on their way back, or
                                     were, as layers are through with what they kept
    backward of the layer            finds them as it left them

Layers are due at even distances, which leaves the bus to streamed weights in between. The order in which memory comes
and goes is the same in every micro-batch (plan/micro_batch.py replays it) and can be captured into a CUDA graph. What a
layer was given (weights, adapters, keys, what all layers share) and blocks below SENT_FROM_BYTES stay where they are.
On a CPU the same code copies plainly; with `poison`, blocks are filled with 0xFF bytes before they are let go of, so
that a stale read cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drawplate.footprints import SENT_FROM_BYTES
from drawplate.model.arena import private_bytes
from drawplate.model.residency import ALIGNMENT, POISON


@dataclass(eq=False)
class _Block:
    """One storage that a layer saved: its bytes on the device, while they are there, and its place on the host."""

    layer: _SentLayer
    size: int
    device: Tensor | None
    host: Tensor | None = None
    uses: int = 0


@dataclass(eq=False)
class _SentLayer:
    """What a layer saved. `moved` is the last copy: out, then back."""

    index: int
    due: int
    blocks: dict[int, _Block] = field(default_factory=dict)
    moved: torch.cuda.Event | None = None
    away: bool = False
    coming: bool = False
    forgotten: bool = False


@dataclass(frozen=True)
class SentTensor:
    """A saved tensor as a view of a block, `offset` in elements."""

    block: _Block
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class HostActivations:
    """Takes the tensors that layers save, and gives them back in backward."""

    def __init__(self, device: torch.device, *, poison: bool = False) -> None:
        self.device, self._poison = device, poison
        self._out, self._back = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._places: dict[int, Tensor] = {}
        self._policies: list[str] = []
        self._sent: dict[int, _SentLayer] = {}

    @property
    def host_bytes(self) -> int:
        """Page-locked so far."""
        return sum(place.numel() for place in self._places.values())

    @property
    def used(self) -> bool:
        """Whether any layer of this micro-batch is to send what it saves."""
        return bool(self._sent)

    def begin(self, policies: Sequence[str]) -> None:
        """A new micro-batch; those before it are over, and what was not taken of them cannot be any more."""
        for sent in self._sent.values():
            self._let_go(sent)
            sent.forgotten = True
        layers = [i for i, policy in enumerate(policies) if policy == "host"]
        self._policies, self._sent = list(policies), {}
        for number, layer in enumerate(layers, 1):
            due = -(-number * len(policies) // len(layers)) - 1
            self._sent[layer] = _SentLayer(layer, max(layer, due))

    def packing(self, layer: int, given: Iterable[Tensor]) -> Callable[[Tensor], Tensor | SentTensor]:
        """A hook for the tensors that a layer saves.

        Args:
            layer: one whose policy is host.
            given: tensors that were there before the layer was called, its input apart.
        """
        sent, stays = self._sent[layer], {tensor.untyped_storage().data_ptr() for tensor in given}

        def pack(tensor: Tensor) -> Tensor | SentTensor:
            storage = tensor.untyped_storage()
            if tensor.device != self.device or storage.nbytes() < SENT_FROM_BYTES or storage.data_ptr() in stays:
                return tensor
            block = sent.blocks.get(storage.data_ptr())
            if block is None:
                whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
                block = sent.blocks[storage.data_ptr()] = _Block(sent, storage.nbytes(), whole)
            block.uses += 1
            return SentTensor(block, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

        return pack

    def send(self, layer: int) -> None:
        """The layer has run: what it saved begins to leave."""
        sent = self._sent[layer]
        self._give_places(sent)
        sent.moved = self._copy(self._out, [(block.host, block.device) for block in sent.blocks.values()])

    def end_forward(self, layer: int) -> None:
        """The forward of a layer, of any policy, has been issued: those that are due are let go of."""
        for sent in self._sent.values():
            if sent.due == layer:
                self._let_go(sent)

    def begin_backward(self, layer: int) -> None:
        """Backward comes to a layer, of any policy: what is due and has room begins to come back."""
        through = sum(policy in ("keep", "host") for policy in self._policies[layer + 1 :])
        due = sum(sent.due >= layer for sent in self._sent.values())
        for index in sorted(self._sent, reverse=True)[: min(through, due)]:
            self._bring_back(self._sent[index])

    def take(self, tensor: SentTensor) -> Tensor:
        """A saved tensor, for backward.

        Raises:
            RuntimeError: another micro-batch has begun since.
        """
        block, sent = tensor.block, tensor.block.layer
        if sent.forgotten:
            raise RuntimeError("backward came after the forward of another micro-batch: its activations are gone")
        self._bring_back(sent)
        if sent.moved is not None:
            torch.cuda.current_stream(self.device).wait_event(sent.moved)
            sent.moved = None
        assert block.device is not None, "a tensor was taken more often than it was saved"
        storage = block.device.untyped_storage()
        block.uses -= 1
        if block.uses == 0:
            block.device = None
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return empty.set_(storage, tensor.offset, tensor.shape, tensor.stride)

    def _let_go(self, sent: _SentLayer) -> None:
        if sent.away or sent.coming:
            return
        if sent.moved is not None:
            torch.cuda.current_stream(self.device).wait_event(sent.moved)
            sent.moved = None
        for block in sent.blocks.values():
            if self._poison and block.device is not None:
                block.device.fill_(POISON)
            block.device = None
        sent.away = True

    def _bring_back(self, sent: _SentLayer) -> None:
        if sent.coming or not sent.away:
            return
        sent.coming = True
        for block in sent.blocks.values():
            block.device = torch.empty(block.size, dtype=torch.uint8, device=self.device)
        sent.moved = self._copy(self._back, [(block.device, block.host) for block in sent.blocks.values()])

    def _copy(
        self, stream: torch.cuda.Stream | None, pairs: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> torch.cuda.Event | None:
        """Copies (to, from), once what is queued now is through -> the event that they have arrived."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(stream):  # of None: does nothing
            for to, source in pairs:
                assert to is not None
                assert source is not None
                to.copy_(source, non_blocking=True)
            if stream is None:
                return None
            arrived = torch.cuda.Event()
            arrived.record(stream)
            return arrived

    def _give_places(self, sent: _SentLayer) -> None:
        sizes = [-(-block.size // ALIGNMENT) * ALIGNMENT for block in sent.blocks.values()]
        place = self._places.get(sent.index)
        if sizes and (place is None or place.numel() < sum(sizes)):
            if place is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # copies into the old place may be on their way
            place = private_bytes(sum(sizes), pinned=self.device.type == "cuda")
            self._places[sent.index] = place
        offset = 0
        for block, size in zip(sent.blocks.values(), sizes, strict=True):
            assert place is not None
            block.host = place[offset : offset + block.size]
            offset += size
