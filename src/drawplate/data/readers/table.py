"""What every reader of a table hands on: numbered rows, and what a person should know of how they were read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
RowOrProblem = tuple[int, Row | ValueError]


class FileRefused(Exception):
    """A file that cannot be used; the message is the reason shown to the user."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a file, read as they are asked for.

    Attributes:
        rows: number and row, or number and why it cannot be used.
        remarks: guesses that were made, like an encoding; complete when the first row has been read.
    """

    rows: Iterator[RowOrProblem]
    remarks: list[str] = field(default_factory=list)


def require_single(names: list[str], wanted: tuple[str, ...]) -> None:
    """Refuse a header that has a column twice, where that column would be read.

    Raises:
        FileRefused: it has; nobody can tell which of the two is meant.
    """
    for name in wanted:
        places = [str(i) for i, other in enumerate(names, start=1) if other == name]
        if len(places) > 1:
            raise FileRefused(f"the column {name} is there twice (columns {' and '.join(places)}); rename one of them")
