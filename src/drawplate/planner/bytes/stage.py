"""What every part of a replayed run needs: the device's blocks, the layers' modes, and how a trace is replayed."""

from __future__ import annotations

from drawplate.layout.footprint import TRIAL, Trace
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.allocator import CachingAllocator, ProcessMemory
from drawplate.planner.bytes.batch_rows import Rows
from drawplate.planner.bytes.blocks import Device, Name
from drawplate.planner.shape import Choice, ModelShape, Surroundings

TRAINED_BYTES = 4


def input_of(layer: int) -> Name:
    """The block of a layer's input."""
    return ("hidden", layer) if layer else ("embedded",)


class Stage:
    """The device and what runs on it.

    Attributes:
        kinds, trained: of each layer, its numbers and its trained tensors' elements.
        inferred, kept, again: of each layer, how it is run without gradients, in training where its activations are
            kept, and where it is computed again.
    """

    def __init__(self, model: ModelShape, choice: Choice, around: Surroundings) -> None:
        self.model, self.choice, self.around = model, choice, around
        self.size = DTYPE_BYTES[choice.compute_dtype]
        self.device = Device(CachingAllocator() if choice.device == "cuda" else ProcessMemory())
        self.kinds = [model.kinds[k] for k in model.kind_of_layer]
        tiers = [choice.tier(i) for i in range(model.layers)]
        self.inferred = [choice.mode(tier) for tier in tiers]
        self.kept = [choice.mode(tier, "kept") for tier in tiers]
        self.again = [choice.mode(tier, "again") for tier in tiers]
        self.trained = [kind.trained for kind in self.kinds]
        self._left: dict[Name, dict[Name, None]] = {}
        self._tried: set[tuple[int, Rows]] = set()
        self._resolved: dict[tuple[int, Rows], tuple[Trace, list[tuple[str, int | None]]]] = {}

    def run(self, trace: Trace, line: str, prefix: Name, rows: Rows, *, multiplies: str = "") -> None:
        """Replay a trace, its blocks under a prefix; `multiplies` names the thread that it is the first to do so in."""
        device, left = self.device, self._left.setdefault(prefix, {})
        if multiplies:
            self.product_workspace(multiplies)
        tried = (id(trace), rows) in self._tried
        self._tried.add((id(trace), rows))
        for name, size in self._bytes(trace, rows):
            full = (*prefix, name)
            if name == TRIAL and tried:
                continue
            if size is None:
                device.give(full)
                left.pop(full, None)
            else:
                device.take("compiler's trial of a kernel" if name == TRIAL else line, full, size)
                left[full] = None

    def _bytes(self, trace: Trace, rows: Rows) -> list[tuple[str, int | None]]:
        """A trace's blocks by name, and their bytes (None: let go of)."""
        key = (id(trace), rows)
        if key not in self._resolved:
            sizes = [(name, None if line is None else line.bytes(rows.tokens, rows.borders)) for name, line in trace]
            self._resolved[key] = (trace, sizes)  # the trace too, so that its id is not another's
        return self._resolved[key][1]

    def clear(self, prefix: Name) -> None:
        """Let go of what is left of a part."""
        for name in self._left.pop(prefix, {}):
            if self.device.has(name):
                self.device.give(name)

    def product_workspace(self, thread: str) -> None:
        """cuBLAS keeps one for each thread and stream that multiplies; a capture has a stream of its own."""
        name: Name = ("cublas", thread, self.device.capturing)
        if self.choice.device == "cuda" and not self.device.has(name):
            self.device.take("cuBLAS workspace", name, self.around.product_workspace_bytes)
