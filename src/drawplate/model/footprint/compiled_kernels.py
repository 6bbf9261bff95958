"""Which operations of a compiled graph share a kernel, and which of their results lie in memory.

The compiler's rules (torch/_inductor: lowering.py, ir.py, scheduler.py): matrix products, attention and the like have
buffers of their own; pointwise operations are fused into whoever reads them; those that read the same buffers and have
the same size share a kernel, an earlier one waiting for a later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from drawplate.model.footprint.compiled_nodes import (
    REDUCTIONS,
    buffers_read,
    is_fused,
    is_view,
    iterated,
    name_of,
    readers_of,
    root_of,
)

MOST_READS = 4
"""The compiler's `realize_reads_threshold`."""


@dataclass
class Kernel:
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


def kernels_of(nodes: list[fx.Node], wanted: set[fx.Node]) -> list[Kernel]:
    """The launches, in order; operations that read the same and have the same size are launched together."""
    buffers = _buffers(nodes, wanted)
    kernels: list[Kernel] = []
    made_by: dict[fx.Node, int] = {}
    for node in _realized(nodes, buffers):
        if name_of(node) == "getitem":
            made_by[node] = made_by[node.all_input_nodes[0]]
            kernels[made_by[node]].reads_of[node] = set()
            continue
        kernel = Kernel({node: buffers_read(node, buffers)}, iterated(node), is_fused(node))
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
            kernels[i] = Kernel({}, 0, generated=False)
    return _side_by_side([kernel for kernel in kernels if kernel.reads_of])


def _side_by_side(kernels: list[Kernel]) -> list[Kernel]:
    """Launches that read the same buffers go together, whatever lies between, unless one waits for the other."""
    for kernel in list(kernels):
        for other in kernels[: next(i for i, each in enumerate(kernels) if each is kernel)]:
            alike = kernel.generated and other.generated and other.size == kernel.size and other.reads & kernel.reads
            if not alike or _waits(kernel, other, kernels):
                continue
            kernel.reads_of = other.reads_of | kernel.reads_of
            kernels.remove(other)
            kernels[:] = _in_order(kernels)
    return kernels


def _waits(kernel: Kernel, other: Kernel, kernels: list[Kernel]) -> bool:
    """Whether a launch needs what an earlier one makes, if only by way of others."""
    after = set(other.writes)
    for each in kernels[next(i for i, each in enumerate(kernels) if each is other) + 1 :]:
        if each.reads & after:
            if each is kernel:
                return True
            after |= set(each.writes)
    return False


def _in_order(kernels: list[Kernel]) -> list[Kernel]:
    """Each after those that make what it reads, else as they are."""
    made, left = {node for kernel in kernels for node in kernel.writes}, list(kernels)
    order: list[Kernel] = []
    while left:
        ready = next(kernel for kernel in left if not kernel.reads & made)
        left.remove(ready)
        made -= set(ready.writes)
        order.append(ready)
    return order


def _realized(nodes: list[fx.Node], buffers: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes with buffers in the order in which the compiler decides that they have one: a pointwise operation with
    one user when a library's kernel comes to read it, or at the end."""

    def waits(node: fx.Node) -> bool:
        return is_fused(node) and len(node.users) == 1 and name_of(node) not in REDUCTIONS

    waiting = {node for node in buffers if node.op != "placeholder" and waits(node)}
    for node in nodes:
        if node not in buffers or node.op == "placeholder" or node in waiting:
            continue
        if not is_fused(node):
            for source in dict.fromkeys(root_of(given) for given in node.all_input_nodes):
                if source in waiting:
                    waiting.remove(source)
                    yield source
        yield node
    yield from (node for node in nodes if node in waiting)


def _joining(kernels: list[Kernel], home: int) -> list[int]:
    """The earlier launches that can wait for that one and go with it: it reads what they make, and nobody before."""
    kernel, found = kernels[home], []
    for i, other in enumerate(kernels[:home]):
        made = set(other.writes)
        waits = other.generated and other.size == kernel.size and made & kernel.reads
        if waits and not any(made & later.reads for later in kernels[i + 1 : home]):
            found.append(i)
    return found


def _home(kernels: list[Kernel], kernel: Kernel, ready: int) -> int | None:
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
        shared = is_fused(node) and not is_view(node) and len(node.users) > 1
        often = shared and len(buffers_read(node, found)) > MOST_READS
        if node in needed and (often or _has_buffer(node, wanted, needed)):
            found.add(node)
    return found


def _has_buffer(node: fx.Node, wanted: set[fx.Node], needed: set[fx.Node]) -> bool:
    if node.op == "placeholder":
        return True
    if node.op != "call_function" or is_view(node):
        return False
    if node in wanted or not is_fused(node) or name_of(node) in REDUCTIONS:
        return True
    return any(not is_fused(reader) for reader in readers_of(node) if reader in needed)
