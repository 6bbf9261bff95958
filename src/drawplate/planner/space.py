"""What a search may vary, and every choice that follows: precision, tiers, policy, head, micro-batch.

Left out: mixes of dequantized and streamed layers (memory that would pay for one is better spent on not streaming), and
more than two slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from drawplate.planner.seconds.unit_cost import QUANTIZED
from drawplate.planner.seconds.work import StepWork
from drawplate.planner.shape import Choice, ModelShape
from drawplate.units import GIB

HEAD_SLOT_ROWS = 8192
FEWEST_KEPT, FEWEST_LAYERS = 2, 4
"""With activations in host memory so many layers keep theirs on the device, into whose place others come back; of a
model of so many layers."""
HOST_SHARES = tuple(i / 8 for i in range(1, 9))
DEQUANTIZED_SHARES = (0.25, 0.5, 0.75, 1.0)
LARGEST_WHOLE_LAYER_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One way to cut a step: windows and positions of a micro-batch, and the work that a step is then."""

    sequences: int
    tokens: int
    rows: int
    work: StepWork


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may vary, and what is given.

    Attributes:
        precisions: to choose from.
        batches: ways to cut a step.
        weights: device, dequantized, host or auto, as in the recipe.
        activations: keep, recompute, offload, `again` (either of the last two) or auto.
        compiled: asked for, or auto: where it works.
        fixed: the rest of a choice, in its words.
    """

    precisions: tuple[str, ...]
    batches: tuple[MicroBatch, ...]
    weights: str
    activations: str
    compiled: bool | Literal["auto"]
    fixed: Choice


def choices(model: ModelShape, space: Space, precision: str, batch: MicroBatch) -> Iterator[tuple[Choice, int, int]]:
    """Every choice of a precision and cut, with the fewest and most layers that may keep their activations.

    Where two take the same time the earlier wins, so the simpler comes first: nothing streamed, inputs on the device.
    """
    fixed = space.fixed
    cuda = fixed.device == "cuda"
    for dequantized, on_device in tiers(model.layers, space.weights, precision, cuda=cuda):
        for policy, fewest, most in policies(model.layers, space.activations, cuda=cuda):
            for embedding, head_rows in outside(model, cuda=cuda):
                for dequantize in dequantizations(model, fixed, precision):
                    choice = replace(
                        fixed,
                        precision=precision,
                        dequantized_layers=dequantized,
                        device_layers=on_device,
                        policy=policy,
                        embedding=embedding,
                        head_rows=head_rows,
                        dequantize=dequantize,
                        compiled=space.fixed.device == "cuda" if space.compiled == "auto" else space.compiled,
                        micro_batch_tokens=batch.tokens,
                        rows=batch.rows,
                        micro_batches=max(1, round(batch.work.micro_batches)),
                    )
                    yield choice, fewest, most


def outside(model: ModelShape, *, cuda: bool) -> list[tuple[Literal["device", "host"], int]]:
    """(where the embedding is, rows of a slot of the streamed head): both on the device, only the head, neither."""
    if not cuda:
        return [("device", 0)]
    if model.tied:
        return [("device", 0), ("host", HEAD_SLOT_ROWS)]
    return [("device", 0), ("host", 0), ("host", HEAD_SLOT_ROWS)]


def may_keep_in_host_memory(model: ModelShape, choice: Choice) -> bool:
    """Only in captured micro-steps whose inputs stay on the device, and where layers are not multiplied in fp8.

    Inputs on their way would wait behind activations, and the computation for them. In fp8 a layer is computed again in
    half the time, and a 3B fell 6 to 13 % short of its plan (bench/results/compare-small-3b-fp8-on-host-h100.json).
    """
    captured = replace(choice, kept_layers=FEWEST_KEPT).captured(model)
    return captured and choice.policy == "recompute" and choice.precision != "fp8"


def tiers(layers: int, weights: str, precision: str, *, cuda: bool) -> list[tuple[int, int]]:
    """(dequantized, on the device) of the layers; the rest are on the host."""
    named = {"device": [(0, layers)], "dequantized": [(layers, 0)], "host": [(0, 0)]}
    if weights != "auto":
        return named[weights]
    found = [(0, layers)]
    if precision in (*QUANTIZED, "fp8"):
        shares = DEQUANTIZED_SHARES if cuda else (1.0,)
        found += [(n, layers - n) for n in sorted({max(1, round(layers * share)) for share in shares})]
    if cuda:
        found += [(0, layers - n) for n in sorted({max(1, round(layers * share)) for share in HOST_SHARES})]
    return found


Policy = Literal["recompute", "offload"]


def policies(layers: int, activations: str, *, cuda: bool) -> list[tuple[Policy, int, int]]:
    """(policy of the layers that do not keep their activations, fewest and most that do)."""
    if activations == "keep":
        return [("recompute", layers, layers)]
    if activations == "recompute":
        return [("recompute", 0, 0)]
    if activations == "offload":
        return [("offload", 0, 0)]
    most = 0 if activations == "again" else layers
    recompute: list[tuple[Policy, int, int]] = [("recompute", 0, most)]
    return recompute + ([("offload", 0, most)] if cuda else [])


def dequantizations(model: ModelShape, fixed: Choice, precision: str) -> tuple[Literal["layer", "product"], ...]:
    """A whole layer at once on a GPU, where launches cost time, unless a dequantized layer is very large."""
    if fixed.device != "cuda":
        return ("product",)
    layer_bytes = model.linear_parameters // model.layers * (4 if fixed.compute_dtype == "float32" else 2)
    if layer_bytes > LARGEST_WHOLE_LAYER_BYTES:
        return ("product",)
    return ("layer", "product") if precision in QUANTIZED else ("layer",)
