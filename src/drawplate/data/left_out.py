"""What was left out or guessed at, in one line each, for the screen: the same things that the lines of intake count.

A line is of a reason, over all files, and names the first file and row, which is where to look.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from drawplate.records import Intake
from drawplate.units import format_count

MOST_LINES = 12


@dataclass
class _Cases:
    """Where one thing was met: how often in each file, and the first row."""

    files: dict[str, int] = field(default_factory=dict)
    first_row: str = ""

    @property
    def count(self) -> int:
        return sum(self.files.values())

    @property
    def first(self) -> str:
        """The first file, with its row where there is one."""
        name = next(iter(self.files))
        return f"{self.first_row} of {name}" if self.first_row else name


class LeftOut:
    """Gathered while files are read."""

    def __init__(self) -> None:
        self._files: dict[str, _Cases] = {}
        self._rows: dict[str, _Cases] = {}
        self._said: dict[str, _Cases] = {}

    def file(self, name: str, reason: str) -> None:
        """A file that is not read."""
        _note(self._files, reason, name)

    def row(self, name: str, number: int, reason: str) -> None:
        """A row that is not read."""
        _note(self._rows, reason, name, number)

    def remark(self, name: str, remark: str, number: int | None = None) -> None:
        """A file or row that is read, and how."""
        _note(self._said, remark, name, number)

    def sentences(self, intake: Iterable[Intake]) -> tuple[str, ...]:
        """A line for each reason, the most important first."""
        lines = list(intake)
        texts = {line.file: line.texts for line in lines}
        found = [_of_rows(reason, cases, texts) for reason, cases in self._rows.items()]
        found += [_of_files(reason, cases) for reason, cases in self._files.items()]
        found += _of_texts(lines)
        found += [_of_remarks(remark, cases) for remark, cases in self._said.items()]
        more = len(found) - MOST_LINES
        return (*found[:MOST_LINES], f"And {more} more kinds of things.") if more > 0 else tuple(found)


def _note(known: dict[str, _Cases], reason: str, file: str, row: int | None = None) -> None:
    cases = known.setdefault(reason, _Cases())
    if not cases.files and row is not None:
        cases.first_row = f"row {row}"
    cases.files[file] = cases.files.get(file, 0) + 1


def _of_rows(reason: str, cases: _Cases, texts: dict[str, int]) -> str:
    if len(cases.files) == 1:
        [name] = cases.files
        return (
            f"{format_count(cases.count)} of {_counted(texts.get(name, 0), 'row')} of {name} "
            f"{'is' if cases.count == 1 else 'are'} left out, the first is {cases.first_row}: {reason}."
        )
    where = f"{format_count(len(cases.files))} files"
    return f"{_counted(cases.count, 'row')} of {where} are left out, the first is {cases.first}: {reason}."


def _of_files(reason: str, cases: _Cases) -> str:
    if cases.count == 1:
        return f"{cases.first} is left out: {reason}."
    return f"{_counted(cases.count, 'file')} are left out, the first is {cases.first}: {reason}."


def _of_texts(lines: list[Intake]) -> list[str]:
    kinds = (
        ("duplicate_documents", "repeats another, word by word", "repeat others, word by word"),
        ("empty_documents", "is empty", "are empty"),
        ("short_documents", "is shorter than data.min_characters", "are shorter than data.min_characters"),
    )
    found = []
    for name, one, many in kinds:
        cases = _Cases(files={line.file: n for line in lines if (n := getattr(line, name))})
        if cases.count:
            verb, why = ("is", one) if cases.count == 1 else ("are", many)
            where = f"in {cases.first}" if len(cases.files) == 1 else f"the first in {cases.first}"
            found.append(
                f"{_counted(cases.count, 'text')} {verb} left out, {where}: {'it' if verb == 'is' else 'they'} {why}."
            )
    return found


def _of_remarks(remark: str, cases: _Cases) -> str:
    if cases.first_row:
        return f"{_counted(cases.count, 'row')}, the first is {cases.first}: {remark}."
    if cases.count == 1:
        return f"{cases.first}: {remark}."
    return f"{_counted(cases.count, 'file')}, the first is {cases.first}: {remark}."


def _counted(count: int, word: str) -> str:
    return f"{format_count(count)} {word}" + ("" if count == 1 else "s")
