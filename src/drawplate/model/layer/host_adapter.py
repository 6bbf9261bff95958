"""The adapter in host memory: a layer's copy visits the device, its gradients go home again.

    host (page-locked): values, gradients, optimizer      device: one layer's values, then its gradients
        values of layer i   -- one copy, before the layer is computed -->   used, then let go
        gradients           <-- one copy, after the layer's backward --     added up on the host

With many targets and a large rank the adapter, its gradients and AdamW's moments are gigabytes (16 bytes a trained
number) which the device need not hold: a layer needs its own share for a moment only, and the optimizer's step is a few
additions a number, which the host does in time. Gradients are complete on the host when `backward` returns.

Left out: hiding the copies behind other work. They run on the compute stream, where a layer's few megabytes take some
tenths of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.layout.buffers import LANDINGS
from drawplate.model.base.arena import private_bytes

VALUE_BYTES = 4
Trained = dict[str, nn.Parameter]


@dataclass
class _Landing:
    """A page-locked place where a layer's gradients arrive."""

    buffer: Tensor
    arrived: torch.cuda.Event | None
    layer: int | None = None


class HostAdapter:
    """Moves the trained tensors of one layer at a time; those of `layers` become views of page-locked memory.

    Args:
        layers: the trained tensors of each layer, fp32, in host memory.
        device: where layers are computed.

    Raises:
        DoesNotFit, EnvironmentProblem: the host cannot give or page-lock the memory.
    """

    def __init__(self, layers: Sequence[Trained], device: torch.device) -> None:
        self.device, self._layers = device, layers
        cuda = device.type == "cuda"
        sizes = [sum(p.numel() for p in layer.values()) for layer in layers]
        places = [*sizes, *[max(sizes)] * LANDINGS]
        memory = private_bytes(VALUE_BYTES * sum(places), pinned=cuda).view(torch.float32)
        pieces = memory.split(places)
        self._values = pieces[: len(layers)]
        self._landings = [_Landing(piece, torch.cuda.Event() if cuda else None) for piece in pieces[len(layers) :]]
        self._next_landing = 0
        self._will_settle = False
        for layer, flat in zip(layers, self._values, strict=True):
            for parameter, home in zip(layer.values(), _views(flat, layer), strict=True):
                home.copy_(parameter.detach())
                parameter.data = home

    def visit(self, layer: int) -> dict[str, Tensor]:
        """A layer's trained tensors on the device, new ones at each call; their gradients reach those on the host."""
        trained = self._layers[layer]
        return dict(zip(trained, _Visit.apply(self, layer, *trained.values()), strict=True))

    def copy_of(self, layer: int) -> tuple[Tensor, ...]:
        """The values on the device."""
        flat = self._values[layer]
        copy = flat.clone() if self.device.type == "cpu" else flat.to(self.device, non_blocking=True)
        return _views(copy, self._layers[layer])

    def send_home(self, layer: int, gradients: Sequence[Tensor]) -> None:
        """Begin the gradients' way to the host; called within `backward`, at whose end they have been added there."""
        if not self._will_settle:
            torch.autograd.Variable._execution_engine.queue_callback(self.settle)
            self._will_settle = True
        landing = self._landings[self._next_landing]
        self._next_landing = (self._next_landing + 1) % LANDINGS
        self._add_up(landing)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        landing.layer = layer
        landing.buffer[: flat.numel()].copy_(flat, non_blocking=True)
        if landing.arrived is not None:
            landing.arrived.record(torch.cuda.current_stream(self.device))

    def settle(self) -> None:
        """Every gradient that was sent is added up on the host."""
        self._will_settle = False
        for landing in self._landings:
            self._add_up(landing)

    def forget(self) -> None:
        """Drop what a backward that failed in the middle has sent."""
        self._will_settle = False
        for landing in self._landings:
            landing.layer = None

    @torch.no_grad()
    def _add_up(self, landing: _Landing) -> None:
        if landing.layer is None:
            return
        if landing.arrived is not None:
            landing.arrived.synchronize()
        trained, landing.layer = self._layers[landing.layer], None
        for parameter, gradient in zip(trained.values(), _views(landing.buffer, trained), strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)


class _Visit(torch.autograd.Function):
    """host tensors of a layer -> the same on the device."""

    @staticmethod
    def forward(ctx: Any, home: HostAdapter, layer: int, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.home, ctx.layer = home, layer
        return home.copy_of(layer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.home.send_home(ctx.layer, gradients)
        return None, None, *(None for _ in gradients)


def _views(flat: Tensor, layer: Trained) -> tuple[Tensor, ...]:
    """A flat run of numbers cut into the shapes of a layer's trained tensors."""
    sizes = [p.numel() for p in layer.values()]
    parts = flat[: sum(sizes)].split(sizes)
    return tuple(part.view(p.shape) for part, p in zip(parts, layer.values(), strict=True))
