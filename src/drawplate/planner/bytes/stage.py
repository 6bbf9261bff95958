"""What every part of a replayed run needs: the device's blocks, the layers' modes, and how a trace is replayed."""

from __future__ import annotations

from drawplate.layout.footprint import TRIAL, WEIGHT, Trace
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.allocator import CachingAllocator, ProcessMemory
from drawplate.planner.bytes.batch_rows import Rows
from drawplate.planner.bytes.blocks import Device, Name
from drawplate.planner.shape import Choice, ModelShape, Surroundings

TRIED_VARIANTS = 2
"""Of a kernel, at least: what they take does not grow with their number."""
TRAINED_BYTES = 4


def input_of(layer: int) -> Name:
    """The block of a layer's input."""
    return ("hidden", layer) if layer else ("embedded",)


class Stage:
    """The device and what runs on it.

    Attributes:
        kinds, trained: of each layer, its numbers and its trained tensors' elements.
        inner, kept: of each layer, how it is run where its activations are not kept, and where they are.
    """

    def __init__(self, model: ModelShape, choice: Choice, around: Surroundings) -> None:
        self.model, self.choice, self.around = model, choice, around
        self.size = DTYPE_BYTES[choice.compute_dtype]
        self.device = Device(CachingAllocator() if choice.device == "cuda" else ProcessMemory())
        self.kinds = [model.kinds[k] for k in model.kind_of_layer]
        self.inner = [choice.mode(choice.tier(i)) for i in range(model.layers)]
        self.kept = [choice.mode(choice.tier(i), kept=True) for i in range(model.layers)]
        self.trained = [kind.trained for kind in self.kinds]
        self._left: dict[Name, dict[Name, None]] = {}
        self._tried: set[tuple[int, Rows]] = set()
        self._resolved: dict[tuple[int, Rows], tuple[Trace, list[tuple[str, int | None, bool]]]] = {}

    def run(
        self, trace: Trace, line: str, prefix: Name, rows: Rows, *, sparing: bool = True, multiplies: str = ""
    ) -> None:
        """Replay a trace, its blocks under a prefix. A compiled layer's kernels are tried when they first run.

        The thread that `multiplies` does so once it has made the first block that is not a dequantized weight."""
        device, left = self.device, self._left.setdefault(prefix, {})
        tried = self.choice.device != "cuda" or (id(trace), rows) in self._tried
        self._tried.add((id(trace), rows))
        copies: list[int] = []
        for name, size, trial in self._bytes(trace, rows):
            if trial:
                if size is not None:
                    copies.append(size)
                elif copies:
                    if not tried:
                        self._try([copy for copy in copies if copy], sparing=sparing)
                    copies = []
                continue
            full = (*prefix, name)
            if size is None:
                device.give(full)
                left.pop(full, None)
            else:
                device.take(line, full, size)
                left[full] = None
                if multiplies and not name.startswith(WEIGHT):
                    self.product_workspace(multiplies)
                    multiplies = ""

    def _try(self, copies: list[int], *, sparing: bool) -> None:
        """Variants of a kernel are run and timed, each on copies of what it writes in place.

        Between runs the L2 cache is cleared by a block of its size. Where a graph is not the forward of a training
        step (`sparing`) a copy that would raise the peak so far lies in host memory instead."""
        device, line = self.device, "compiler's trial of a kernel"
        for _ in range(TRIED_VARIANTS):
            room = device.highest.allocated - self.device.memory.allocated
            names: list[tuple[Name, int]] = []
            for i, copy in enumerate(copies):
                if not sparing or copy <= room:
                    names.append((("copy", i), copy))
                    room -= copy
            self._pass_by(line, names)
            device.take(line, ("trial",), self.around.trial_bytes)
            self._pass_by(line, names)
            device.give(("trial",))

    def _pass_by(self, line: str, blocks: list[tuple[Name, int]]) -> None:
        for name, size in blocks:
            self.device.take(line, name, size)
        self.device.give_all(name for name, _ in blocks)

    def _bytes(self, trace: Trace, rows: Rows) -> list[tuple[str, int | None, bool]]:
        """A trace's blocks by name, their bytes (None: let go of), and whether they are copies for a kernel's trial."""
        key = (id(trace), rows)
        if key not in self._resolved:
            tokens, borders = rows.tokens, rows.borders
            sizes = [
                (name, None if line is None else line.bytes(tokens, borders), name.startswith(TRIAL))
                for name, line in trace
            ]
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
