"""The blocks of memory of a compiled graph, kernel by kernel.

A kernel writes in place over a buffer that nobody else reads again, or over one of the same kind let go of before
(torch/_inductor/codegen/wrapper.py, memory planning); the order is the compiler's choice
(model/footprint/kernel_order.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from drawplate.layout.footprint import WEIGHT, Line
from drawplate.model.footprint.compiled_kernels import Kernel, kernels_of
from drawplate.model.footprint.compiled_nodes import (
    begins_with_scratch,
    dequantizes_first,
    dtype_of,
    in_order_of_loads,
    is_planned,
    line_of_node,
    root_of,
    same_places,
    typical_bytes,
    weight_after,
    workspace_of,
)
from drawplate.model.footprint.kernel_order import Job, Jobs
from drawplate.model.footprint.recorder import KEPT, TRACED_TOKENS, Recorder


@dataclass
class Walk:
    """Records the blocks of a graph, kernel by kernel.

    Attributes:
        graph: the nodes in the order in which they run.
        inputs: blocks of those inputs that are let go of after their last use, by the name of their node.
        outputs: what the graph must make.
        recorder: takes the events.
        stored: precision of weights that products dequantize.
        release_inputs: whether inputs are let go of at all.
        names: the block of each buffer, once `run` is done.
    """

    graph: fx.GraphModule
    inputs: Mapping[str, str]
    outputs: list[fx.Node]
    recorder: Recorder
    stored: str
    release_inputs: bool = True
    names: dict[fx.Node, str] = field(default_factory=dict)
    _wanted: set[fx.Node] = field(default_factory=set)
    kernels_of: list[Kernel] = field(default_factory=list)
    _last: dict[fx.Node, int] = field(default_factory=dict)
    _peaks: list[int] = field(default_factory=list)
    _in_place: list[Line] = field(default_factory=list)

    def run(self) -> None:
        """Record it: once to see where the peak is, then with buffers used again where that does not raise it."""
        self._wanted = {root_of(node) for node in self.outputs}
        self._kernels = self._ordered(kernels_of(list(self.graph.graph.nodes), self._wanted))
        self._last = {source: i for i, kernel in enumerate(self._kernels) for source in kernel.reads}
        into = self.recorder
        self.recorder, self._peaks = Recorder("dry "), []
        places = [n for n in self.graph.graph.nodes if n.op == "placeholder" and n.name in self.inputs]
        self.recorder.events += {self.inputs[n.name]: (self.inputs[n.name], line_of_node(n)) for n in places}.values()
        self._pass()
        self._peaks, self.recorder = self.recorder.peaks(self._marks), into
        self._pass()

    def _ordered(self, kernels: list[Kernel]) -> list[Kernel]:
        """As the compiler orders them; weights and other inputs of the forward are not its to let go of."""
        made = {node for kernel in kernels for node in kernel.reads_of}
        inputs = {n for kernel in kernels for n in kernel.reads - made if not n.name.startswith("primals_")}
        jobs = [
            Job(i, {n: typical_bytes(n) for n in kernel.reads_of}, frozenset(kernel.reads & (made | inputs)))
            for i, kernel in enumerate(kernels)
        ]
        order = Jobs(jobs, {node: typical_bytes(node) for node in inputs}, frozenset(self._wanted & made)).best_order()
        return [kernels[i] for i in order]

    def _pass(self) -> None:
        places = [node for node in self.graph.graph.nodes if node.op == "placeholder" and node.name in self.inputs]
        self.names = {node: self.inputs[node.name] for node in places}
        self._views_of = Counter(self.names.values())
        self._marks: list[int] = []
        self._freed: list[tuple[str, torch.dtype, Line, int, int]] = []
        for i, kernel in enumerate(self._kernels):
            dying = {s for s in kernel.reads if self._last[s] == i and s not in self._wanted and s in self.names}
            if not self.release_inputs:
                dying = {s for s in dying if s.op != "placeholder"}
            scratch = [] if kernel.generated else workspace_of(kernel.writes[0], self.stored)
            weight = WEIGHT if dequantizes_first(kernel.writes[0]) else ""
            early = [self.recorder.take(line, weight) for line in scratch if begins_with_scratch(kernel.writes[0])]
            self._in_place = []
            for node in kernel.writes:
                self._write(node, i, dying)
                self.recorder.pass_by(*weight_after(node, self.stored))
            if kernel.generated and self._peaks:
                self.recorder.try_out(self._in_place)
            for name in early:
                self.recorder.give(name)
            self.recorder.pass_by(*scratch[len(early) :])
            self._marks.append(len(self.recorder.events))
            for source in sorted(dying, key=lambda n: n.name):
                self._give(source, i)
            for node in kernel.writes:
                if node not in self._last and node not in self._wanted and node in self.names:
                    self._give(node, i)

    def _give(self, node: fx.Node, at: int) -> None:
        """The buffer is let go of, unless another input is a view of it that is still to be read."""
        name = self.names[node]
        self._views_of[name] -= 1
        if self._views_of[name] <= 0:
            if node.op != "placeholder":
                self._freed.append((name, dtype_of(node), line_of_node(node), len(self.recorder.events), at))
            self.recorder.give(name)

    def _write(self, node: fx.Node, at: int, dying: set[fx.Node]) -> None:
        """That of an input which only this operation still reads, one let go of before, or a buffer of its own."""
        line, kernel = line_of_node(node), self._kernels[at]
        if not any(line):
            return
        if kernel.generated and (source := self._replaced(node, at, dying)) is not None:
            dying.discard(source)
            self._in_place.append(line)
            self.names[node] = self.names[source]
            if node in self._wanted and self.names[source] in self.inputs.values():  # it leaves under its own name
                self.recorder.give(self.names[source])
                self.names[node] = self.recorder.take(line)
            return
        again = self._used_again(node, at) if is_planned(node) else None
        self.names[node] = self.recorder.take(line) if again is None else again

    def _replaced(self, node: fx.Node, at: int, dying: set[fx.Node]) -> fx.Node | None:
        line, kernel = line_of_node(node), self._kernels[at]
        reads = kernel.reads_of[node]
        for source in in_order_of_loads(node, reads):
            if source not in dying:
                continue
            later = [reads for each in self._kernels[at + 1 :] for reads in each.reads_of.values()]
            beside = [reads for other, reads in kernel.reads_of.items() if other not in kernel.before(node)]
            readers = sum(source in reads for reads in (*beside, *later))
            alone = readers == 1 and self._views_of[self.names[source]] <= 1
            if alone and line_of_node(source) == line and same_places(source, node, reads):
                return source
        return None

    def _used_again(self, node: fx.Node, at: int) -> str | None:
        """The buffer of that kind let go of last, if keeping it until now does not raise the graph's peak."""
        line = line_of_node(node)
        for freed in reversed(self._freed if self._peaks else []):
            name, dtype, size, event, since = freed
            if size != line or dtype != dtype_of(node):
                continue
            between = self._peaks[since + 1 : at]
            if between and max(between) + line.bytes(TRACED_TOKENS) > max(self._peaks):
                return None
            self._freed.remove(freed)
            self.recorder.events[event] = (name, KEPT)
            return name
        return None
