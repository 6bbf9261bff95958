"""A CSV file -> rows, strictly: a cell is read whole or its row, or the file, is refused with the place.

Python's own reader takes what does not fit: it cuts a cell at a stray quote, joins the lines behind a quote that is
never closed, and drops cells beyond the header. Here a row with more or fewer cells than the header costs that row;
behind a broken quote nobody can tell where the rows begin, so that costs the file. Commas, semicolons, tabs and bars
are tried in this order, and the first that finds a known column in the header is taken.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from drawplate.data.readers.encodings import open_text
from drawplate.data.readers.rows import no_column
from drawplate.data.readers.table import FileRefused, RowOrProblem, Table, require_single

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
DOUBLED = 'write each quote inside a quoted cell twice ("")'
LARGEST_CELL = 2**31 - 1  # a cell may hold a whole document


def read_csv(path: Path, columns: tuple[str, ...], encoding: str | None) -> Table:
    """Each record under the header line, numbered by the line on which it begins.

    Raises:
        FileRefused: while reading, where it has none of the columns, or one of them twice, or a quote is broken.
    """
    remarks: list[str] = []
    return Table(rows=_rows(path, columns, encoding, remarks), remarks=remarks)


def _rows(path: Path, columns: tuple[str, ...], encoding: str | None, remarks: list[str]) -> Iterator[RowOrProblem]:
    csv.field_size_limit(LARGEST_CELL)
    file, remark = open_text(path, encoding, newline="")
    remarks += [remark] if remark else []
    with file:
        records = _Records(file)
        header = records.header(columns)
        if header is None:
            return
        require_single(header, columns)
        if records.delimiter != ",":
            remarks.append(f"its columns are separated by {DELIMITERS[records.delimiter]}")
        for line, cells in records:
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            elif cells:
                yield line, ValueError(_misfit(len(cells), len(header)))


def _misfit(cells: int, header: int) -> str:
    rule = "quote a cell that holds a separator or a line end"
    return f"its line has {cells} cells and the header has {header}; {rule}"


class _Records:
    """Records of an open file, with the line on which each begins."""

    def __init__(self, file: Iterable[str]) -> None:
        self.delimiter = ","
        self._lines = iter(file)
        self._line = 0
        self._taken: list[str] = []

    def header(self, columns: tuple[str, ...]) -> list[str] | None:
        """The first line's cells, by the first delimiter that finds a column; None in an empty file."""
        text = next((line for line in self._feed() if line.strip()), None)
        if text is None:
            return None
        first: list[str] = []
        for delimiter in DELIMITERS:
            try:
                cells = next(csv.reader([text], delimiter=delimiter, strict=True))
            except csv.Error:
                continue
            first = first or cells
            if set(cells) & set(columns):
                self.delimiter = delimiter
                return cells
        raise FileRefused(no_column(columns[0], first))

    def _feed(self) -> Iterator[str]:
        for line in self._lines:
            self._line += 1
            self._taken.append(line)
            yield line

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(self._feed(), delimiter=self.delimiter, strict=True)
        while True:
            began = self._line + 1
            self._taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                raise FileRefused(self._broken(began)) from None
            yield began, cells

    def _broken(self, began: int) -> str:
        """Where the quotes of the record that could not be read go wrong."""
        text = "".join(self._taken)
        opened: int | None = None
        i, at_start = 0, True
        while i < len(text):
            here, after = text[i], text[i + 1 : i + 2]
            if opened is None:
                opened = i if at_start and here == '"' else None
                at_start = here in (self.delimiter, "\n")
            elif here == '"' and after == '"':
                i += 1
            elif here == '"':
                if after not in ("", self.delimiter, "\r", "\n"):
                    return f"{_place(text, i, began)}: a quote closes its cell and the cell goes on; {DOUBLED}"
                opened, at_start = None, False
            i += 1
        return f"{_place(text, opened or 0, began)}: a quote opens a cell and none closes it; {DOUBLED}"


def _place(text: str, index: int, first_line: int) -> str:
    before = text[:index]
    return f"line {first_line + before.count(chr(10))}, column {index - before.rfind(chr(10))}"
