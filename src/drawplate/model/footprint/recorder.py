"""Names for the blocks of memory that come and go while something runs, and a watch over what runs without data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from drawplate.layout.footprint import Line, Trace

TRACED_TOKENS = 2161
"""Prime, and a divisor of no model's sizes: a tensor grows with the tokens if its size is a multiple."""
TRACED_BORDERS = 68
"""Of a packed row, with the first and the last: one more than its documents."""
ATTENTION_BLOCK = 128
"""Attention's backward has room for so many queries more of each document."""
EXTRA_BYTES = (0, 256)
"""What a kernel may take beside what grows with the tokens: cuDNN's aligns its block so."""


@dataclass(frozen=True)
class Sizes:
    """How the bytes of a block grow with the micro-batch, read off one size with TRACED_TOKENS tokens.

    Args:
        fixed: sizes in bytes that are known not to grow, such as those of weights.
    """

    fixed: frozenset[int] = frozenset()

    def line_of(self, size: int) -> Line:
        """The line on which a block of `size` bytes lies."""
        padded = TRACED_TOKENS + ATTENTION_BLOCK * (TRACED_BORDERS - 1)
        for more in () if size in self.fixed else EXTRA_BYTES:
            if size > more and (size - more) % TRACED_TOKENS == 0:
                return Line(more, (size - more) / TRACED_TOKENS)
            if size > more and (size - more) % padded == 0:
                return Line(more, (size - more) / padded, ATTENTION_BLOCK * (size - more) / padded)
        return Line(size, 0)


class Recorder:
    """Blocks by name, in the order in which they come and go."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Line | None]] = []
        self._count = 0

    def take(self, line: Line) -> str:
        """A new block; returns its name."""
        self._count += 1
        name = f"b{self._count}"
        self.events.append((name, line))
        return name

    def give(self, name: str) -> None:
        """It is let go of."""
        self.events.append((name, None))

    def pass_by(self, *lines: Line) -> None:
        """Blocks that are there for a moment."""
        for name in reversed([self.take(line) for line in lines]):
            self.give(name)

    def cut(self, start: int, end: int | None, names: Mapping[str, str]) -> Trace:
        """The events from `start` to `end`, some blocks under other names."""
        return tuple((names.get(name, name), line) for name, line in self.events[start:end])


class Watch(TorchDispatchMode):
    """Records the storages that operations make, until they are let go of."""

    def __init__(self, recorder: Recorder, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.recorder = recorder
        self._names: dict[int, str] = {}
        self._sizes = Sizes()
        self.know(*known)

    def __call__(self) -> Watch:
        """Itself, to be entered as often as there are stretches of a run."""
        return self

    def know(self, *tensors: Tensor) -> None:
        """These were there before."""
        self._names |= {self.key_of(tensor): "" for tensor in tensors}

    def key_of(self, tensor: Tensor) -> int:
        """By which its block is known as long as it is there."""
        return tensor.untyped_storage()._cdata

    def name_of(self, key: int) -> str:
        """The block; empty for one that was known before."""
        return self._names.get(key, "")

    def block_of(self, tensor: Tensor) -> str:
        """The block that a tensor lies in."""
        return self.name_of(self.key_of(tensor))

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
        self._names[key] = self.recorder.take(self._sizes.line_of(storage.nbytes()))
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
    padded = [Line(0, each, ATTENTION_BLOCK * each) for each in (sums, accumulator)]
    return padded + [Line(0, expanded)] * (2 if expanded else 0)
