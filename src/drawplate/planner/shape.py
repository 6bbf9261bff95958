"""The words in which the plan speaks of a model, a choice and what surrounds them. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from drawplate.layout.decision import Decision, is_captured, table_on_host
from drawplate.layout.footprint import Footprint, LayerShape, Mode
from drawplate.layout.stored_linear import BLOCK, PLAIN_DTYPES, SCALE_BLOCK

STORED_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "fp8": 8.0}


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
        opening: rotary tables and whatever the body makes before its first layer, by mode; `out` is what all layers
            share.
        closing: the norm after the last layer, by mode.
        tied: the head's weight is the embedding's.
        softcap: the head's logits are capped.
        one_by_one: a GPU attends to packed documents one by one, by borders that the host must know.
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
    opening: Mapping[Mode, Footprint] = field(default_factory=dict)
    closing: Mapping[Mode, Footprint] = field(default_factory=dict)
    tied: bool = True
    softcap: bool = False
    one_by_one: bool = False

    def unmeasured(self) -> ModelShape:
        """The same, whose layers are not measured on a device when they are asked for."""
        return replace(self, kinds=tuple(kind.unmeasured() for kind in self.kinds))


@dataclass(frozen=True, kw_only=True)
class Choice(Decision):
    """A decision with what else the ledger must know of a run.

    Attributes:
        rows, longest: of a micro-batch: padded, its rows and their length; packed, 1 and the longest document.
        documents: packed, the most in a row.
        micro_batches: of an optimizer step; from 2 on, gradients are there from forward to backward.
        dropout: of the adapter.
        eval_tokens, eval_rows: positions and rows of an evaluation micro-batch; None for those of training.
        optim: which optimizer, as the recipe names it.
        launched: micro-steps are launched kernel by kernel even where they could be captured.
    """

    rows: int = 1
    longest: int | None = None
    documents: int = 1
    micro_batches: int = 2
    dropout: float = 0.0
    eval_tokens: int | None = None
    eval_rows: int | None = None
    optim: str = "adamw_torch"
    launched: bool = False

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

    def on_host(self, layers: int) -> int:
        """Layers that keep their activations in host memory: none of those that keep them on the device."""
        return min(self.host_kept_layers, layers - self.kept_layers)

    def table_on_host(self, model: ModelShape) -> bool:
        """Whether the embedding's table is in host memory."""
        return table_on_host(self.head_rows, self.embedding, tied=model.tied)

    def captured(self, model: ModelShape) -> bool:
        """Whether micro-steps are replayed as CUDA graphs.

        In float32 too, packed documents are attended to one by one (model/layer/attention.py)."""
        one_by_one = self.packing and (model.one_by_one or self.compute_dtype == "float32")
        offloads = self.policy == "offload" and self.kept_layers < model.layers
        return is_captured(
            able=self.device == "cuda" and self.adapter == "device" and not (one_by_one or self.launched),
            crosses=bool(self.host_layers(model.layers) or self.head_rows or offloads),
            keeps=self.kept_layers > 0,
        )

    def tier(self, layer: int) -> str:
        """dequantized, device or host."""
        if layer < self.dequantized_layers:
            return "dequantized"
        return "device" if layer < self.dequantized_layers + self.device_layers else "host"

    def mode(self, tier: str, use: Literal["inference", "kept", "again"] = "inference") -> Mode:
        """How a layer of a tier is run. Kept layers are dequantized weight by weight, or autograd would keep that."""
        stored = "" if tier == "dequantized" or self.precision in PLAIN_DTYPES else self.precision
        if tier == "dequantized" and self.precision == "fp8":
            stored = "fp8_both"
        return Mode(
            device=self.device,
            compute_dtype=self.compute_dtype,
            compiled=self.compiled,
            stored=stored,
            whole=stored not in ("", "fp8", "fp8_both") and self.dequantize == "layer" and use != "kept",
            dropout=self.dropout > 0,
            packing=self.packing,
            use=use,
        )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the ledger cannot compute, measured.

    Attributes:
        base_bytes: resident bytes of the process before the model is loaded.
        context_bytes: of the device, taken by the CUDA context and loaded libraries.
        dataset_bytes: token windows in host memory.
        product_workspace_bytes: cuBLAS keeps for itself in each of the two threads that multiply; 32 MiB on Hopper.
        trial_bytes: of the device, taken by the compiler while it tries variants of a kernel: the size of the L2 cache.
        starts_adapter: an adapter of 4-bit weights starts from their error.
        loading_host_bytes: of host memory that CUDA's libraries take by the end of loading.
        runtime_host_bytes: the same by the end of the first step, without the compiler's share.
    """

    base_bytes: int = 0
    context_bytes: int = 0
    dataset_bytes: int = 0
    product_workspace_bytes: int = 32 * 2**20
    trial_bytes: int = 50 * 2**20
    starts_adapter: bool = False
    loading_host_bytes: int = 0
    runtime_host_bytes: int = 0


def stored_bits(precision: str, double_quant: bool) -> float:
    """Bits per frozen weight: 4 + 32/64 for a float32 scale a block, or 4 + 8/64 + 32/(64*256) doubly quantized."""
    if precision in STORED_BITS:
        return STORED_BITS[precision]
    return 4 + (8 / BLOCK + 32 / (BLOCK * SCALE_BLOCK) if double_quant else 32 / BLOCK)
