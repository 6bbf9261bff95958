"""Every byte a named line with its formula. Numbers in, lines out; nothing is measured here and torch is not imported.

A run has phases (load, baseline evaluation, training, checkpoint, final evaluation) and each phase a moment at which it
holds most. The lines of a phase are what is held at that moment, so that their sum for a place is the phase's peak.

What a decoder layer saves and works with comes from running it without data (model/footprint.py); the ledger receives
that as numbers. Blind to what other programs take of the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from drawplate.records import LedgerLine, PhaseLedger
from drawplate.units import MIB

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STORED_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "fp8": 16.0}
BLOCK, SCALE_BLOCK = 64, 256
ADAM_MOMENTS = 2
TRAINED_BYTES = 4
PHASES = ("load", "baseline evaluation", "training", "checkpoint", "final evaluation")


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """A linear layer of a decoder layer; `rank` of its adapter, 0 for none."""

    out_features: int
    in_features: int
    rank: int = 0


class Line(NamedTuple):
    """Bytes as a function of the tokens in a micro-batch: `fixed + per_token * tokens`."""

    fixed: float
    per_token: float

    def bytes(self, tokens: int) -> int:
        """For so many tokens."""
        return int(self.fixed + self.per_token * tokens)


Peak = tuple[Line, ...]
"""A peak is the highest of several moments, each a line."""


def peak_bytes(peak: Peak, tokens: int) -> int:
    """The highest of the moments."""
    return max((line.bytes(tokens) for line in peak), default=0)


@dataclass(frozen=True, kw_only=True)
class LayerFootprint:
    """What one decoder layer's function holds beside its weights, its adapter and the tensors that all layers share.

    Attributes:
        saved: what autograd keeps from the layer's forward to its backward, its input included.
        inference: peak of a forward without gradients, beside its input.
        forward: peak of a forward that is differentiated later, beside its input.
        backward: peak of that backward, with what was saved, the gradient that comes in and those that go out.
        recompute: peak of a forward and backward at once from the layer's input, beside that input; with the
            gradients that come in and go out.
    """

    saved: Line
    inference: Peak
    forward: Peak
    backward: Peak
    recompute: Peak


class Mode(NamedTuple):
    """What a layer's footprint depends on beside its shape.

    `in_product`: quantized weights are dequantized inside their product, not a whole layer before.
    """

    device: str
    compute_dtype: str
    compiled: bool
    in_product: bool
    dropout: bool
    packing: bool


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A decoder layer in numbers.

    Attributes:
        linears: its linear layers, whose weights are stored in the plan's precision.
        plain: elements of every other frozen tensor (norms, biases), stored in the compute dtype.
        trained: elements of every trained tensor.
        footprints: what its function holds, by mode; may be measured only when asked.
    """

    linears: tuple[LinearShape, ...]
    plain: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()
    footprints: Mapping[Mode, LayerFootprint] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a base model that memory and time depend on.

    Attributes:
        parameters: all, tied ones once.
        layers: decoder layers.
        linear_parameters: in the linear layers of all decoder layers; these are quantized.
        outside_parameters: embedding, head, norms and whatever else is not a linear layer of the decoder.
        hidden, intermediate, vocab: sizes.
        attention_width: query, key and value features of a layer together.
        trained_parameters: of the adapter.
        max_positions: longest input that the model was made for.
        kinds: the different decoder layers; none where only the numbers above are known.
        kind_of_layer: for each layer, which of `kinds` it is.
        tied: the head's weight is the embedding's.
        softcap: the head's logits are capped.
    """

    parameters: int
    layers: int
    linear_parameters: int
    outside_parameters: int
    hidden: int
    intermediate: int
    vocab: int
    attention_width: int
    trained_parameters: int
    max_positions: int
    kinds: tuple[LayerShape, ...] = ()
    kind_of_layer: tuple[int, ...] = ()
    tied: bool = True
    softcap: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan in the ledger's words.

    The first `dequantized_layers` live on the device in the compute dtype, the next `device_layers` on the device as
    stored, the rest on the host. The last `kept_layers` keep their activations (backward lets go of them before it
    recomputes anything); the others follow `policy`.

    Attributes:
        precision, double_quant: of the linear weights as stored.
        compute_dtype: bfloat16, float16 or float32.
        device: where layers are computed; on cpu every byte is the host's.
        micro_batch_tokens: positions of a micro-batch, padding included.
        rows, longest: padded, its rows and their length; packed, 1 and the longest document.
        packing: several documents share a row.
        micro_batches: of an optimizer step; from 2 on, gradients are there from forward to backward.
        slots: of the ring.
        head_rows: rows of a slot of the streamed head; 0 for embedding and head on the device.
        compiled, dequantize: how layers are computed (`layer`: dequantized whole before they are called).
        dropout: of the adapter.
        eval_tokens, eval_rows: positions and rows of an evaluation micro-batch; None for those of training.
        optimizer: adamw or adamw_8bit.
    """

    precision: str
    double_quant: bool
    compute_dtype: str
    device: Literal["cpu", "cuda"]
    dequantized_layers: int
    device_layers: int
    kept_layers: int
    policy: Literal["recompute", "offload"]
    micro_batch_tokens: int
    rows: int = 1
    longest: int | None = None
    packing: bool = True
    micro_batches: int = 2
    slots: int = 2
    head_rows: int = 0
    compiled: bool = False
    dequantize: Literal["layer", "product"] = "product"
    dropout: float = 0.0
    eval_tokens: int | None = None
    eval_rows: int | None = None
    optimizer: str = "adamw"

    @classmethod
    def in_words(cls, layers: int, *, weights: str, activations: str, **others: Any) -> Choice:
        """A choice that is the same for all layers, in the recipe's words."""
        return cls(
            dequantized_layers=layers if weights == "dequantized" else 0,
            device_layers=layers if weights == "device" else 0,
            kept_layers=layers if activations == "keep" else 0,
            policy="offload" if activations == "offload" else "recompute",
            **others,
        )

    def host_layers(self, layers: int) -> int:
        """Layers that are streamed."""
        return max(0, layers - self.dequantized_layers - self.device_layers)

    def captured(self, layers: int) -> bool:
        """Whether micro-steps are replayed as CUDA graphs: nothing of them crosses the bus (model/graphed.py).

        They take the memory that a micro-step takes anyway, and give it back before anything else runs."""
        crosses = self.host_layers(layers) or self.head_rows or (self.policy == "offload" and self.kept_layers < layers)
        return self.device == "cuda" and not crosses


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the ledger cannot compute, measured.

    Attributes:
        base_bytes: resident bytes of the process before the model is loaded.
        context_bytes: of the device, taken by the CUDA context and loaded libraries.
        dataset_bytes: token windows in host memory.
    """

    base_bytes: int = 0
    context_bytes: int = 0
    dataset_bytes: int = 0


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


def stored_bits(precision: str, double_quant: bool) -> float:
    """Bits per frozen weight: 4 + 32/64 for a float32 scale a block, or 4 + 8/64 + 32/(64*256) doubly quantized."""
    if precision in STORED_BITS:
        return STORED_BITS[precision]
    return 4 + (8 / BLOCK + 32 / (BLOCK * SCALE_BLOCK) if double_quant else 32 / BLOCK)


def kept_bytes_per_token_and_layer(model: ModelShape, dtype_bytes: int) -> int:
    """What autograd keeps of a Llama-like layer for one token, in bytes.

    Two norms keep their input and a float32 normalised copy, attention keeps q, k, v and its output, the feed-forward
    keeps gate, up, their activation and product, each linear layer its input; residuals are shared.
    """
    norms = 2 * (model.hidden * dtype_bytes + 2 * model.hidden * 4)
    attention = (2 * model.attention_width + 2 * model.hidden) * dtype_bytes
    feed_forward = (4 * model.intermediate + model.hidden) * dtype_bytes
    return norms + attention + feed_forward


def ledger(model: ModelShape, choice: Choice, around: Surroundings = Surroundings()) -> Ledger:
    """The lines of a whole run.

    Args:
        model: the base model's numbers.
        choice: the plan.
        around: what was measured of process and device.
    """
    held = _storage(model, choice, around)
    tokens = choice.micro_batch_tokens
    evaluated = choice.eval_tokens or tokens
    loading = ("one layer while it is quantized", "device", _linear_bytes(model, choice) * 2, "largest layer x 2")
    training = [*held, *_trained(model, choice), *_activations(model, choice)]
    phases = {
        "load": [*held, loading],
        "baseline evaluation": [*held, _evaluation(model, choice, evaluated)],
        "training": training,
        "checkpoint": [*held, *_trained(model, choice), _adapter_copy(model)],
        "final evaluation": [*held, *_trained(model, choice), _evaluation(model, choice, evaluated)],
    }
    return Ledger(phases=tuple(PhaseLedger(phase=name, lines=_lines(choice, rows)) for name, rows in phases.items()))


_Row = tuple[str, str, int, str]


def _lines(choice: Choice, rows: list[_Row]) -> tuple[LedgerLine, ...]:
    place = {"device": "host"} if choice.device == "cpu" else {}
    return tuple(
        LedgerLine(name=name, where=place.get(where, where), bytes=count, formula=formula)  # type: ignore[arg-type]
        for name, where, count, formula in rows
    )


def _storage(model: ModelShape, choice: Choice, around: Surroundings) -> list[_Row]:
    size = DTYPE_BYTES[choice.compute_dtype]
    bits = stored_bits(choice.precision, choice.double_quant)
    a_layer = model.linear_parameters / model.layers
    tiers = {
        "frozen weights, dequantized": ("device", choice.dequantized_layers, 8.0 * size),
        "frozen weights on the device": ("device", choice.device_layers, bits),
        "frozen weights on the host": ("host", choice.host_layers(model.layers), bits),
    }
    rows: list[_Row] = [
        (name, where, int(count * a_layer * each / 8), f"{count} layers x {each:.3f} bits x parameters / 8")
        for name, (where, count, each) in tiers.items()
        if count
    ]
    if slots := min(choice.slots, choice.host_layers(model.layers)):
        rows.append(("ring slots", "device", int(slots * a_layer * bits / 8), f"{slots} x largest layer"))
    rows.append(("embedding, head and norms", "device", model.outside_parameters * size, f"parameters x {size} bytes"))
    if around.context_bytes and choice.device == "cuda":
        rows.append(("CUDA context", "device", around.context_bytes, "measured"))
    rows.append(("process before the model", "host", around.base_bytes, "measured"))
    if around.dataset_bytes:
        rows.append(("token windows", "host", around.dataset_bytes, "5 bytes a token"))
    return rows


def _linear_bytes(model: ModelShape, choice: Choice) -> int:
    return model.linear_parameters // model.layers * DTYPE_BYTES[choice.compute_dtype]


def _trained(model: ModelShape, choice: Choice) -> list[_Row]:
    trained = model.trained_parameters
    return [
        ("adapter", "device", trained * TRAINED_BYTES, "trained parameters x 4 bytes"),
        ("adapter gradients", "device", trained * TRAINED_BYTES, "trained parameters x 4 bytes"),
        ("optimizer moments", "device", trained * TRAINED_BYTES * ADAM_MOMENTS, "trained parameters x 2 x 4 bytes"),
    ]


def _activations(model: ModelShape, choice: Choice) -> list[_Row]:
    size, tokens = DTYPE_BYTES[choice.compute_dtype], choice.micro_batch_tokens
    kept = kept_bytes_per_token_and_layer(model, size) * tokens
    rest = model.layers - choice.kept_layers
    workspace = (256 if choice.device == "cuda" else 32) * MIB + tokens * model.hidden * 8
    rows: list[_Row] = [("loss workspace", "device", workspace, "a tile of logits and 8 bytes x tokens x hidden")]
    if choice.kept_layers:
        rows.append(("activations kept", "device", kept * choice.kept_layers, "tokens x layers x kept bytes"))
    if rest:
        where = "host" if choice.policy == "offload" else "device"
        inputs = rest * tokens * model.hidden * size
        rows.append(("layer inputs kept", where, inputs, f"tokens x layers x hidden x {size} bytes"))
        rows.append(("one layer recomputed", "device", kept, "tokens x kept bytes"))
    return rows


def _evaluation(model: ModelShape, choice: Choice, tokens: int) -> _Row:
    kept = kept_bytes_per_token_and_layer(model, DTYPE_BYTES[choice.compute_dtype]) * tokens
    return ("one layer evaluated", "device", kept, "tokens x kept bytes")


def _adapter_copy(model: ModelShape) -> _Row:
    return ("copy of the adapter", "host", model.trained_parameters * TRAINED_BYTES, "trained parameters x 4 bytes")
