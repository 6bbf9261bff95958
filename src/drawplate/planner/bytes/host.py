"""What a run holds beside the blocks of the replay: of host memory lines for each phase, of the device the context."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from drawplate.layout.buffers import LANDINGS
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.batch_rows import train_rows_of
from drawplate.planner.bytes.host_kept import locked_bytes
from drawplate.planner.bytes.stage import TRAINED_BYTES
from drawplate.planner.bytes.storage import layer_bytes, stored_linear
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.records.overheads import (
    COMPILED_ADAPTER_HOST_BYTES,
    COMPILER_HOST_BYTES,
    HALF_HOST_BYTES,
    ROWS_ATTENTION_CONTEXT_BYTES,
    ROWS_ATTENTION_HOST_BYTES,
    SOLVER_CONTEXT_BYTES,
    SOLVER_HOST_BYTES,
)

RUNTIME, CONTEXT = "libraries", "CUDA context"
HALF, SOLVER = "products in 16 bits", "solver of the adapter's start"
OF_THE_PROCESS = "process before the model", RUNTIME, HALF, SOLVER, "token windows"
"""What a process holds of the host whatever model it has."""
CONTEXT_OF_KERNELS = "its solver of the adapter's start", "its attention over padded rows"
FOUR_BIT = ("nf4", "fp4")
Row = tuple[str, int, str]
"""Name, bytes, formula."""


@dataclass(frozen=True)
class HostLines:
    """What a run holds of host memory beside the blocks of the replay."""

    model: ModelShape
    choice: Choice
    around: Surroundings

    def load(self) -> list[Row]:
        """A weight on its way, and the head twice while it is page-locked."""
        size = DTYPE_BYTES[self.choice.compute_dtype]
        largest = max(linear.out_features * linear.in_features for kind in self.model.kinds for linear in kind.linears)
        table = self.model.vocab * self.model.hidden * size
        runtime = self.around.loading_host_bytes
        return [*self._held(runtime), ("a tensor on its way", max(largest * 2, table), "largest tensor as read")]

    def evaluation(self) -> list[Row]:
        """What is held throughout."""
        return [*self._held(self.around.runtime_host_bytes), *self._kernels()]

    def training(self) -> list[Row]:
        """Offloaded inputs and activations besides, each in a page-locked block of its own."""
        rows, choice = self.evaluation(), self.choice
        layers = self.model.layers
        away = layers - choice.kept_layers - choice.on_host(layers) if choice.policy == "offload" else 0
        each = choice.micro_batch_tokens * self.model.hidden * DTYPE_BYTES[choice.compute_dtype]
        rows.append(("offloaded layer inputs", away * each, "layers x tokens x hidden x bytes"))
        sent = locked_bytes(self.model, choice, train_rows_of(choice, self.model))
        rows.append(
            ("activations kept in host memory", sent, "layers x blocks from 1 MiB on that autograd saves of one")
        )
        if choice.adapter == "host":
            sizes = [sum(self.model.kinds[k].trained) for k in self.model.kind_of_layer]
            held = (4 * sum(sizes) + LANDINGS * max(sizes)) * TRAINED_BYTES
            rows.append(("adapter, gradients and moments", held, "4 x trained parameters x 4 bytes, and 2 landings"))
        return rows

    def checkpoint(self) -> list[Row]:
        """The adapter is copied to be written."""
        copy = self.model.trained_parameters * TRAINED_BYTES
        return [*self.training(), ("copy of the adapter", copy, "trained parameters x 4 bytes")]

    def phases(self) -> list[list[Row]]:
        """In the run's order."""
        return [self.load(), self.evaluation(), self.training(), self.checkpoint(), self.evaluation()]

    def _kernels(self) -> list[Row]:
        """On a GPU, what comes with the kernels of a layer: the compiler's graphs, and a library."""
        choice = self.choice
        if choice.device != "cuda":
            return []
        adapted = [sum(linear.rank > 0 for linear in kind.linears) for kind in self.model.kinds]
        compiler = sum(COMPILER_HOST_BYTES + n * COMPILED_ADAPTER_HOST_BYTES for n in adapted) * choice.compiled
        half = choice.compute_dtype != "float32"
        return [
            ("compiler", compiler, "a kind of layer: 30 MiB, and 6 for each of its adapted linear layers"),
            ("attention over padded rows", ROWS_ATTENTION_HOST_BYTES * (not choice.packing), "a library, 50 MiB"),
            (HALF, HALF_HOST_BYTES * half, "a library's kernels, 200 MiB"),
            (SOLVER, SOLVER_HOST_BYTES * _solves(choice, self.around), "a library, 130 MiB"),
        ]

    def _held(self, runtime_bytes: int) -> list[Row]:
        model, choice, around = self.model, self.choice, self.around
        size = DTYPE_BYTES[choice.compute_dtype]
        tiers = Counter(model.kind_of_layer[i] for i in range(model.layers) if choice.tier(i) == "host")
        stored = sum(n * layer_bytes(model.kinds[k], stored_linear(choice, "host"), size) for k, n in tiers.items())
        rows = [("process before the model", around.base_bytes, "measured")]
        rows.append((RUNTIME, runtime_bytes, "measured, or typical until a run has"))
        rows.append(("token windows", around.dataset_bytes, "5 bytes a token"))
        rows.append(("frozen weights on the host", stored, "layers x stored tensors, each rounded to 256 bytes"))
        table, formula = model.vocab * model.hidden * size, "vocabulary x hidden x bytes"
        if choice.head_rows:
            rows.append(("head, page-locked", table, formula))
        if choice.table_on_host(model) and not model.tied:
            rows.append(("embedding, page-locked", table, formula))
        return rows


def context_lines(model: ModelShape, choice: Choice, around: Surroundings) -> list[Row]:
    """Device memory outside torch's allocator: CUDA's own, and what a plan's kernels add to it."""
    by_library = not choice.packing and choice.compute_dtype != "float32" and not model.one_by_one
    return [
        (CONTEXT, around.context_bytes, "measured"),
        (CONTEXT_OF_KERNELS[0], SOLVER_CONTEXT_BYTES * _solves(choice, around), "a library, 96 MiB"),
        (CONTEXT_OF_KERNELS[1], ROWS_ATTENTION_CONTEXT_BYTES * by_library, "a library, 76 MiB"),
    ]


def _solves(choice: Choice, around: Surroundings) -> bool:
    return around.starts_adapter and choice.precision in FOUR_BIT
