"""Where the parts of a model live and how they are computed: the part of a plan that the model needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from drawplate.layout.decision import is_captured, table_on_host
from drawplate.model.base.precision import Storage
from drawplate.records import Plan


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where everything lives and how it is computed: the part of a plan that the model needs.

    Attributes:
        device: where layers are computed.
        storage: precision of the frozen linear weights.
        compute_dtype: of activations and of everything frozen that is not a linear weight.
        weights: tier of each layer: device, dequantized (on the device, in compute_dtype; fp8 with its transpose) or
            host; one word for all.
        activations: policy of each layer: keep, host, recompute or offload; one word for all.
        adapter: where trained tensors, their gradients and the optimizer live: device or host.
        slots: of the ring for host layers.
        head_rows: rows of a slot of the streamed head; 0 keeps the head on the device.
        embedding: device or host. A tied one is where the head is; beside a streamed head it is on the host.
        compiled: compile the layer function.
        dequantize: weight by weight inside its product, or a whole layer at once: faster to launch, more memory.
        graphs: replay whole training micro-steps as CUDA graphs, where `captures` says so.
        read_once: for one measurement, so that layers which are not quantized are not kept in the cache.
        poison: fill slots with NaN between uses (tests).
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    storage: Storage = field(default_factory=lambda: Storage("bf16"))
    compute_dtype: torch.dtype = torch.bfloat16
    weights: str | tuple[str, ...] = "device"
    activations: str | tuple[str, ...] = "keep"
    adapter: str = "device"
    slots: int = 2
    head_rows: int = 0
    embedding: str = "device"
    compiled: bool = False
    dequantize: str = "product"
    graphs: bool = False
    read_once: bool = False
    poison: bool = False

    def tiers(self, layers: int) -> list[str]:
        """The weights' tier of each layer."""
        return [self.weights] * layers if isinstance(self.weights, str) else list(self.weights)

    def table_on_host(self, *, tied: bool) -> bool:
        """Whether the embedding's table is in host memory."""
        return table_on_host(self.head_rows, self.embedding, tied=tied)

    def captures(self, policies: Sequence[str]) -> bool:
        """Whether micro-steps are captured as CUDA graphs, the layers' activations having these policies."""
        return is_captured(
            able=self.graphs and self.device.type == "cuda" and self.adapter == "device",
            crosses=self.head_rows > 0 or "host" in self.tiers(len(policies)) or "offload" in policies,
            keeps="keep" in policies,
        )

    def policies(self, layers: int) -> list[str]:
        """The activations' policy of each layer."""
        return [self.activations] * layers if isinstance(self.activations, str) else list(self.activations)


def placement_of(chosen: Plan, device: torch.device) -> Placement:
    """The model's part of a plan."""
    return Placement(
        device=device,
        storage=Storage(chosen.precision, chosen.double_quant),
        compute_dtype=getattr(torch, chosen.compute_dtype),
        weights=_one_word(tiers_of(chosen)),
        activations=_one_word(policies_of(chosen)),
        slots=chosen.slots,
        head_rows=chosen.head_rows,
        embedding=chosen.embedding,
        adapter=chosen.adapter,
        compiled=chosen.compiled,
        dequantize=chosen.dequantize,
        graphs=chosen.graphs,
    )


def _one_word(words: tuple[str, ...]) -> str | tuple[str, ...]:
    return words[0] if len(set(words)) == 1 else words


def tiers_of(chosen: Plan) -> tuple[str, ...]:
    """The tier of each layer: the dequantized first, and the streamed spread evenly over the others.

    A streamed layer's copy then hides behind all the layers since the streamed one before it.
    """
    first, others = chosen.dequantized_layers, chosen.device_layers + chosen.host_layers
    host = chosen.host_layers
    spread = ("host" if (i + 1) * host // others > i * host // others else "device" for i in range(others))
    return ("dequantized",) * first + tuple(spread)


def policies_of(chosen: Plan) -> tuple[str, ...]:
    """The policy of each layer: the first keep their activations in host memory, the last on the device, where backward
    lets go of them before it recomputes."""
    host, kept = chosen.host_kept_layers, chosen.kept_layers
    return ("host",) * host + (chosen.policy,) * (chosen.layers - host - kept) + ("keep",) * kept
