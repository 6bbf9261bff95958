"""Every byte a named line with its formula. Numbers in, lines out; nothing is measured here and torch is not imported.

Blind to the allocator's rounding, to what libraries take for themselves beyond `base_bytes`, and to activations that an
architecture keeps beside those of a Llama-like layer; the lines for stored weights and trained tensors are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drawplate.records import LedgerLine

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STORED_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0}
BLOCK, SCALE_BLOCK = 64, 256
ADAM_MOMENTS = 2
TRAINED_BYTES = 4


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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the ledger needs to know of a choice."""

    precision: str
    double_quant: bool
    compute_dtype: str
    weights: Literal["device", "dequantized", "host"]
    activations: Literal["keep", "recompute", "offload"]
    micro_batch_tokens: int
    device: Literal["cpu", "cuda"]


def ledger(model: ModelShape, choice: Choice, *, base_bytes: int, loss_workspace_bytes: int) -> tuple[LedgerLine, ...]:
    """The lines of a training run, the largest phase.

    Args:
        model: the base model's numbers.
        choice: precision, tiers, policy and micro-batch.
        base_bytes: what the process holds before the model is loaded (host), measured.
        loss_workspace_bytes: of the head's cross-entropy.
    """
    size = DTYPE_BYTES[choice.compute_dtype]
    on_host = choice.weights == "host"
    bits = 8.0 * size if choice.weights == "dequantized" else stored_bits(choice.precision, choice.double_quant)
    frozen = int(model.linear_parameters * bits / 8)
    largest_layer = frozen // model.layers
    tokens = choice.micro_batch_tokens
    layer_kept = kept_bytes_per_token_and_layer(model, size) * tokens
    inputs = model.layers * tokens * model.hidden * size
    lines = [
        ("frozen weights of the layers", "host" if on_host else "device", frozen, f"parameters x {bits:.3f} bits / 8"),
        ("embedding, head and norms", "device", model.outside_parameters * size, f"parameters x {size} bytes"),
        ("adapter", "device", model.trained_parameters * TRAINED_BYTES, "trained parameters x 4 bytes"),
        ("adapter gradients", "device", model.trained_parameters * TRAINED_BYTES, "trained parameters x 4 bytes"),
        (
            "optimizer moments",
            "device",
            model.trained_parameters * TRAINED_BYTES * ADAM_MOMENTS,
            "trained parameters x 2 x 4 bytes",
        ),
        ("loss workspace", "device", loss_workspace_bytes, "see model/loss.py, loss_workspace_bytes"),
        ("process before the model", "host", base_bytes, "measured"),
    ]
    if on_host:
        lines.append(("ring slots", "device", 2 * largest_layer, "2 x largest layer"))
    if choice.activations == "keep":
        lines.append(("activations kept", "device", layer_kept * model.layers, "tokens x layers x kept bytes"))
    else:
        where = "host" if choice.activations == "offload" else "device"
        lines.append(("layer inputs kept", where, inputs, f"tokens x layers x hidden x {size} bytes"))
        lines.append(("one layer recomputed", "device", layer_kept, "tokens x kept bytes"))
    place = {"device": "host"} if choice.device == "cpu" else {}
    return tuple(
        LedgerLine(name=name, where=place.get(where, where), bytes=count, formula=formula)  # type: ignore[arg-type]
        for name, where, count, formula in lines
    )
