"""What a compiled decoder layer holds, from the graphs that the compiler would make of it.

AOTAutograd's joint graph, cut in two by the partitioner that torch.compile uses (min-cut with recomputation), gives the
tensors saved for backward exactly. When the blocks of the two halves come and go is found by walking them under the
rules by which the compiler makes kernels: matrix products, attention and the like have buffers of their own; pointwise
operations are fused into whoever reads them; those that read the same buffers and have the same size share a kernel;
a kernel writes in place over a buffer that nobody else reads again, or over one of the same size let go of before; and
the kernels' order is the compiler's choice (model/kernel_order.py).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from drawplate.footprints import Footprint, Line, Trace
from drawplate.model.frozen import WHOLE
from drawplate.model.kernel_order import Job, Jobs
from drawplate.model.recorder import KEPT, TRACED_TOKENS, Recorder, kernel_lines, line_of

if TYPE_CHECKING:
    from drawplate.model.footprint import Trial

_VIEWS = {
    "view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "detach",
    "as_strided", "reshape", "split", "split_with_sizes", "unbind", "_unsafe_view", "unflatten",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var_mean", "var", "prod", "any", "all", "_softmax"}
MOST_READS = 4
"""The compiler's `realize_reads_threshold`."""
GRADIENT_PARTS = 16
"""`PARTS` of kernels/dropped_product_triton.py, which cannot be imported without Triton."""
TYPICAL_TOKENS = 4096
"""The compiler orders kernels by sizes, which are not known yet."""
_EXTERN_WORDS = (
    "mm",
    "attention",
    "attn",
    "frozen_product",
    "dropped_",
    "gated_",
    "bitsandbytes",
    "convolution",
    "sort",
    "index_put",
)


@dataclass(frozen=True)
class Graphs:
    """The compiled layer's, and the names of the tensors that are its first inputs."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, trial: Trial) -> Graphs:
        """As the compiler makes them; takes half a second."""
        return cls(*_graphs(trial), tuple(trial.tensors))


def compiled_footprint(trial: Trial, graphs: Graphs) -> Footprint:
    """The traces of the compiled layer."""
    forward, backward = graphs.forward, graphs.backward
    weights = _whole_weights(trial, graphs.tensors)
    alone = _inference_graph(forward)
    stored = trial.mode.stored
    inference = _traced_forward(alone, weights, stored)
    training = _traced_forward(forward, weights, stored)
    out, *saved = _outputs(forward)
    out_alone = _outputs(alone)[0]
    names = {node.name: training.names[_root(node)] for node in saved if _root(node) in training.names}
    back = _Walk(backward, names, _outputs(backward), training.recorder, stored)
    start = len(training.recorder.events)
    back.run()
    *gradients, grad_in = [back.names.get(_root(node), "") for node in _outputs(backward)]
    meanings = {name: f"grad:{i}" for i, name in enumerate(gradients)} | {grad_in: "grad_in"}
    for_training = {training.names[_root(out)]: "out"}
    return Footprint(
        inference=inference.recorder.cut(0, None, {inference.names[_root(out_alone)]: "out"}),
        forward=training.recorder.cut(0, start, for_training),
        backward=training.recorder.cut(start, None, for_training | meanings),
    )


@dataclass(frozen=True)
class _Compiler:
    """What is borrowed from torch's compiler. Imported late: it takes a second."""

    aot_function: Callable[..., Any]
    make_boxed_func: Callable[..., Any]
    partition: Callable[..., Any]
    decompositions: Callable[..., Any]
    reorder_for_locality: Callable[..., Any]

    @classmethod
    def imported(cls) -> _Compiler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of its own parts
            from torch._functorch.aot_autograd import aot_function, make_boxed_func
            from torch._functorch.partitioners import min_cut_rematerialization_partition
            from torch._inductor.decomposition import select_decomp_table
            from torch._inductor.fx_passes.post_grad import reorder_for_locality
        partition = min_cut_rematerialization_partition
        return cls(aot_function, make_boxed_func, partition, select_decomp_table, reorder_for_locality)


def _graphs(trial: Trial) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(forward, backward) of the layer in training."""
    compiler = _Compiler.imported()
    names = list(trial.tensors)
    leaves, structure = pytree.tree_flatten(trial.arguments)
    wanted = [tensor.requires_grad_() for tensor in (*trial.trained.values(), trial.hidden)]
    flat = [*trial.tensors.values(), trial.hidden, *leaves]
    found: dict[str, fx.GraphModule] = {}

    def keep(which: str) -> Any:
        def compile_(graph: fx.GraphModule, _: Any) -> Any:
            found[which] = graph
            return compiler.make_boxed_func(graph.forward)

        return compile_

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        return compiler.partition(joint, inputs, compiler="inductor", **options)

    def run(*values: Any) -> Tensor:
        tensors = dict(zip(names, values, strict=False))
        return trial.call(tensors, values[len(names)], pytree.tree_unflatten(values[len(names) + 1 :], structure))

    traced = compiler.aot_function(run, keep("forward"), keep("backward"), partition, compiler.decompositions())
    with _as_if_compiling():
        out = traced(*flat)
        torch.autograd.grad(out, wanted, torch.empty_like(out))
    return found["forward"], found["backward"]


def _inference_graph(forward: fx.GraphModule) -> fx.GraphModule:
    """The forward that saves nothing, in the order that the compiler gives to such graphs alone."""
    graph = fx.Graph()
    out = graph.graph_copy(forward.graph, {})
    graph.output((out[0],))  # type: ignore[index]
    graph.eliminate_dead_code()
    _Compiler.imported().reorder_for_locality(graph)
    return fx.GraphModule(forward, graph)


@contextmanager
def _as_if_compiling() -> Iterator[None]:
    """Code that asks whether it is being compiled is told so, as under torch.compile."""
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = False


def _whole_weights(trial: Trial, inputs: tuple[str, ...]) -> tuple[Trace, dict[str, str]]:
    """How a layer is dequantized before it is called, and the block of each weight by the name of its graph input.

    A kernel writes 4-bit weights at once (kernels/four_bits.py), which has another way without a GPU; int8 is converted
    and then scaled."""
    recorder, blocks = Recorder(), dict[str, str]()
    for name, weight in trial.whole().items():
        line = line_of(weight.numel() * weight.element_size())
        converted = recorder.take(line) if trial.mode.stored == "int8" else ""
        blocks[name.removesuffix(WHOLE)] = recorder.take(line)
        if converted:
            recorder.give(converted)
    places = {name: f"primals_{i + 1}" for i, name in enumerate(inputs)}
    return recorder.cut(0, None, {}), {places[f"{path}weight"]: block for path, block in blocks.items()}


def _traced_forward(graph: fx.GraphModule, weights: tuple[Trace, dict[str, str]], stored: str) -> _Walk:
    """The layer is dequantized, called, and the weights are let go of unless they are among what is kept."""
    made, blocks = weights
    recorder, outputs = Recorder(), _outputs(graph)
    recorder.events += [(f"w{name}", line) for name, line in made]
    walk = _Walk(
        graph, {name: f"w{block}" for name, block in blocks.items()}, outputs, recorder, stored, release_inputs=False
    )
    walk.run()
    kept = {walk.names.get(_root(node)) for node in outputs}
    for block in blocks.values():
        if f"w{block}" not in kept:
            recorder.give(f"w{block}")
    return walk


@dataclass
class _Kernel:
    """One launch: the buffers it writes, each with those it is made of; `size` is what it walks over."""

    reads_of: dict[fx.Node, set[fx.Node]]
    size: int
    generated: bool

    @property
    def writes(self) -> list[fx.Node]:
        """The buffers that it makes."""
        return list(self.reads_of)

    def before(self, node: fx.Node) -> set[fx.Node]:
        """Those of its buffers that this one is made of."""
        found, waiting = set[fx.Node](), [node]
        while waiting:
            made_of = self.reads_of[waiting.pop()] & self.reads_of.keys() - found
            found |= made_of
            waiting += made_of
        return found

    @property
    def reads(self) -> set[fx.Node]:
        """The buffers that must be there before."""
        return set().union(*self.reads_of.values()) - self.reads_of.keys()


@dataclass
class _Walk:
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
    _kernels: list[_Kernel] = field(default_factory=list)
    _last: dict[fx.Node, int] = field(default_factory=dict)
    _peaks: list[int] = field(default_factory=list)
    _in_place: list[Line] = field(default_factory=list)

    def run(self) -> None:
        """Record it: once to see where the peak is, then with buffers used again where that does not raise it."""
        self._wanted = {_root(node) for node in self.outputs}
        self._kernels = self._ordered(_kernels(list(self.graph.graph.nodes), self._wanted))
        self._last = {source: i for i, kernel in enumerate(self._kernels) for source in kernel.reads}
        into = self.recorder
        self.recorder, self._peaks = Recorder("dry "), []
        places = [n for n in self.graph.graph.nodes if n.op == "placeholder" and n.name in self.inputs]
        self.recorder.events += {self.inputs[n.name]: (self.inputs[n.name], _line(n)) for n in places}.values()
        self._pass()
        self._peaks, self.recorder = self.recorder.peaks(self._marks), into
        self._pass()

    def _ordered(self, kernels: list[_Kernel]) -> list[_Kernel]:
        """As the compiler orders them; weights and other inputs of the forward are not its to let go of."""
        made = {node for kernel in kernels for node in kernel.reads_of}
        inputs = {n for kernel in kernels for n in kernel.reads - made if not n.name.startswith("primals_")}
        jobs = [
            Job(i, {n: _typical(n) for n in kernel.reads_of}, frozenset(kernel.reads & (made | inputs)))
            for i, kernel in enumerate(kernels)
        ]
        order = Jobs(jobs, {node: _typical(node) for node in inputs}, frozenset(self._wanted & made)).best_order()
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
            scratch = [] if kernel.generated else _workspace(kernel.writes[0], self.stored)
            early = [self.recorder.take(line) for line in scratch if _begins_with_scratch(kernel.writes[0])]
            self._in_place = []
            for node in kernel.writes:
                self._write(node, i, dying)
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
                self._freed.append((name, _dtype(node), _line(node), len(self.recorder.events), at))
            self.recorder.give(name)

    def _write(self, node: fx.Node, at: int, dying: set[fx.Node]) -> None:
        """That of an input which only this operation still reads, one let go of before, or a buffer of its own."""
        line, kernel = _line(node), self._kernels[at]
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
        again = self._used_again(node, at) if _is_planned(node) else None
        self.names[node] = self.recorder.take(line) if again is None else again

    def _replaced(self, node: fx.Node, at: int, dying: set[fx.Node]) -> fx.Node | None:
        line, kernel = _line(node), self._kernels[at]
        for source in sorted(kernel.reads_of[node] & dying, key=lambda n: n.name):
            later = [reads for each in self._kernels[at + 1 :] for reads in each.reads_of.values()]
            beside = [reads for other, reads in kernel.reads_of.items() if other not in kernel.before(node)]
            readers = sum(source in reads for reads in (*beside, *later))
            alone = readers == 1 and self._views_of[self.names[source]] <= 1
            if alone and _line(source) == line and _same_places(source, node, kernel.reads_of[node]):
                return source
        return None

    def _used_again(self, node: fx.Node, at: int) -> str | None:
        """The buffer of that kind let go of last, if keeping it until now does not raise the graph's peak."""
        line = _line(node)
        for freed in reversed(self._freed if self._peaks else []):
            name, dtype, size, event, since = freed
            if size != line or dtype != _dtype(node):
                continue
            between = self._peaks[since + 1 : at]
            if between and max(between) + line.bytes(TRACED_TOKENS) > max(self._peaks):
                return None
            self._freed.remove(freed)
            self.recorder.events[event] = (name, KEPT)
            return name
        return None


def _kernels(nodes: list[fx.Node], wanted: set[fx.Node]) -> list[_Kernel]:
    """The launches, in order; operations that read the same and have the same size are launched together."""
    buffers = _buffers(nodes, wanted)
    kernels: list[_Kernel] = []
    made_by: dict[fx.Node, int] = {}
    for node in _realized(nodes, buffers):
        if _name(node) == "getitem":
            made_by[node] = made_by[node.all_input_nodes[0]]
            kernels[made_by[node]].reads_of[node] = set()
            continue
        kernel = _Kernel({node: _buffers_read(node, buffers)}, _iterated(node), _is_fused(node))
        ready = max((made_by[source] for source in kernel.reads if source in made_by), default=-1)
        home = _home(kernels, kernel, ready) if kernel.generated else None
        if home is None:
            home = len(kernels)
            kernels.append(kernel)
        else:
            kernels[home].reads_of |= kernel.reads_of
        made_by[node] = home
        for i in _joining(kernels, home) if kernel.generated else ():
            made_by |= dict.fromkeys(kernels[i].writes, home)
            kernels[home].reads_of = kernels[i].reads_of | kernels[home].reads_of
            kernels[i] = _Kernel({}, 0, generated=False)
    return [kernel for kernel in kernels if kernel.reads_of]


def _realized(nodes: list[fx.Node], buffers: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes with buffers in the order in which the compiler decides that they have one: a pointwise operation with
    one user when a library's kernel comes to read it, or at the end."""

    def waits(node: fx.Node) -> bool:
        return _is_fused(node) and len(node.users) == 1 and _name(node) not in _REDUCTIONS

    waiting = {node for node in buffers if node.op != "placeholder" and waits(node)}
    for node in nodes:
        if node not in buffers or node.op == "placeholder" or node in waiting:
            continue
        if not _is_fused(node):
            for source in dict.fromkeys(_root(given) for given in node.all_input_nodes):
                if source in waiting:
                    waiting.remove(source)
                    yield source
        yield node
    yield from (node for node in nodes if node in waiting)


def _joining(kernels: list[_Kernel], home: int) -> list[int]:
    """The earlier launches that can wait for that one and go with it: it reads what they make, and nobody before."""
    kernel, found = kernels[home], []
    for i, other in enumerate(kernels[:home]):
        made = set(other.writes)
        waits = other.generated and other.size == kernel.size and made & kernel.reads
        if waits and not any(made & later.reads for later in kernels[i + 1 : home]):
            found.append(i)
    return found


def _home(kernels: list[_Kernel], kernel: _Kernel, ready: int) -> int | None:
    """An earlier launch that can take it in: all that it reads is there by then, or made there."""
    for i in range(max(ready, 0), len(kernels)):
        other = kernels[i]
        shares = other.reads & kernel.reads or set(other.writes) & kernel.reads
        if other.generated and other.size == kernel.size and shares:
            return i
    return None


def _needed(wanted: set[fx.Node]) -> set[fx.Node]:
    """Those nodes and all that they are made of."""
    seen: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen


def _buffers(nodes: list[fx.Node], wanted: set[fx.Node]) -> set[fx.Node]:
    """The nodes whose results lie in memory; what is used twice and reads many buffers is not computed twice."""
    needed, found = _needed(wanted), set[fx.Node]()
    for node in nodes:
        shared = _is_fused(node) and not _is_view(node) and len(node.users) > 1
        often = shared and len(_buffers_read(node, found)) > MOST_READS
        if node in needed and (often or _has_buffer(node, wanted, needed)):
            found.add(node)
    return found


def _has_buffer(node: fx.Node, wanted: set[fx.Node], needed: set[fx.Node]) -> bool:
    if node.op == "placeholder":
        return True
    if node.op != "call_function" or _is_view(node):
        return False
    if node in wanted or not _is_fused(node) or _name(node) in _REDUCTIONS:
        return True
    return any(not _is_fused(reader) for reader in _readers(node) if reader in needed)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads it, looking through views."""
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        elif user.op != "output":
            yield user


def _buffers_read(node: fx.Node, buffers: set[fx.Node]) -> set[fx.Node]:
    """The buffers that a kernel reads, looking through views and what is fused into it."""
    found: set[fx.Node] = set()
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in buffers:
            found.add(source)
        else:
            waiting += source.all_input_nodes
    return found


def _same_places(source: fx.Node, node: fx.Node, buffers: set[fx.Node]) -> bool:
    """Whether each element of `node` is made of the element of `source`, one of the buffers it reads, in its place."""
    path: dict[fx.Node, bool] = {}

    def leads(reader: fx.Node) -> bool:
        """Whether it is made of the source at all; notes in `path` whether element by element."""
        found, made = False, reader.meta["val"]
        for given in reader.all_input_nodes:
            root = _root(given)
            if root is source or (root not in buffers and root in path) or (root not in buffers and leads(root)):
                value, whole = given.meta["val"], root.meta["val"]
                alike = value.shape == made.shape and value.stride() == made.stride()
                path[reader] = path.get(reader, True) and alike and value.numel() == whole.numel()
                found = True
        return found

    return leads(node) and all(path.values())


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_function" and _name(node) == "getitem":  # a piece of what was split
        return _is_view(node.all_input_nodes[0])
    return node.op == "call_function" and _name(node) in _VIEWS


def _is_planned(node: fx.Node) -> bool:
    """Whether the compiler allocates its buffer, not the operation itself."""
    return _is_fused(node) or _name(node) in ("mm", "addmm", "bmm", "baddbmm")


def _is_fused(node: fx.Node) -> bool:
    """Whether a generated kernel computes it, not a library's."""
    if node.op != "call_function" or _name(node) == "getitem":
        return False
    return not any(word in str(node.target) for word in _EXTERN_WORDS)


def _iterated(node: fx.Node) -> int:
    """Elements that a generated kernel for it walks over."""
    source = node.all_input_nodes[0] if _name(node) in _REDUCTIONS else node
    value = source.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", str(target))


def _root(node: fx.Node) -> fx.Node:
    """The node whose buffer it is a view of."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _outputs(graph: fx.GraphModule) -> list[fx.Node]:
    values: Any = next(iter(graph.graph.find_nodes(op="output"))).args[0]
    return [value for value in values if isinstance(value, fx.Node)]


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _line(node: fx.Node) -> Line:
    value = node.meta.get("val")
    return line_of(value.numel() * value.element_size()) if isinstance(value, Tensor) else Line(0, 0)


def _typical(node: fx.Node) -> int:
    """Its bytes in a micro-batch of usual size."""
    return _line(node).bytes(TYPICAL_TOKENS)


def _begins_with_scratch(node: fx.Node) -> bool:
    """Whether a library's kernel takes its scratch before what it returns."""
    return any(word in str(node.target) for word in ("frozen_product", "dropped_grad_A"))


def _workspace(node: fx.Node, stored: str) -> list[Line]:
    """What a library's kernel takes beside what it returns."""
    values: list[Any] = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
    if "dropped_grad_A" in str(node.target):  # sums over parts of the tokens, added up at the end
        grads: Any = node.args[0]
        each = grads[0].meta["val"].shape[1] * values[1].shape[1] * 4
        return [Line(GRADIENT_PARTS * len(grads) * each, 0)]
    if "frozen_product" not in str(node.target):
        return kernel_lines(node.target, values)
    if "frozen_product_fp8" in str(node.target):
        return [Line(values[2].numel(), 0)]
    element_bytes, (out, inner) = values[0].element_size(), values[4]
    return [Line(out * inner * element_bytes, 0)] * (2 if stored == "int8" else 1)
