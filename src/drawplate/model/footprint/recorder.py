"""Records the blocks of memory that come and go while something runs without data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from drawplate.layout.footprint import TRIAL, Line, Trace

TRACED_TOKENS = 1021
"""Prime, and a divisor of no model's sizes: a tensor grows with the tokens if its size is a multiple."""
TRACED_BORDERS = 67
"""The same for the borders of a packed row, as far as they matter."""
BACKWARD_BLOCK = 128
"""Attention's backward rounds each document up to so many queries."""

KEPT = Line(-1, 0)
"""Stands for the release of a block that did not come to pass."""


def line_of(size: int) -> Line:
    """The line on which a tensor of `size` bytes lies that was made with TRACED_TOKENS tokens."""
    return Line(0, size / TRACED_TOKENS) if size % TRACED_TOKENS == 0 else Line(size, 0)


class Recorder:
    """Blocks by name, in the order in which they come and go."""

    def __init__(self, prefix: str = "b") -> None:
        self.events: list[tuple[str, Line | None]] = []
        self._prefix, self._count = prefix, 0

    def take(self, line: Line, before: str = "") -> str:
        """A new block; returns its name, which has that before it."""
        self._count += 1
        name = f"{before}{self._prefix}{self._count}"
        self.events.append((name, line))
        return name

    def give(self, name: str) -> None:
        """It is let go of."""
        self.events.append((name, None))

    def pass_by(self, *lines: Line) -> None:
        """Blocks that are there for a moment."""
        for name in reversed([self.take(line) for line in lines]):
            self.give(name)

    def try_out(self, copies: Sequence[Line]) -> None:
        """A kernel is tried, with copies of what it writes in place; one of nothing where it writes nothing so."""
        names = []
        for line in copies or [Line(0, 0)]:
            self._count += 1
            names.append(f"{TRIAL}{self._count}")
            self.events.append((names[-1], line))
        for name in names:
            self.give(name)

    def cut(self, start: int, end: int | None, names: Mapping[str, str]) -> Trace:
        """The events from `start` to `end`, some blocks under other names."""
        return tuple((names.get(name, name), line) for name, line in self.events[start:end] if line != KEPT)

    def peaks(self, marks: Sequence[int]) -> list[int]:
        """The most bytes held up to each of those places in the events, since the one before."""
        held, found, begin, sizes = 0, [], 0, dict[str, int]()
        for end in marks:
            highest = held
            for name, line in self.events[begin:end]:
                held += line.bytes(TRACED_TOKENS) if line else -sizes.pop(name, 0)
                if line:
                    sizes[name] = line.bytes(TRACED_TOKENS)
                highest = max(highest, held)
            found.append(highest)
            begin = end
        return found


class Watch(TorchDispatchMode):
    """Records the storages that operations make, until they are let go of."""

    def __init__(self, recorder: Recorder, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.recorder = recorder
        self._names = {tensor.untyped_storage()._cdata: "" for tensor in known}

    def name_of(self, tensor: Tensor) -> str:
        """The block that a tensor lies in; empty for one that was known before."""
        return self._names.get(tensor.untyped_storage()._cdata, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.recorder.pass_by(*kernel_lines(func, args))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._names or storage.nbytes() == 0:
            return
        self._names[key] = self.recorder.take(line_of(storage.nbytes()))
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        name = self._names.pop(key, "")
        if name:
            self.recorder.give(name)


def kernel_lines(operator: Any, args: Any) -> list[Line]:
    """What a kernel takes for itself while it runs, block by block.

    FlashAttention's backward accumulates the queries' gradient in float32 and, where several query heads share a key
    head, makes keys' and values' gradients for every query head before it adds them up; it rounds every document up to
    128 queries (csrc/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd). cuDNN's takes the same in one block.
    """
    name = str(operator)
    if "for_cpu" in name or not ("attention_backward" in name or "attn_backward" in name):
        return []
    query, key = [a for a in args if isinstance(a, Tensor)][1:3]
    heads, size, key_heads = query.shape[1], query.shape[-1], key.shape[1]
    sums, accumulator = 4 * heads, 4 * heads * (-(-size // 32) * 32)
    expanded = heads * size * query.element_size() if key_heads != heads else 0
    if query.dim() == 4:
        return [Line(0, sums + accumulator + 2 * expanded)]
    padded = [Line(0, each, BACKWARD_BLOCK * each) for each in (sums, accumulator)]
    return padded + [Line(0, expanded)] * (2 if expanded else 0)
