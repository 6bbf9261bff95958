"""Which operations share a launch, and over which of its inputs a kernel writes, on small graphs."""

from __future__ import annotations

import torch
from torch import fx

from drawplate.model.footprint.compiled_kernels import kernels_of
from drawplate.model.footprint.compiled_nodes import in_order_of_loads

aten = torch.ops.aten


class Graph:
    """A graph of square matrices."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def given(self, name: str) -> fx.Node:
        return self._known(self.graph.placeholder(name))

    def call(self, operation: object, *args: fx.Node) -> fx.Node:
        return self._known(self.graph.call_function(operation, args))  # type: ignore[arg-type]

    def launches(self, *wanted: fx.Node) -> list[set[str]]:
        self.graph.output(wanted)
        return [{node.name for node in kernel.writes} for kernel in kernels_of(list(self.graph.nodes), set(wanted))]

    @staticmethod
    def _known(node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.empty(8, 8, device="meta", dtype=torch.bfloat16)
        return node


def gated(*, dependent: bool) -> tuple[Graph, list[fx.Node], fx.Node, fx.Node]:
    """A hidden product for an adapter's gradient, and the gradient of one of its factors, which reads the other."""
    graph = Graph()
    x, weight = graph.given("x"), graph.given("weight")
    gate, up = graph.call(aten.mm.default, x, weight), graph.call(aten.mm.default, weight, x)
    hidden = graph.call(aten.mul.Tensor, gate, up)
    for_adapter = graph.call(aten.mm.default, x, hidden)
    incoming = graph.call(aten.mm.default, for_adapter if dependent else x, x)
    gradient = graph.call(aten.mul.Tensor, incoming, gate)
    return graph, [for_adapter, graph.call(aten.mm.default, gradient, weight)], hidden, gradient


def test_what_reads_the_same_and_is_not_needed_before_waits_for_a_later_launch() -> None:
    graph, wanted, hidden, gradient = gated(dependent=False)
    launches = graph.launches(*wanted)
    together = launches.index({hidden.name, gradient.name})
    assert launches.index({wanted[0].name}) > together, "and whoever reads it waits too"


def test_it_does_not_wait_for_what_is_made_of_it() -> None:
    graph, wanted, hidden, gradient = gated(dependent=True)
    launches = graph.launches(*wanted)
    assert {hidden.name} in launches
    assert {gradient.name} in launches


def test_buffers_are_loaded_in_the_order_of_the_expression() -> None:
    graph = Graph()
    b, a, c = graph.given("b"), graph.given("a"), graph.given("c")
    inner = graph.call(aten.mul.Tensor, c, a)
    outer = graph.call(aten.add.Tensor, b, inner)
    assert in_order_of_loads(outer, {a, b, c}) == [b, c, a]
    assert in_order_of_loads(outer, {a}) == [a]
