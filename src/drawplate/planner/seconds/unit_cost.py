"""Seconds of one pass through one layer and of one head: FLOPs over a measured rate, bytes over a measured bandwidth.

`planner/seconds/cost.py` adds them up. What a layer reads and writes beside its products is counted for a Llama-like
layer, and the mean layer stands for all. Blind to experts of which only some run, to sliding windows (attention is
counted whole) and to heads that are together wider or narrower than the hidden state.

Letters: N positions of a micro-batch, H hidden, A query, key and value features together, I intermediate, V vocabulary,
R rank, s bytes of an element.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from drawplate.layout.footprint import LinearShape
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.batch_rows import train_rows_of
from drawplate.planner.bytes.host_kept import sent_blocks
from drawplate.planner.bytes.sketch import sketched
from drawplate.planner.seconds.work import StepWork
from drawplate.planner.shape import Choice, ModelShape, stored_bits
from drawplate.records import DeviceSpeed

QUANTIZED = ("nf4", "fp4", "int8")
BACKWARD_ATTENTION = 2.5
"""Attention's backward has five products where its forward has two (Dao 2023, FlashAttention-2, section 3)."""

SHORT_DOCUMENT = 256
"""Attention over documents of this many tokens runs at half the rate of very long ones."""
PROBED_DOCUMENT = {"cuda": 2048, "cpu": 256}

HEAD_PASSES = {"cuda": 8, "cpu": 10}
"""Bytes moved per logit between the head's two products (model/ends/loss.py): on a GPU one kernel reads a tile and
writes its weights, 7.5 bytes as measured on an H100; a CPU's tile stays in its cache."""

FP8_RATE, FP8_PASSES = 1.9, 3
"""fp8 products against bf16's of the same size (1.9 to 2.0 by the kernels' times in profile-captured-h100.json and
profile-packed-h100.json, bench/results); and the bytes that scaling and rounding an element of their inputs takes, read
in 16 bits and written in 8."""

TRANSPOSE_BYTES = 2.5
"""Bytes moved, in the time it takes, to transpose an fp8 weight for backward: read 1, write 1, not quite at the
memory's rate."""

BOTH_WAYS = 1.7
"""How much more the bus carries in both directions than in one, where that was not measured: as on two H100s
(`measured_device` in bench/results/compare-small-3b-h100.json and -8b-captured-h100.json)."""

INT8_BYTES = 7
"""Bytes moved to dequantize an int8 weight: read 1, write 2, scale in place of 2 and 2."""


class Passes(NamedTuple):
    """Elements that a layer reads or writes outside its products, per position: multiples of H, A and I."""

    hidden: float
    attention: float
    intermediate: float


FORWARD_PASSES = {True: Passes(8, 2, 3), False: Passes(38, 10, 5)}
BACKWARD_PASSES = {True: Passes(12, 2, 5), False: Passes(60, 12, 9)}
"""By `compiled`. Compiled: two norms that read the residual and write it and their output (4 H each), rotary embeddings
in place (2 A), gate times up (3 I); backward reads what it saved too. Uncompiled, a norm in float32 is six passes."""


def product_seconds(speed: DeviceSpeed, rows: float, columns: float, inner: float) -> float:
    """rows x inner times inner x columns: 2 * rows * columns * inner FLOPs over the rate measured at that size.

    Between measured sizes the rate is interpolated in the logarithm of the size; a smaller product than any measured
    takes as long as the smallest.
    """
    flops = 2.0 * rows * columns * inner
    return max(flops, speed.product_rates[0][0]) / _rate_at(speed.product_rates, flops)


@lru_cache(maxsize=65536)
def _rate_at(rates: tuple[tuple[float, float], ...], flops: float) -> float:
    sizes = [size for size, _ in rates]
    right = bisect_left(sizes, flops)
    if right == 0 or right == len(sizes):
        return rates[min(right, len(sizes) - 1)][1]
    (low, low_rate), (high, high_rate) = rates[right - 1], rates[right]
    share = math.log(flops / low) / math.log(high / low)
    return low_rate + share * (high_rate - low_rate)


class LayerSeconds(NamedTuple):
    """Seconds of the device for one pass through one layer, by what they are spent on."""

    products: float
    adapter: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def linears_of(model: ModelShape) -> dict[LinearShape, float]:
    """The linear layers of the mean decoder layer -> how many of each; a Llama-like layer where none are known."""
    if not model.kinds:
        h, i, kv, rank = model.hidden, model.intermediate, (model.attention_width - model.hidden) // 2, 8
        shapes = [(h, h, rank), (kv, h, 0), (kv, h, rank), (h, h, 0), (i, h, 0), (i, h, 0), (h, i, 0)]
        assumed = [LinearShape(out_features=o, in_features=n, rank=r, again=n == h) for o, n, r in shapes]
        return {linear: float(assumed.count(linear)) for linear in assumed}
    found: dict[LinearShape, float] = {}
    for kind in model.kind_of_layer:
        for linear in model.kinds[kind].linears:
            found[linear] = found.get(linear, 0.0) + 1 / len(model.kind_of_layer)
    return found


def forward_seconds(
    model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed, *, again: bool = False
) -> LayerSeconds:
    """One layer's forward: 2 FLOPs per weight and position, LoRA's skinny products by bytes, attention by squares.

    With `again` without the products that its backward does not need (model/support/unused_products.py). LoRA reads x
    (N I s), and reads and writes y (2 N O s): its FLOPs, 2 N R (I + O), hide behind them.
    """
    n, size = work.positions, DTYPE_BYTES[choice.compute_dtype]
    linears = {x: k for x, k in linears_of(model).items() if x.again or not again}
    products = sum(k * product_seconds(speed, n, x.out_features, x.in_features) for x, k in linears.items())
    adapter = sum(k * (x.in_features + 2 * x.out_features) for x, k in linears.items() if x.rank) * n * size
    rounded = sum(k * x.in_features for x, k in linears.items()) * n
    return LayerSeconds(
        _in_precision(choice, products, rounded, speed),
        adapter / speed.memory_rate,
        attention_seconds(model, choice, work, speed),
        _passes(model, choice, FORWARD_PASSES[choice.compiled], n) / speed.memory_rate,
    )


def backward_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> LayerSeconds:
    """One layer's backward: the input's gradient only (2 FLOPs per weight and position), LoRA's, attention's, passes'.

    LoRA reads dy twice (2 N O s) and x once (N I s), and reads and writes dx (2 N I s).
    """
    linears, n, size = linears_of(model), work.positions, DTYPE_BYTES[choice.compute_dtype]
    products = sum(k * product_seconds(speed, n, x.in_features, x.out_features) for x, k in linears.items())
    adapter = sum(k * (2 * x.out_features + 3 * x.in_features) for x, k in linears.items() if x.rank) * n * size
    rounded = sum(k * x.out_features for x, k in linears.items()) * n
    return LayerSeconds(
        _in_precision(choice, products, rounded, speed),
        adapter / speed.memory_rate,
        BACKWARD_ATTENTION * attention_seconds(model, choice, work, speed),
        _passes(model, choice, BACKWARD_PASSES[choice.compiled], n) / speed.memory_rate,
    )


def _in_precision(choice: Choice, products: float, rounded: float, speed: DeviceSpeed) -> float:
    """Products in the compute dtype, or in fp8 with their inputs rounded first."""
    if choice.precision != "fp8":
        return products
    return products / FP8_RATE + FP8_PASSES * rounded / speed.memory_rate


def attention_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> float:
    """A layer's causal attention forward: 4 * H * sum(length^2) / 2 FLOPs, at a rate that short documents do not reach.

    Packed documents see only themselves, so a row costs the sum of their squares and not the square of their sum. A
    position takes a + b * length: what is read and written of it, and products with what it sees; both follow from the
    rates of a short and a long document.
    """
    length = work.squares / max(work.positions, 1.0)
    measured = speed.packed_attention if choice.packing else speed.row_attention
    if len(measured) == 2:
        (short, short_rate), (long, long_rate) = measured
        each_short, each_long = short / short_rate, long / long_rate
        slope = (each_long - each_short) / (long - short)
        each = max(each_short + slope * (length - short), 0.0)
        return 2.0 * model.hidden * work.positions * each
    probed = PROBED_DOCUMENT[choice.device]
    reached = length / (length + SHORT_DOCUMENT) * (probed + SHORT_DOCUMENT) / probed
    return 2.0 * model.hidden * work.squares / (speed.attention_rate * max(reached, 0.05))


def _passes(model: ModelShape, choice: Choice, passes: Passes, positions: float) -> float:
    """Bytes of one layer's elementwise passes."""
    elements = (
        passes.hidden * model.hidden
        + passes.attention * model.attention_width
        + passes.intermediate * model.intermediate
    )
    return elements * positions * DTYPE_BYTES[choice.compute_dtype]


def dequantize_seconds(model: ModelShape, choice: Choice, speed: DeviceSpeed) -> float:
    """One layer's weights into the compute dtype, or transposed in fp8, once; 0 where they are stored so."""
    weights = model.linear_parameters / model.layers
    if choice.precision == "fp8":
        return weights * TRANSPOSE_BYTES / speed.memory_rate
    if choice.precision not in QUANTIZED:
        return 0.0
    if choice.precision == "int8":
        return weights * INT8_BYTES / speed.memory_rate
    return weights / speed.dequantize_rate


def layer_copy_seconds(model: ModelShape, choice: Choice, speed: DeviceSpeed) -> float:
    """One streamed layer over the bus: stored bytes over the bandwidth of page-locked memory."""
    stored = model.linear_parameters / model.layers * stored_bits(choice.precision, choice.double_quant) / 8
    return stored / speed.to_device_rate


def head_seconds(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed, training: bool) -> float:
    """The head's loss and gradient: two products of 2 H V FLOPs a token (one in evaluation) and the passes between."""
    products = product_seconds(speed, work.tokens, model.vocab, model.hidden) * (2 if training else 1)
    share = 1.0 if training else 0.7
    return products + share * work.tokens * model.vocab * HEAD_PASSES[choice.device] / speed.memory_rate


def head_copy_seconds(model: ModelShape, choice: Choice, speed: DeviceSpeed) -> float:
    """The streamed head over the bus, once a micro-batch; 0 where it is resident."""
    if not choice.head_rows:
        return 0.0
    return model.vocab * model.hidden * DTYPE_BYTES[choice.compute_dtype] / speed.to_device_rate


def sent_bytes(model: ModelShape, choice: Choice, work: StepWork) -> float:
    """What a layer sends whose activations are kept in host memory, its input too; the mean layer's, dequantized."""
    model = sketched(model)
    tokens, borders = round(work.positions), train_rows_of(choice, model).borders
    hidden = tokens * model.hidden * DTYPE_BYTES[choice.compute_dtype]
    parts = [kind.footprints[choice.mode("dequantized", "kept")] for kind in model.kinds]
    each = [sum(sent_blocks(part, tokens, borders, hidden).values()) for part in parts]
    return sum(each[kind] for kind in model.kind_of_layer) / model.layers


@dataclass(frozen=True, kw_only=True)
class Units:
    """Seconds of what happens once to a layer or a micro-batch, whatever the tiers and policies are; `weights_again` is
    the share of a layer's weights that is multiplied again where its activations are not kept, `kept_out` and
    `kept_back` the copies of a layer whose activations are kept in host memory, `both_ways` how many seconds of copies
    the bus carries in one, where they go in both directions."""

    forward: LayerSeconds
    again: LayerSeconds
    backward: LayerSeconds
    dequantize: float
    layer_copy: float
    input_out: float
    input_back: float
    head: float
    head_evaluated: float
    linears: float
    weights_again: float
    kept_out: float = 0.0
    kept_back: float = 0.0
    both_ways: float = BOTH_WAYS


def units_of(model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> Units:
    """The unit costs of a choice's precision, dtype and micro-batch."""
    inputs = work.positions * model.hidden * DTYPE_BYTES[choice.compute_dtype]
    linears = linears_of(model)
    sizes = {x: k * x.out_features * x.in_features for x, k in linears.items()}
    units = Units(
        forward=forward_seconds(model, choice, work, speed),
        again=forward_seconds(model, choice, work, speed, again=True),
        backward=backward_seconds(model, choice, work, speed),
        dequantize=dequantize_seconds(model, choice, speed),
        layer_copy=layer_copy_seconds(model, choice, speed),
        input_out=inputs / speed.to_host_rate,
        input_back=inputs / speed.to_device_rate,
        head=head_seconds(model, choice, work, speed, training=True),
        head_evaluated=head_seconds(model, choice, work, speed, training=False),
        linears=sum(linears.values()),
        weights_again=sum(sizes[x] for x in sizes if x.again) / sum(sizes.values()),
        both_ways=2 * speed.both_ways_rate / (speed.to_device_rate + speed.to_host_rate) or BOTH_WAYS,
    )
    return sending(units, model, choice, work, speed) if choice.host_kept_layers else units


def sending(units: Units, model: ModelShape, choice: Choice, work: StepWork, speed: DeviceSpeed) -> Units:
    """The same for choices that may keep activations in host memory."""
    sent = sent_bytes(model, choice, work)
    return replace(units, kept_out=sent / speed.to_host_rate, kept_back=sent / speed.to_device_rate)
