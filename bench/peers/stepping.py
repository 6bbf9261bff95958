"""One optimizer step after another, the same for every system that lets its caller hold the loop.

A step is: forward and backward of each micro-batch, the gradient's norm, AdamW. On a GPU the end of each step is marked
by an event and read after the last one, so that no step waits for another's numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

LEARNING_RATE = 5e-4
FP16_LOSS_SCALE = 2.0**12
Documents = Sequence[np.ndarray]
Scale = float | Tensor


@dataclass
class Steps:
    """What some steps gave: seconds of each (but the first, which has no mark before it), losses, gradient norms."""

    seconds: list[float]
    losses: list[float]
    gradient_norms: list[float]


class Peer(Protocol):
    """A loaded system.

    Attributes:
        device: where it computes.
        adapter: PEFT's saved name -> trained tensor.
        fp16: whether the loss must be scaled.
    """

    device: torch.device
    adapter: dict[str, torch.nn.Parameter]
    fp16: bool

    def zero_gradients(self) -> None:
        """Before the first micro-batch of a step."""

    def backward(
        self, documents: Documents, share: float, *, dropout: float, packed_tokens: int, scale: Scale
    ) -> Tensor:
        """Add a micro-batch's gradients.

        Args:
            documents: token ids of each document.
            share: of the step's counted tokens that are in this micro-batch; its mean loss is weighted by it.
            dropout: of the adapter's input.
            packed_tokens: as in Case.
            scale: factor on the gradients.

        Returns:
            The mean nats of its counted tokens, detached.
        """


class Clock:
    """Marks the ends of steps."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """The work queued so far ends here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between neighbouring marks."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def set_adapter(peer: Peer, start: dict[str, Tensor]) -> None:
    """The trained tensors back to their initial values.

    Raises:
        ValueError: the system trains other tensors.
    """
    if peer.adapter.keys() != start.keys():
        odd = sorted(peer.adapter.keys() ^ start.keys())
        raise ValueError(f"trains other tensors than the start has: {len(odd)}, the first {odd[0]}")
    with torch.no_grad():
        for name, tensor in peer.adapter.items():
            tensor.copy_(start[name])


def counted(documents: Documents) -> int:
    """Tokens that the loss counts: all but the first of each document."""
    return sum(len(ids) - 1 for ids in documents)


def take_steps(
    peer: Peer,
    steps: Sequence[Sequence[Documents]],
    *,
    dropout: float,
    packed_tokens: int,
    gradient: Path | None = None,
) -> Steps:
    """Train with a fresh optimizer; with `gradient` the first step's gradient is written there."""
    parameters = list(peer.adapter.values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=peer.device.type == "cuda")
    scaler = torch.amp.GradScaler(peer.device.type, init_scale=FP16_LOSS_SCALE, enabled=peer.fp16)
    clock, losses, norms = Clock(peer.device), [], []
    for micro_batches in steps:
        peer.zero_gradients()
        total = sum(map(counted, micro_batches))
        loss = torch.zeros((), device=peer.device)
        for documents in micro_batches:
            share = counted(documents) / total
            scale = scaler.scale(torch.ones((), device=peer.device)) if peer.fp16 else 1.0
            nats = peer.backward(documents, share, dropout=dropout, packed_tokens=packed_tokens, scale=scale)
            loss = loss + share * nats.detach().float()
        if peer.fp16:
            scaler.unscale_(optimizer)
        if gradient is not None:
            save_gradient(peer.adapter, gradient)
            gradient = None
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss)
        clock.mark()
    peer.zero_gradients()
    return Steps(clock.seconds(), [float(x) for x in losses], [float(x) for x in norms])


def save_gradient(adapter: dict[str, torch.nn.Parameter], path: Path) -> None:
    """The gradients under PEFT's names, in fp32; zeros where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in adapter.items()}
    save_file({name: g.detach().float().cpu().contiguous() for name, g in grads.items()}, path)


def padded(documents: Documents, multiple: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids, labels and, where there is padding, attention_mask: what transformers' models take."""
    width = -(-max(map(len, documents)) // multiple) * multiple
    ids = np.zeros((len(documents), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
        mask[row, : len(document)] = 1
    inputs = {"input_ids": ids, "labels": np.where(mask, ids, -100)}
    if not mask.all():
        inputs["attention_mask"] = mask
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return tensors
