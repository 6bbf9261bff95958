"""Blocks of a device by name, each on a line of the ledger, and the highest moment of a phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from drawplate.planner.bytes.allocator import CachingAllocator, ProcessMemory

Name = tuple[object, ...]


@dataclass
class Moment:
    """The highest moment of a phase: bytes by line, and the most that the allocator reserved in the phase."""

    name: str = ""
    lines: dict[str, int] = field(default_factory=dict)
    allocated: int = 0
    reserved: int = 0


@dataclass
class Device:
    """Blocks by name, each on a line, and the highest moment since `begin`."""

    memory: CachingAllocator | ProcessMemory
    now: str = ""
    totals: dict[str, int] = field(default_factory=dict)
    highest: Moment = field(default_factory=Moment)
    capturing: bool = False
    _line_of: dict[Name, tuple[str, int]] = field(default_factory=dict)

    def begin(self) -> None:
        """A new phase: what is held now is its first moment."""
        self.memory.highest_reserved = self.memory.reserved
        self.highest = Moment(self.now, dict(self.totals), self.memory.allocated)

    def end(self) -> Moment:
        """The phase's highest moment."""
        self.highest.reserved = self.memory.highest_reserved
        return self.highest

    def begin_capture(self) -> None:
        """From now on blocks are a CUDA graph's."""
        assert isinstance(self.memory, CachingAllocator)
        self.memory.begin_capture()
        self.capturing = True

    def end_capture(self) -> None:
        """They are the process's again, where they were a graph's."""
        if self.capturing and isinstance(self.memory, CachingAllocator):
            self.memory.end_capture()
        self.capturing = False

    def forget_capture(self) -> None:
        """Captured micro-steps give their memory back."""
        if isinstance(self.memory, CachingAllocator):
            self.memory.forget_capture()

    def take(self, line: str, name: Name, size: int) -> None:
        """A new block."""
        taken = self.memory.take(name, size)
        self._line_of[name] = (line, taken)
        self.totals[line] = self.totals.get(line, 0) + taken
        if self.memory.allocated > self.highest.allocated:
            self.highest = Moment(self.now, dict(self.totals), self.memory.allocated)

    def give(self, name: Name) -> None:
        """A block is let go of."""
        line, taken = self._line_of.pop(name)
        self.totals[line] -= taken
        self.memory.give(name)

    def give_all(self, names: Iterable[Name]) -> None:
        """Several."""
        for name in list(names):
            self.give(name)

    def rename(self, old: Name, new: Name, line: str = "") -> None:
        """The same block under another name, and perhaps on another line."""
        was, taken = self._line_of.pop(old)
        self._line_of[new] = (line or was, taken)
        self.memory.rename(old, new)
        if line and line != was:
            self.totals[was] -= taken
            self.totals[line] = self.totals.get(line, 0) + taken

    def has(self, name: Name) -> bool:
        """Whether there is such a block."""
        return name in self._line_of
