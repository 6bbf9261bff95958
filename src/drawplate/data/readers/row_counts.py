"""What was met in the rows of one table: refused, mended, remarked on; for the screen and for the line of intake."""

from __future__ import annotations

from collections.abc import Sequence

from drawplate.data.left_out import LeftOut
from drawplate.data.readers.rows import Text
from drawplate.units import format_count, plural


class RowCounts:
    """What was met in the rows of one table."""

    def __init__(self) -> None:
        self.refused: list[tuple[int, str]] = []
        self.removed = 0
        self._mended = self._first_mended = self._alone = 0
        self._said: list[tuple[int, str]] = []

    def refuse(self, number: int, reason: str) -> None:
        """A row that cannot be used."""
        self.refused.append((number, reason))

    def add(self, number: int, text: Text, *, alone: bool) -> None:
        """A row that is read; `alone` where it has no group."""
        self._first_mended = self._first_mended or (number if text.mended else 0)
        self._mended += text.mended
        self._alone += alone
        self._said += [(number, remark) for remark in text.remarks]

    def tell(self, name: str, left_out: LeftOut, guesses: Sequence[str]) -> None:
        """The screen's part of it."""
        for number, reason in self.refused:
            left_out.row(name, number, reason)
        for guess in guesses:
            left_out.remark(name, guess)
        for number, remark in self._said:
            left_out.remark(name, remark, number)
        if self._mended:
            left_out.remark(name, mended(self._mended))

    def remarks(self, guesses: Sequence[str], group_by: str | None) -> list[str]:
        """The part of the file's line of intake."""
        remarks = list(guesses)
        for reason in dict.fromkeys(reason for _, reason in self.refused):
            numbers = [number for number, other in self.refused if other == reason]
            remarks.append(f"{plural(len(numbers), 'row')} refused, the first at row {numbers[0]}: {reason}")
        for said in dict.fromkeys(remark for _, remark in self._said):
            numbers = [number for number, other in self._said if other == said]
            remarks.append(f"{plural(len(numbers), 'row')}, the first is row {numbers[0]}: {said}")
        if self.removed:
            remarks.append(cut_out(self.removed))
        if self._mended:
            remarks.append(mended(self._mended))
        if self._alone:
            without = f"{plural(self._alone, 'row')} without {group_by}"
            remarks.append(f"{without}: each is a group of its own")
        return remarks


def mended(count: int) -> str:
    """Characters of a text that were changed, in words."""
    return f"{format_count(count)} control or broken characters mended"


def cut_out(count: int) -> str:
    """What the split pattern matched, in words."""
    return f"data.split_pattern took out {format_count(count)} characters"
