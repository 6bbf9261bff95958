"""Every second a named line: FLOPs over a rate, bytes over a bandwidth, calls over a launch. Numbers in, lines out.

An optimizer step is some micro-batches and an update of the adapter. A micro-batch walks forward through the layers,
streams the head once for loss and gradient, and walks back; layers that did not keep their activations run forward
again. Copies of streamed layers run beside the compute and cost what they take longer (docs/streaming.md), and the host
that issues the work costs what it takes longer than the device.

Blind to clocks that fall while a card heats up, to a bus shared with others, and to the time that reading documents,
loading weights and compiling take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from drawplate.plan.ledger import Choice, ModelShape
from drawplate.plan.unit_cost import QUANTIZED, Units, head_copy_seconds, units_of
from drawplate.plan.work import StepWork
from drawplate.records import CostLine, DeviceSpeed

LAUNCHES = {True: {"forward": 90.0, "backward": 150.0}, False: {"forward": 130.0, "backward": 220.0}}
"""Host time of one layer's pass, in launches of a small operation, by `compiled`: the layer's kernels, and torch's and
Python's own work around them."""
DEQUANTIZE_LAUNCHES = 6.0
"""The same for dequantizing one weight matrix."""
HEAD_LAUNCHES = 16.0
"""The same for a tile of the head."""
UPDATE_LAUNCHES = 400.0
"""The same for clipping and the optimizer's step."""
TILE_LOGITS = 2**28 / 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The lines of an optimizer step; they sum to its seconds."""

    lines: tuple[CostLine, ...]
    work: StepWork

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(line.seconds for line in self.lines)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding."""
        return self.work.step_tokens / self.seconds if self.seconds else 0.0


class Walk(NamedTuple):
    """Layers of a choice by what the walk does to them. Kept ones are the last, dequantized ones the first."""

    layers: int
    kept: int
    host: int
    turning: int
    quantized_kept: int
    quantized_rest: int

    @classmethod
    def of(cls, model: ModelShape, choice: Choice) -> Walk:
        """Count them; `turning` layers are still in their slots when the walk turns round."""
        layers, kept, host = model.layers, choice.kept_layers, choice.host_layers(model.layers)
        quantized = layers - choice.dequantized_layers if choice.precision in QUANTIZED else 0
        quantized_kept = min(kept, quantized)
        return cls(layers, kept, host, min(choice.slots, host), quantized_kept, quantized - quantized_kept)

    @property
    def rest(self) -> int:
        """Layers that are computed again."""
        return self.layers - self.kept


def step_cost(
    model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed, units: Units | None = None
) -> Cost:
    """The lines of one optimizer step.

    Args:
        model: the base model's numbers.
        choice: the plan.
        work: micro-batches of a step and what is in them.
        speed: of the device.
        units: from `units_of` for the same precision, dtype and work, if at hand.
    """
    units, walk = units or units_of(model, choice, work, speed), Walk.of(model, choice)
    again = 1 if choice.dequantize == "layer" else 2
    dequantized = 2 * walk.quantized_kept + (1 + again) * walk.quantized_rest
    both, lines = [a + b for a, b in zip(units.forward, units.backward, strict=True)], []
    lines += [
        ("matrix products of the layers", walk.layers * both[0], "layers x 4 FLOPs x weights x positions / rate"),
        ("adapter's products", walk.layers * both[1], "layers x bytes read and written / bandwidth"),
        ("attention", walk.layers * both[2], "layers x 3.5 x 2 hidden x sum of squared lengths / rate"),
        ("elementwise passes", walk.layers * both[3], "layers x bytes read and written / bandwidth"),
        ("recomputation", walk.rest * units.forward.total, f"{walk.rest} layers x one forward"),
        ("dequantization", dequantized * units.dequantize, f"{dequantized} layers' weights / rate"),
        ("head and loss", units.head, "4 FLOPs x hidden x vocabulary x tokens / rate, and passes over the logits"),
        ("waiting for streamed layers", _streaming_wait(choice, walk, units), "copies longer than what hides them"),
        ("waiting for the streamed head", _head_wait(model, choice, units.head, speed), "its copy, less its compute"),
    ]
    device = sum(seconds for _, seconds, _ in lines)
    host = _host_seconds(choice, walk, units, work, dequantized, model) * speed.launch_seconds
    waiting = host if choice.device == "cpu" else max(0.0, host - device)
    lines.append(("waiting for the host", waiting, "launches of a micro-batch, less what the device takes"))
    lines = [(name, work.micro_batches * seconds, formula) for name, seconds, formula in lines]
    lines.append(("optimizer step", _update_seconds(model, speed), "14 x 4 bytes x trained parameters / bandwidth"))
    return Cost(lines=tuple(CostLine(name=n, seconds=s, formula=f) for n, s, f in lines if s > 0), work=work)


def _streaming_wait(choice: Choice, walk: Walk, units: Units) -> float:
    """What copies take longer than the compute beside them; host layers are spread evenly over the walk.

    Forward: the layers come in while inputs go out. Backward: the kept layers first, then those computed again, whose
    offloaded inputs share the bus with the layers. On a CPU nothing runs beside.
    """
    offloaded = choice.policy == "offload"
    forward = walk.layers * units.forward.total + (walk.quantized_kept + walk.quantized_rest) * units.dequantize
    kept = walk.kept * units.backward.total + walk.quantized_kept * units.dequantize
    rest = walk.rest * (units.forward.total + units.backward.total) + walk.quantized_rest * units.dequantize
    arriving = (walk.host - walk.turning) * units.layer_copy
    out = walk.rest * units.input_out if offloaded else 0.0
    arriving_kept = arriving * walk.kept / walk.layers
    arriving_rest = arriving - arriving_kept + (walk.rest * units.input_back if offloaded else 0.0)
    if choice.device == "cpu":
        return arriving + out + arriving_kept + arriving_rest
    waits = (max(arriving, out) - forward, arriving_kept - kept, arriving_rest - rest)
    return sum(max(0.0, wait) for wait in waits)


def _head_wait(model: ModelShape, choice: Choice, computing: float, speed: DeviceSpeed) -> float:
    """The first slot's copy, which nothing hides, and what the others take longer than the head's compute."""
    copy = head_copy_seconds(model, choice, speed)
    first = copy * min(1.0, choice.head_rows / model.vocab)
    return first + max(0.0, copy - first - computing)


def _host_seconds(
    choice: Choice, walk: Walk, units: Units, work: StepWork, dequantized: int, model: ModelShape
) -> float:
    """Launches of one micro-batch: a walk forward, a walk back, what is computed again, dequantization, the head."""
    launches = LAUNCHES[choice.compiled]
    passes = (walk.layers + walk.rest) * launches["forward"] + walk.layers * launches["backward"]
    tiles = math.ceil(work.tokens * model.vocab / TILE_LOGITS)
    return passes + dequantized * units.linears * DEQUANTIZE_LAUNCHES + tiles * HEAD_LAUNCHES


def _update_seconds(model: ModelShape, speed: DeviceSpeed) -> float:
    """Norm, clipping and AdamW read and write the gradient, the weight and two moments about 14 times in float32."""
    return 14 * 4 * model.trained_parameters / speed.memory_rate + UPDATE_LAUNCHES * speed.launch_seconds


def evaluation_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> float:
    """A held-out measurement, `work` being all of it: forward alone, and the head's loss without its gradient."""
    units, walk = units_of(model, choice, work, speed), Walk.of(model, choice)
    quantized = walk.quantized_kept + walk.quantized_rest
    device = walk.layers * units.forward.total + quantized * units.dequantize
    device += max(0.0, walk.host * units.layer_copy - device) + units.head_evaluated
    device += _head_wait(model, choice, units.head_evaluated, speed)
    launches = walk.layers * LAUNCHES[choice.compiled]["forward"] + quantized * units.linears * DEQUANTIZE_LAUNCHES
    host = launches * speed.launch_seconds
    return work.micro_batches * (device + host if choice.device == "cpu" else max(device, host))
