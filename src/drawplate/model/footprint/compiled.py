"""What a compiled decoder layer holds, from the graphs that the compiler would make of it.

AOTAutograd's joint graph, cut in two by the partitioner that torch.compile uses (min-cut with recomputation), gives the
tensors saved for backward exactly. When the blocks of the two halves come and go is found by walking them
(model/footprint/compiled_walk.py) under the rules by which the compiler makes kernels
(model/footprint/compiled_kernels.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from drawplate.layout.footprint import INPUT, WEIGHT, Footprint, Trace
from drawplate.model.footprint.compiled_nodes import name_of, outputs_of, root_of
from drawplate.model.footprint.compiled_walk import Walk
from drawplate.model.footprint.recorder import Recorder, line_of
from drawplate.model.footprint.trial import Trial
from drawplate.model.layer.frozen_linear import WHOLE

Halves = tuple[fx.GraphModule, fx.GraphModule]
"""A forward and a backward."""


@dataclass(frozen=True)
class Graphs:
    """The compiled layer's: each a forward and a backward, and the names of the tensors that are its first inputs.

    `again` is that of the layer as it is computed a second time for its backward alone.
    """

    once: Halves
    again: Halves
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, trial: Trial) -> Graphs:
        """As the compiler makes them; takes half a second."""
        once, again = _graphs(trial)
        return cls(once, again, tuple(trial.tensors))


def compiled_footprint(trial: Trial, graphs: Graphs) -> Footprint:
    """The traces of the compiled layer."""
    weights = _whole_weights(trial, graphs.tensors)
    alone, stored = _inference_graph(graphs.once[0]), trial.mode.stored
    inference = _traced_forward(alone, weights, stored)
    out = {inference.names[root_of(outputs_of(alone)[0])]: "out"}
    trace = inference.recorder.cut(0, None, out)
    forward, backward, _ = _traced_halves(graphs.again, weights, stored, again=True)
    again = Footprint(inference=trace, forward=forward, backward=backward)
    forward, backward, kept = _traced_halves(graphs.once, weights, stored)
    hidden = f"primals_{len(graphs.tensors) + 1}"
    saved = tuple(INPUT if node.name == hidden else name for node, name in kept.items() if name or node.name == hidden)
    return Footprint(inference=trace, forward=forward, backward=backward, saved=saved, again=again)


def _traced_halves(
    halves: Halves, weights: tuple[Trace, dict[str, str]], stored: str, *, again: bool = False
) -> tuple[Trace, Trace, dict[fx.Node, str]]:
    """Forward, backward, and what is kept between them in the order in which autograd does, each with its block (none
    for what the layer was given); with `again` the output is let go of between them."""
    forward, backward = halves
    training = _traced_forward(forward, weights, stored)
    out, *saved = outputs_of(forward)
    names = {node.name: training.names[root_of(node)] for node in saved if root_of(node) in training.names}
    back = Walk(backward, names, outputs_of(backward), training.recorder, stored)
    start, made = len(training.recorder.events), training.names.get(root_of(out), "")
    if again and made and made not in names.values():
        training.recorder.give(made)
    back.run()
    *gradients, grad_in = [back.names.get(root_of(node), "") for node in outputs_of(backward)]
    meanings = {name: f"grad:{i}" for i, name in enumerate(gradients)} | {grad_in: "grad_in"}
    for_training = {made: "out"} if made and not again else {}
    kept = {root_of(node): training.names.get(root_of(node), "") for node in _in_order_of_saving(forward)}
    events = training.recorder
    return events.cut(0, start, for_training), events.cut(start, None, for_training | meanings), kept


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


def _graphs(trial: Trial) -> tuple[Halves, Halves]:
    """The layer in training, and as it is computed a second time."""
    compiler = _Compiler.imported()
    names = list(trial.tensors)
    leaves, structure = pytree.tree_flatten(trial.arguments)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]  # the rest, such as a dict class, is constant
    wanted = [tensor.requires_grad_() for tensor in (*trial.trained.values(), trial.hidden)]
    flat = [*trial.tensors.values(), trial.hidden, *(leaves[i] for i in at)]
    found: dict[str, fx.GraphModule] = {}
    again: list[Halves] = []

    def keep(which: str) -> Any:
        def compile_(graph: fx.GraphModule, _: Any) -> Any:
            found[which] = graph
            return compiler.make_boxed_func(graph.forward)

        return compile_

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        if trial.unused:
            again.append(compiler.partition(_without_unused(joint), inputs, compiler="inductor", **options))
        return compiler.partition(joint, inputs, compiler="inductor", **options)

    def run(*values: Any) -> Tensor:
        tensors = dict(zip(names, values, strict=False))
        given = dict(zip(at, values[len(names) + 1 :], strict=True))
        arguments = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        return trial.call(tensors, values[len(names)], pytree.tree_unflatten(arguments, structure))

    traced = compiler.aot_function(run, keep("forward"), keep("backward"), partition, compiler.decompositions())
    with _as_if_compiling():
        out = traced(*flat)
        torch.autograd.grad(out, wanted, torch.empty_like(out))
    once = (found["forward"], found["backward"])
    return once, again[0] if again else once


def _without_unused(joint: fx.GraphModule) -> fx.GraphModule:
    """A copy whose output lacks the summands that no gradient needs (model/support/unused_products.py)."""
    graph = fx.Graph()
    copied: Any = graph.graph_copy(joint.graph, {})
    out, *gradients = copied
    needed, waiting = set[fx.Node](), [node for node in gradients if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    while out not in needed and (found := [n for n in out.all_input_nodes if n in needed] or _alone(out)):
        out = found[0]
    graph.output((out, *gradients))
    end = next(iter(graph.find_nodes(op="output")))
    end.meta = dict(next(iter(joint.graph.find_nodes(op="output"))).meta)
    graph.eliminate_dead_code()
    return fx.GraphModule(joint, graph)


def _inference_graph(forward: fx.GraphModule) -> fx.GraphModule:
    """The forward that saves nothing, in the order that the compiler gives to such graphs alone."""
    graph = fx.Graph()
    out = graph.graph_copy(forward.graph, {})
    graph.output((out[0],))  # type: ignore[index]
    graph.eliminate_dead_code()
    _Compiler.imported().reorder_for_locality(graph)
    return fx.GraphModule(forward, graph)


def _in_order_of_saving(forward: fx.GraphModule) -> list[fx.Node]:
    """What a graph returns beside its output. The partitioner puts it in the order of the nodes, once the compiler has
    replaced aliases (of attention's output) by what they are aliases of; here they are still there, at the end."""
    place = {node: i for i, node in enumerate(forward.graph.nodes)}

    def at(node: fx.Node) -> int:
        return at(node.all_input_nodes[0]) if name_of(node) == "alias" else place[node]

    return sorted(outputs_of(forward)[1:], key=at)


def _alone(node: fx.Node) -> list[fx.Node]:
    """What a node is made of where that is one other."""
    return node.all_input_nodes if len(node.all_input_nodes) == 1 else []


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


def _traced_forward(graph: fx.GraphModule, weights: tuple[Trace, dict[str, str]], stored: str) -> Walk:
    """The layer is dequantized, called, and the weights are let go of unless they are among what is kept."""
    made, blocks = weights
    recorder, outputs = Recorder(), outputs_of(graph)
    recorder.events += [(f"{WEIGHT}{name}", line) for name, line in made]
    walk = Walk(
        graph,
        {name: f"{WEIGHT}{block}" for name, block in blocks.items()},
        outputs,
        recorder,
        stored,
        release_inputs=False,
    )
    walk.run()
    kept = {walk.names.get(root_of(node)) for node in outputs}
    for block in blocks.values():
        if f"{WEIGHT}{block}" not in kept:
            recorder.give(f"{WEIGHT}{block}")
    return walk
