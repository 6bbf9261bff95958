"""What the compiler makes of a single operation: fused or a library's, in a buffer of its own or not, and its bytes.

A node of a graph by AOTAutograd in, facts out. Left out: operations that no decoder layer has been seen to use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from drawplate.layout.footprint import Line
from drawplate.model.base.precision import PLAIN_DTYPES
from drawplate.model.footprint.recorder import kernel_lines, line_of

_VIEWS = {
    "view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "detach",
    "as_strided", "reshape", "split", "split_with_sizes", "unbind", "_unsafe_view", "unflatten",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax", "amin", "var_mean", "var", "prod", "any", "all", "_softmax"}
GRADIENT_PARTS = 16
"""`PARTS` of kernels/dropped_product_triton.py, which cannot be imported without Triton."""
TYPICAL_TOKENS = 4096
"""The compiler orders kernels by sizes, which are not known yet."""
_EXTERN_WORDS = (
    "mm",
    "attention",
    "attn",
    "frozen_product",
    "adapted_products",
    "dropped_",
    "bitsandbytes",
    "convolution",
    "sort",
    "index_put",
)


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads it, looking through views."""
    for user in node.users:
        if is_view(user):
            yield from readers_of(user)
        elif user.op != "output":
            yield user


def buffers_read(node: fx.Node, buffers: set[fx.Node]) -> set[fx.Node]:
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


def in_order_of_loads(node: fx.Node, buffers: set[fx.Node]) -> list[fx.Node]:
    """Some of the buffers that a kernel reads, as its expression comes to them: from left to right, depth first."""
    found, seen = dict[fx.Node, None](), set[fx.Node]()

    def visit(reader: fx.Node) -> None:
        for source in reader.all_input_nodes:
            if source in buffers:
                found[source] = None
            elif source not in seen and source.op != "placeholder":
                seen.add(source)
                visit(source)

    visit(node)
    return list(found)


def same_places(source: fx.Node, node: fx.Node, buffers: set[fx.Node]) -> bool:
    """Whether each element of `node` is made of the element of `source`, one of the buffers it reads, in its place."""
    path: dict[fx.Node, bool] = {}

    def leads(reader: fx.Node) -> bool:
        """Whether it is made of the source at all; notes in `path` whether element by element."""
        found, made = False, reader.meta["val"]
        for given in reader.all_input_nodes:
            root = root_of(given)
            if root is source or (root not in buffers and root in path) or (root not in buffers and leads(root)):
                value, whole = given.meta["val"], root.meta["val"]
                alike = value.shape == made.shape and value.stride() == made.stride()
                path[reader] = path.get(reader, True) and alike and value.numel() == whole.numel()
                found = True
        return found

    return leads(node) and all(path.values())


def is_view(node: fx.Node) -> bool:
    """Whether it only looks at another node's buffer."""
    if node.op == "call_function" and name_of(node) == "getitem":  # a piece of what was split
        return is_view(node.all_input_nodes[0])
    return node.op == "call_function" and name_of(node) in _VIEWS


def is_planned(node: fx.Node) -> bool:
    """Whether the compiler allocates its buffer, not the operation itself."""
    return is_fused(node) or name_of(node) in ("mm", "addmm", "bmm", "baddbmm")


def is_fused(node: fx.Node) -> bool:
    """Whether a generated kernel computes it, not a library's."""
    if node.op != "call_function" or name_of(node) == "getitem":
        return False
    return not any(word in str(node.target) for word in _EXTERN_WORDS)


def iterated(node: fx.Node) -> int:
    """Elements that a generated kernel for it walks over."""
    source = node.all_input_nodes[0] if name_of(node) in REDUCTIONS else node
    value = source.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def name_of(node: fx.Node) -> str:
    """Of its operation."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", str(target))


def root_of(node: fx.Node) -> fx.Node:
    """The node whose buffer it is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def outputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    """What a graph returns."""
    values: Any = next(iter(graph.graph.find_nodes(op="output"))).args[0]
    return [value for value in values if isinstance(value, fx.Node)]


def dtype_of(node: fx.Node) -> torch.dtype:
    """Of its result."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def line_of_node(node: fx.Node) -> Line:
    """Bytes of its result."""
    value = node.meta.get("val")
    return line_of(value.numel() * value.element_size()) if isinstance(value, Tensor) else Line(0, 0)


def typical_bytes(node: fx.Node) -> int:
    """Its bytes in a micro-batch of usual size."""
    return line_of_node(node).bytes(TYPICAL_TOKENS)


def begins_with_scratch(node: fx.Node) -> bool:
    """Whether a library's kernel takes its scratch before what it returns."""
    return dequantizes_first(node) or "dropped_grad_A" in str(node.target)


def dequantizes_first(node: fx.Node) -> bool:
    """Whether that is a weight."""
    return "frozen_product" in str(node.target)


def weight_after(node: fx.Node, stored: str) -> list[Line]:
    """Of one of the products that a library's kernel makes one after another, what it dequantizes once there is room
    for that product."""
    if name_of(node) != "getitem" or "adapted_products" not in str(node.all_input_nodes[0].target):
        return []
    args: Any = node.all_input_nodes[0].args
    if args[2] in PLAIN_DTYPES:  # dequantized before the layer was called
        return []
    x, lora_B = args[0].meta["val"], args[5][node.args[1]].meta["val"]
    return [Line(lora_B.shape[0] * x.shape[-1] * x.element_size(), 0)] * (2 if stored == "int8" else 1)


def workspace_of(node: fx.Node, stored: str) -> list[Line]:
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
