"""What memory is spent on: the words that the search, the plan and the runtime share, and the rules that follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where everything lives, and how it is computed.

    The first `dequantized_layers` live on the device in the compute dtype (in fp8: with their transposes), the next
    `device_layers` on the device as stored, the rest on the host. The last `kept_layers` keep their activations on the
    device (backward lets go of them before it recomputes anything), the first `host_kept_layers` in host memory between
    forward and backward; those between follow `policy`.

    Attributes:
        device: where layers are computed, cpu or cuda; on cpu every byte is the host's.
        precision, double_quant: of the linear weights as stored.
        compute_dtype: bfloat16, float16 or float32.
        compiled, dequantize: how layers are computed (`layer`: dequantized whole before they are called, `product`:
            weight by weight).
        packing: several documents share a row.
        micro_batch_tokens: positions of a micro-batch, padding included.
        policy: recompute or offload.
        slots: of the ring for streamed layers.
        head_rows: rows of a slot of the streamed head; 0 keeps the head on the device.
        embedding: device or host. A tied one is where the head is; beside a streamed head it is on the host.
        adapter: where trained tensors, their gradients and the optimizer live: device or host.
    """

    device: str
    precision: str
    double_quant: bool
    compute_dtype: str
    micro_batch_tokens: int
    packing: bool = True
    compiled: bool = False
    dequantize: str = "product"
    dequantized_layers: int = 0
    device_layers: int = 0
    kept_layers: int = 0
    host_kept_layers: int = 0
    policy: str = "recompute"
    slots: int = 2
    head_rows: int = 0
    embedding: str = "device"
    adapter: str = "device"

    def shared(self) -> dict[str, Any]:
        """These values by name, for another record that has them."""
        return {field.name: getattr(self, field.name) for field in fields(Decision)}


def table_on_host(head_rows: int, embedding: str, *, tied: bool) -> bool:
    """Whether the embedding's table is in host memory."""
    return head_rows > 0 or (embedding == "host" and not tied)


def is_captured(*, able: bool, crosses: bool, keeps: bool) -> bool:
    """Whether micro-steps are replayed as CUDA graphs (model/cuda_graphs.py).

    Where layers, head or inputs cross the bus only if some layer keeps its activations: a plan that keeps none has no
    room for what a graph holds beside them.

    Args:
        able: on a GPU with the adapter, and nothing in a micro-step waits for the host.
        crosses: layers, the head or inputs come and go.
        keeps: some layer keeps its activations on the device.
    """
    return able and (keeps or not crosses)
