"""Every byte a named line with its formula. Numbers in, lines out; nothing is measured here and torch is not imported.

A run has phases (load, baseline evaluation, training, checkpoint, final evaluation) and each phase a moment at which it
holds most. The lines of a phase are what is held at that moment, so that their sum for a place is the phase's peak. For
the device the moment is found by replaying the run block by block (planner/bytes/replay.py) under the allocator's rules
(planner/bytes/allocator.py); what a decoder layer saves and works with comes from running it without data
(model/footprint/measure.py).

Blind to what other programs take of the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drawplate.layout.stored_linear import DTYPE_BYTES, LAYER_ALIGNMENT, PLAIN_DTYPES, StoredLinear
from drawplate.planner.bytes.blocks import Moment
from drawplate.planner.bytes.host import HostLines, Row, context_lines
from drawplate.planner.bytes.host_kept import LINE
from drawplate.planner.bytes.replay import Replay
from drawplate.planner.bytes.sketch import sketched
from drawplate.planner.bytes.storage import layer_bytes
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.records import LedgerLine, PhaseLedger
from drawplate.units import MIB

PHASES = ("load", "baseline evaluation", "training", "checkpoint", "final evaluation")
SMALLEST_ARENA_BYTES = 16 * MIB
DEVICE_FORMULAS = {
    "frozen weights, dequantized": "layers x parameters x bytes of the compute dtype",
    "frozen weights on the device": "layers x stored tensors, each rounded up to 256 bytes",
    "ring slots": "slots x largest streamed layer",
    "embedding and head": "vocabulary x hidden x bytes, twice if untied",
    "head slots": "2 x rows of a slot x hidden x bytes",
    "small tensors": "norms, step counts and keys, 512 bytes or more each",
    "adapter": "trained parameters x 4 bytes, each tensor rounded up to 512",
    "adapter of a layer, visiting": "2 x trained parameters of the largest layer x 4 bytes",
    "adapter gradients": "trained parameters x 4 bytes",
    "captured micro-step: its own gradients": "trained parameters x 4 bytes, of layers whose backward is done",
    "captured micro-step: its batch": "tokens x 24 bytes, 28 with dropout, and borders x 4 bytes",
    "optimizer moments": "two of each trained tensor (layout/moments.py)",
    "activations kept": "layers that keep x bytes that autograd saves of one (model/footprint/measure.py)",
    LINE: "what a layer or a few send (model/footprint/measure.py), and blocks below 1 MiB, which stay",
    "layer inputs kept": "layers x tokens x hidden x bytes",
    "layer input on its way to the host": "tokens x hidden x bytes",
    "return buffers of offloaded inputs": "2 x tokens x hidden x bytes",
    "layer being computed": "one layer's blocks in its forward (model/footprint/measure.py)",
    "layer being recomputed": "one layer's blocks in forward and backward, dequantized weights among them",
    "backward of a kept layer": "one layer's blocks in its backward, beside what it kept",
    "gradient between layers": "tokens x hidden x bytes",
    "dropout keys of the layers": "layers x adapted linear layers x tokens x 4 bytes",
    "batch and what layers share": "token ids, positions, dropout keys, rotary tables",
    "the norm after the last layer": "its blocks, forward or backward",
    "loss": "a tile of logits, and of the tokens that count hidden states, target rows and a float32 gradient",
    "cuBLAS workspace": "for each thread that multiplies, and again for those of a captured micro-step",
    "compiler's trial of a kernel": "by how much more a layer held when its kernels were first tried",
    "a weight being quantized": "as read, in the compute dtype, and encoded",
}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The lines of every phase."""

    phases: tuple[PhaseLedger, ...]

    def peak(self, where: str) -> int:
        """The largest phase's sum for a place: device, host or disk."""
        return max((phase.bytes(where) for phase in self.phases), default=0)

    def largest(self, where: str) -> PhaseLedger:
        """The phase that holds most of a place."""
        return max(self.phases, key=lambda phase: phase.bytes(where))

    @property
    def lines(self) -> tuple[LedgerLine, ...]:
        """For each place the lines of its largest phase: they sum to its peak."""
        places = ("device", "host", "disk")
        return tuple(line for where in places for line in self.largest(where).lines if line.where == where)


def ledger(model: ModelShape, choice: Choice, around: Surroundings | None = None) -> Ledger:
    """The lines of a whole run.

    Args:
        model: the base model's numbers.
        choice: the plan.
        around: what was measured of process and device.
    """
    around, model = around or Surroundings(), sketched(model)
    replay = Replay(model, choice, around)
    moments = [replay.load(), replay.evaluation(), replay.training(), replay.checkpoint(), replay.evaluation()]
    rows = HostLines(model, choice, around).phases()
    return Ledger(
        phases=tuple(
            PhaseLedger(
                phase=name,
                moment=moment.name,
                lines=(
                    *_device_lines(moment, model, choice, around),
                    *_host_lines(lines),
                    *_disk_lines(model, choice),
                ),
            )
            for name, moment, lines in zip(PHASES, moments, rows, strict=True)
        )
    )


def _device_lines(moment: Moment, model: ModelShape, choice: Choice, around: Surroundings) -> tuple[LedgerLine, ...]:
    where = "host" if choice.device == "cpu" else "device"
    rows = [(name, size, DEVICE_FORMULAS.get(name, "")) for name, size in moment.lines.items() if size]
    gaps = moment.reserved - moment.allocated
    if choice.device == "cpu":
        rows.append(("freed, still with the process", gaps, "the C library's heap by a replay, less the blocks in it"))
    else:
        rows.append(("allocator: rounding and gaps", gaps, "reserved by a replay of the allocator, less the blocks"))
        rows += context_lines(model, choice, around)
    return tuple(
        LedgerLine(name=name, where=where, bytes=size, formula=formula)  # type: ignore[arg-type]
        for name, size, formula in rows
        if size
    )


def _host_lines(rows: list[Row]) -> tuple[LedgerLine, ...]:
    return tuple(LedgerLine(name=n, where="host", bytes=size, formula=text) for n, size, text in rows if size)


def _disk_lines(model: ModelShape, choice: Choice) -> tuple[LedgerLine, ...]:
    """The cache's part, where there is one; the run folder's is that of planner/disk.py."""
    size, storage = DTYPE_BYTES[choice.compute_dtype], StoredLinear(choice.precision, choice.double_quant)
    rows: list[Row] = []
    if choice.precision not in PLAIN_DTYPES or choice.host_layers(model.layers):
        layers = [layer_bytes(model.kinds[k], storage, size) for k in model.kind_of_layer]
        arena = sum(math.ceil(each / LAYER_ALIGNMENT) * LAYER_ALIGNMENT for each in layers) + LAYER_ALIGNMENT
        if sum(layers) >= SMALLEST_ARENA_BYTES:
            rows.append(("cache of prepared weights", arena, "layers as stored, each rounded up to 64 KiB"))
    return tuple(LedgerLine(name=n, where="disk", bytes=b, formula=f) for n, b, f in rows)
