"""Where each layer's frozen weights are, and when.

A layer's stored tensors lie in one contiguous run of bytes (`LayerLayout`), so moving a layer is one copy. A layer
either lives on the device or lives on the host and visits the device in a ring of slots:

                  load: copy begins on the copy stream,
                  after the event `free` of the last user
      +-------+ ------------------------------------> +---------+
      | EMPTY |                                       | COPYING |
      +-------+                                       +---------+
                                                           | event `ready`, waited for by the compute stream
            load (evicts)                                  v
      +------+ <---------------------- +------+  release  +--------+
      | COPY |                         | IDLE | <-------- | IN USE |  users > 0: never evicted
      +------+                         +------+ --------> +--------+
                                              acquire (no copy: it is still here)

Which slot is evicted, and which layer is fetched ahead, follow from one question: how many layer calls until layer j
is needed again? Training walks 0..L-1 and back, so at each turn the last layers are still in their slots and are not
copied again; inference walks round. Frozen weights are never copied back. On a CPU the same ring runs with plain
copies, which is how it is tested: with `poison=True` a slot is filled with 0xFF bytes (NaN in every float format)
before each load and after the last release, so that a stale read cannot pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drawplate.errors import DoesNotFit
from drawplate.model.base.layer_layout import LayerLayout

POISON = 0xFF


class _Slot:
    """A place on the device that host layers visit in turn."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.users = 0
        self.views: dict[str, Tensor] = {}
        self.views_of: dict[int, dict[str, Tensor]] = {}
        # The copy into it, and the work that read it last; None where there is nothing to wait for.
        self.ready: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None


class Residency:
    """Gives a layer's stored tensors on the device, whatever tier the layer lives in.

    Args:
        layouts: one per layer.
        on_device: for each layer, whether it lives on the device.
        device: where layers are computed.
        buffers: the uint8 bytes of every host layer, page-locked if `device` is a GPU; and of those layers on the
            device that are there already and need no memory of their own.
        slots: of the ring; at least 2 where any layer lives on the host.
        poison: fill slots with NaN between uses (tests).

    Raises:
        DoesNotFit: the device cannot give the bytes.
    """

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        on_device: Sequence[bool],
        device: torch.device,
        buffers: Mapping[int, Tensor],
        *,
        slots: int = 2,
        poison: bool = False,
    ) -> None:
        self.layouts, self.device, self.poison = list(layouts), device, poison
        self.streamed = [not here for here in on_device]
        self.copies = 0
        self._resident: dict[int, dict[str, Tensor]] = {}
        host_layers = [i for i, away in enumerate(self.streamed) if away]
        if host_layers and slots < 2:
            raise ValueError(f"a ring needs at least 2 slots, got {slots}")
        for i, here in enumerate(on_device):
            if here:
                ready = buffers[i] if i in buffers else _device_bytes(layouts[i].bytes, device)
                self._resident[i] = layouts[i].views(ready)
        self._host = {i: buffers[i] for i in host_layers}
        largest = max((layouts[i].bytes for i in host_layers), default=0)
        self._slots = [_Slot(largest, device) for _ in range(min(slots, len(host_layers)))]
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" and host_layers else None
        self._copying = False  # since the last `settle`

    @property
    def device_bytes(self) -> int:
        """Bytes that frozen layers and slots take on the device."""
        kept = sum(self.layouts[i].bytes for i in self._resident)
        return kept + sum(slot.buffer.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of the layers that live on the host."""
        return sum(buffer.numel() for buffer in self._host.values())

    def stored(self, layer: int) -> dict[str, Tensor]:
        """The layer's tensors where it lives: to be filled once, at loading, or copied out.

        Those that came as ready `buffers` may be read-only."""
        if layer in self._resident:
            return self._resident[layer]
        return self.layouts[layer].views(self._host[layer])

    def acquire(self, layer: int, *, backward: bool = False, training: bool = False) -> dict[str, Tensor]:
        """The layer's tensors on the device, valid until `release`; the next layers begin to move.

        Args:
            layer: which.
            backward: the walk goes towards layer 0.
            training: a backward walk will follow this forward walk.
        """
        if layer in self._resident:
            return self._resident[layer]
        slot = self._slot_of(layer) or self._load(layer, layer, backward, training)
        slot.users += 1
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        self._fetch_ahead(layer, backward, training)
        return slot.views

    def release(self, layer: int) -> None:
        """The work that reads the layer's tensors has been issued."""
        if layer in self._resident:
            return
        slot = self._slot_of(layer)
        assert slot is not None, f"layer {layer} was released without being acquired"
        assert slot.users > 0, f"layer {layer} was released twice"
        slot.users -= 1
        self._mark_free(slot)

    def release_all(self) -> None:
        """Free the slots that a step which failed in the middle of a layer left in use."""
        for slot in self._slots:
            if slot.users:
                self._mark_free(slot)
            slot.users = 0

    def settle(self) -> None:
        """Let the current stream wait for all copies, and nothing later for what was before."""
        if self._copying and self._copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)
        self._copying = False
        for slot in self._slots:
            slot.ready = slot.free = None

    def holds(self) -> tuple[int | None, ...]:
        """The layer in each slot."""
        return tuple(slot.layer for slot in self._slots)

    def believe(self, layers: Sequence[int | None]) -> None:
        """The slots hold these layers, whatever was thought so far: copies were recorded and not made, or replayed."""
        for slot, layer in zip(self._slots, layers, strict=True):
            self._name(slot, layer)

    def hold(self, layers: Sequence[int | None]) -> None:
        """Load these layers into the slots, where they are not there."""
        for slot, layer in zip(self._slots, layers, strict=True):
            if layer is not None and slot.layer != layer:
                self._copy_into(slot, layer)
        self.settle()

    def held_buffer(self, layer: int) -> Tensor:
        """The slot that holds a layer which is acquired now."""
        slot = self._slot_of(layer)
        assert slot is not None, f"layer {layer} is not in a slot"
        assert slot.users > 0, f"layer {layer} is not acquired"
        return slot.buffer

    def _slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _calls_until(self, layer: int, now: int, backward: bool, training: bool) -> int:
        """Layer calls until `layer` is needed again, standing at `now`."""
        last = len(self.layouts) - 1
        if backward:
            return now - layer if layer <= now else now + layer + 1
        if training:
            return layer - now if layer >= now else (last - now) + (last - layer) + 1
        return (layer - now) % (last + 1)

    def _load(self, layer: int, now: int, backward: bool, training: bool) -> _Slot:
        idle = [slot for slot in self._slots if slot.users == 0]
        if not idle:
            raise AssertionError("every slot of the ring is in use: more layers are held than there are slots")
        slot = max(idle, key=lambda s: self._urgency(s, now, backward, training))
        self._copy_into(slot, layer)
        return slot

    def _urgency(self, slot: _Slot, now: int, backward: bool, training: bool) -> float:
        if slot.layer is None:
            return float("inf")
        return self._calls_until(slot.layer, now, backward, training)

    def _copy_into(self, slot: _Slot, layer: int) -> None:
        source = self._host[layer]
        self._name(slot, layer)
        self.copies += 1
        if self._copy_stream is None:
            if self.poison:
                slot.buffer.fill_(POISON)
            slot.buffer[: source.numel()].copy_(source)
            return
        if slot.free is None:
            self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        else:
            self._copy_stream.wait_event(slot.free)
        slot.ready, self._copying = slot.ready or torch.cuda.Event(), True
        with torch.cuda.stream(self._copy_stream):
            if self.poison:
                slot.buffer.fill_(POISON)
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            slot.ready.record(self._copy_stream)

    def _name(self, slot: _Slot, layer: int | None) -> None:
        slot.layer = layer
        if layer is not None and layer not in slot.views_of:
            slot.views_of[layer] = self.layouts[layer].views(slot.buffer)
        slot.views = {} if layer is None else slot.views_of[layer]

    def _mark_free(self, slot: _Slot) -> None:
        if self._copy_stream is not None:
            slot.free = slot.free or torch.cuda.Event()
            slot.free.record(torch.cuda.current_stream(self.device))

    def _fetch_ahead(self, now: int, backward: bool, training: bool) -> None:
        """Load the layers needed soonest into idle slots whose content is needed later."""
        upcoming = sorted(self._host, key=lambda j: self._calls_until(j, now, backward, training))
        for layer in [j for j in upcoming if j != now][: len(self._slots) - 1]:
            if self._slot_of(layer) is not None:
                continue
            idle = [slot for slot in self._slots if slot.users == 0]
            slot = max(idle, key=lambda s: self._urgency(s, now, backward, training), default=None)
            soon = self._calls_until(layer, now, backward, training)
            if slot is None or self._urgency(slot, now, backward, training) <= soon:
                return
            self._copy_into(slot, layer)


def _device_bytes(size: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise DoesNotFit(
            "The frozen weights do not fit on the device.",
            safe="Nothing was trained or written.",
            next_step="Set memory.weights: host to stream them, or memory.vram to plan for less.",
        ) from None
