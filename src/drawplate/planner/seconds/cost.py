"""Every second a named line: FLOPs over a rate, bytes over a bandwidth, calls over a launch. Numbers in, lines out.

An optimizer step is some micro-batches and an update of the adapter. A micro-batch walks forward through the layers,
streams the head once for loss and gradient, and walks back; layers that did not keep their activations run forward
again. Copies of streamed layers, and of activations that are kept in host memory, run beside the compute and cost what
they take longer (docs/streaming.md), and the host that issues the work costs what it takes longer than the device.

Blind to clocks that fall while a card heats up, to a bus shared with others, and to the time that reading documents,
loading weights and compiling take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from drawplate.planner.bytes.host_kept import due_back
from drawplate.planner.seconds.unit_cost import QUANTIZED, Units, head_copy_seconds, units_of
from drawplate.planner.seconds.work import StepWork
from drawplate.planner.shape import Choice, ModelShape
from drawplate.records import CostLine, DeviceSpeed

LAUNCHES = {True: (130.0, 125.0), False: (190.0, 240.0)}
"""Host time of one layer's forward and backward, in launches of a small operation, by `compiled`: the layer's kernels
and what torch and Python do around them. Compiled: measured on an H100 (bench/results/plan-calibration-h100.json)."""
BUSY_HOST = 1.5
"""A host that has anything else to do issues kernels that much more slowly: micro-steps that waited for it took 1.1 to
1.6 times what a quiet one would (bench/results/plan-choice-3b-h100.json), a replayed one nothing more."""
DEQUANTIZE_LAUNCHES = 12.0
"""The same for dequantizing one weight matrix, or transposing it."""
HEAD_LAUNCHES = 16.0
"""The same for a tile of the head."""
UPDATE_LAUNCHES = 400.0
"""The same for clipping and the optimizer's step."""
TILE_LOGITS = 2**28 / 6

KERNELS = {True: (38, 47), False: (110, 150)}
GAP_SECONDS = {False: 6e-6, True: 0.5e-6}
"""Kernels of a layer's forward and backward, and the idle moment after each of them on a GPU: launched (4.7 and 7.7
microseconds in bench/results/profile-launched-h100.json), captured (none to be seen in profile-captured-*.json)."""
NOT_HIDDEN = 0.05
"""Of all copies, where layers are streamed: each has to be there when the layer before it is through, so what disturbs
one is waited for. Captured, an 8B waits 11 to 24 ms for copies that take 250 to 300
(bench/results/profile-captured-8b-h100.json)."""
BESIDE_STREAMED = 0.85
"""Of what the bus could carry to host memory and back beside streamed layers: a queue that is full makes them wait.
With 10 layers there an 8B waits 17 ms for copies, with 12 it waits 46 (the same file)."""
REPLAY_LAUNCHES = 250.0
"""Host time of a captured micro-step: placing its inputs and replaying it (bench/results/profile-captured-*.json)."""


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
    """Layers of a choice by what the walk does to them. Those kept on the device are the last, those kept in host
    memory and dequantized ones the first."""

    layers: int
    kept: int
    kept_on_host: int
    host: int
    turning: int
    quantized_kept: int
    quantized_on_host: int
    quantized_rest: int

    @classmethod
    def of(cls, model: ModelShape, choice: Choice) -> Walk:
        """Count them; `turning` layers are still in their slots when the walk turns round."""
        layers, kept, host = model.layers, choice.kept_layers, choice.host_layers(model.layers)
        quantized = layers - choice.dequantized_layers if choice.precision in (*QUANTIZED, "fp8") else 0
        quantized_kept, on_host = min(kept, quantized), choice.on_host(layers)
        quantized_on_host = max(0, on_host - choice.dequantized_layers) if quantized else 0
        rest = quantized - quantized_kept - quantized_on_host
        return cls(layers, kept, on_host, host, min(choice.slots, host), quantized_kept, quantized_on_host, rest)

    @property
    def rest(self) -> int:
        """Layers that are computed again."""
        return self.layers - self.kept - self.kept_on_host

    @property
    def quantized(self) -> int:
        """Layers that are dequantized, or transposed, at every pass."""
        return self.quantized_kept + self.quantized_on_host + self.quantized_rest


class MicroBatchSeconds(NamedTuple):
    """Seconds of one micro-batch by what they are spent on, in the order of `FORMULAS`."""

    products: float
    adapter: float
    attention: float
    elementwise: float
    recomputation: float
    dequantization: float
    head: float
    embedding: float
    gaps: float
    streamed_layers: float
    streamed_head: float
    host: float


FORMULAS = (
    ("matrix products of the layers", "layers x 4 FLOPs x weights x positions / rate"),
    ("adapter's products", "layers x bytes read and written / bandwidth"),
    ("attention", "layers x 3.5 x 2 hidden x sum of squared lengths / rate"),
    ("elementwise passes", "layers x bytes read and written / bandwidth"),
    ("recomputation", "layers that do not keep their activations x a forward without its last product"),
    ("dequantization", "passes x weights of a layer / rate"),
    ("head and loss", "4 FLOPs x hidden x vocabulary x tokens / rate, and passes over the logits"),
    ("embedding in host memory", "tokens x hidden x bytes / bus"),
    ("gaps between kernels", "kernels x the device's idle moment"),
    ("waiting for streamed layers", "copies of layers, inputs and activations, less the compute that hides them"),
    ("waiting for the streamed head", "its copy, less the compute that hides it"),
    ("waiting for the host", "launches of a micro-batch, less what the device takes"),
)


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
    parts = micro_batch_seconds(model, choice, work, speed, units or units_of(model, choice, work, speed))
    lines = [(name, work.micro_batches * s, formula) for s, (name, formula) in zip(parts, FORMULAS, strict=True)]
    lines.append(("optimizer step", update_seconds(model, speed), "14 x 4 bytes x trained parameters / bandwidth"))
    return Cost(lines=tuple(CostLine(name=n, seconds=s, formula=f) for n, s, f in lines if s > 0), work=work)


def step_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed, units: Units) -> float:
    """The sum of `step_cost`'s lines."""
    parts = micro_batch_seconds(model, choice, work, speed, units)
    return work.micro_batches * sum(parts) + update_seconds(model, speed)


def micro_batch_seconds(
    model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed, units: Units
) -> MicroBatchSeconds:
    """One micro-batch: what the device computes, then what it waits for."""
    walk = Walk.of(model, choice)
    dequantized = _dequantizations(choice, walk, units)
    products, adapter, attention, elementwise = (
        walk.layers * (a + b) for a, b in zip(units.forward, units.backward, strict=True)
    )
    again = walk.rest * units.again.total
    forward, backward = KERNELS[choice.compiled]
    kernels = (walk.layers + walk.rest) * forward + walk.layers * backward
    captured = choice.captured(model)
    gaps = kernels * GAP_SECONDS[captured] if choice.device == "cuda" else 0.0
    parts = MicroBatchSeconds(
        products=products,
        adapter=adapter,
        attention=attention,
        elementwise=elementwise,
        recomputation=again,
        dequantization=dequantized * units.dequantize,
        head=units.head,
        embedding=units.input_back if choice.table_on_host(model) and choice.device == "cuda" else 0.0,
        gaps=gaps,
        streamed_layers=_streaming_wait(choice, walk, units),
        streamed_head=_head_wait(model, choice, units.head, speed),
        host=0.0,
    )
    launches = (
        REPLAY_LAUNCHES if captured else BUSY_HOST * _host_launches(model, choice, walk, units, work, dequantized)
    )
    host = launches * speed.launch_seconds
    return parts._replace(host=host if choice.device == "cpu" else max(0.0, host - sum(parts)))


def _dequantizations(choice: Choice, walk: Walk, units: Units) -> float:
    """Layers times how often a micro-batch dequantizes each; fp8 is multiplied as it is and transposed for backward."""
    if choice.precision == "fp8":
        return walk.quantized
    again = 0.0 if choice.dequantize == "layer" else units.weights_again
    return 2 * walk.quantized + again * walk.quantized_rest


def _streaming_wait(choice: Choice, walk: Walk, units: Units) -> float:
    """What copies take longer than the compute beside them; host layers are spread evenly over the walk.

    Forward: the layers come in while inputs and activations go out, each slower for it. Backward: layers kept on the
    device first, then those computed again, whose offloaded inputs share the bus with the layers, then those kept in
    host memory: what kept layers made room for comes back before them, where streamed layers and inputs leave the bus
    free. NOT_HIDDEN of all that is waited for in any case. On a CPU nothing runs beside.
    """
    each, again, dequantize = units.backward.total, units.again.total, units.dequantize
    forward = walk.layers * units.forward.total + walk.quantized * dequantize
    phases = [
        (walk.kept, walk.kept * each + walk.quantized_kept * dequantize),
        (walk.rest, walk.rest * (again + each) + walk.quantized_rest * dequantize),
        (walk.kept_on_host, walk.kept_on_host * each + walk.quantized_on_host * dequantize),
    ]
    arriving = (walk.host - walk.turning) * units.layer_copy
    inputs = walk.rest if choice.policy == "offload" else 0
    out = inputs * units.input_out + walk.kept_on_host * units.kept_out
    copies = [arriving * layers / walk.layers for layers, _ in phases]
    copies[1] += inputs * units.input_back
    early = min(walk.kept, due_back(walk.layers, walk.kept_on_host, walk.kept)) * units.kept_back
    copies[2] += walk.kept_on_host * units.kept_back - early
    crossing = arriving + out + sum(copies) + early
    if choice.device == "cpu":
        return crossing
    waits = max(0.0, max(arriving, out, (arriving + out) / units.both_ways) - forward)
    for (_, compute), copy in zip(phases[:2], copies[:2], strict=True):
        waits += max(0.0, copy - compute)
        early = max(0.0, early - max(0.0, compute - copy))
    waits += max(0.0, copies[2] + early - phases[2][1])
    return waits + (NOT_HIDDEN * crossing if walk.host else 0.0)


def carried_layers(choice: Choice, walk: Walk, units: Units) -> int:
    """The most layers whose activations the bus carries to host memory and back beside the compute for nothing.

    Out: within the forward, but for the layer that has to run first, beside streamed layers; offloaded inputs go first.
    Back: within the backward, after streamed layers and offloaded inputs. Each such layer is one fewer that is computed
    again.
    """
    offloaded = choice.policy == "offload"
    input_out, input_back = (units.input_out, units.input_back) if offloaded else (0.0, 0.0)
    again, dequantize = walk.layers - walk.kept, walk.quantized * units.dequantize
    arriving = (walk.host - walk.turning) * units.layer_copy
    forward = (walk.layers - 1) * units.forward.total + dequantize
    out = min(forward, units.both_ways * forward - arriving) - again * input_out
    back = walk.layers * units.backward.total + again * units.again.total + dequantize
    back -= again * input_back + arriving
    if walk.host:
        out, back = BESIDE_STREAMED * out, BESIDE_STREAMED * back
    each_out, each_back = units.kept_out - input_out, units.kept_back - input_back + units.again.total
    most = [room / each for room, each in ((out, each_out), (back, each_back)) if each > 0]
    return max(0, min(again, *(int(n) for n in most))) if most else 0


def _head_wait(model: ModelShape, choice: Choice, computing: float, speed: DeviceSpeed) -> float:
    """The first slot's copy, which nothing hides, and what the others take longer than the head's compute."""
    copy = head_copy_seconds(model, choice, speed)
    first = copy * min(1.0, choice.head_rows / model.vocab)
    return first + max(0.0, copy - first - computing)


def _host_launches(
    model: ModelShape, choice: Choice, walk: Walk, units: Units, work: StepWork, dequantized: float
) -> float:
    """Launches of one micro-batch: a walk forward, a walk back, what is computed again, dequantization, the head."""
    forward, backward = LAUNCHES[choice.compiled]
    passes = (walk.layers + walk.rest) * forward + walk.layers * backward
    tiles = math.ceil(work.tokens * model.vocab / TILE_LOGITS)
    return passes + dequantized * units.linears * DEQUANTIZE_LAUNCHES + tiles * HEAD_LAUNCHES


def update_seconds(model: ModelShape, speed: DeviceSpeed) -> float:
    """Norm, clipping and AdamW read and write the gradient, the weight and two moments about 14 times in float32."""
    return 14 * 4 * model.trained_parameters / speed.memory_rate + UPDATE_LAUNCHES * speed.launch_seconds


def evaluation_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> float:
    """A held-out measurement, `work` being all of it: forward alone, and the head's loss without its gradient."""
    units, walk = units_of(model, choice, work, speed), Walk.of(model, choice)
    quantized = 0 if choice.precision == "fp8" else walk.quantized
    device = walk.layers * units.forward.total + quantized * units.dequantize
    device += max(0.0, walk.host * units.layer_copy - device) + units.head_evaluated
    device += _head_wait(model, choice, units.head_evaluated, speed)
    launches = walk.layers * LAUNCHES[choice.compiled][0] + quantized * units.linears * DEQUANTIZE_LAUNCHES
    host = launches * speed.launch_seconds
    return work.micro_batches * (device + host if choice.device == "cpu" else max(device, host))
