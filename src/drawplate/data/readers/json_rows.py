"""JSON -> rows: one object a line, an array of objects, or objects over several lines.

Which of them it is, is seen at the first line: if that is an object by itself, each line is one. Otherwise the whole
file is read, which takes memory for all of it. A key that one object has twice refuses its row: Python's reader would
keep the last and drop the others.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drawplate.data.readers.encodings import open_text
from drawplate.data.readers.table import FileRefused, Row, RowOrProblem, Table
from drawplate.units import GIB, format_bytes

MAX_WHOLE_BYTES = GIB
SPACE = re.compile(r"\s*")
TWICE = 0
"""The key under which an object says that it had one twice: no key of JSON's is a number."""


def read_json(path: Path, encoding: str | None) -> Table:
    """Each object, numbered by its line, or by its place where objects span lines.

    Raises:
        FileRefused: while reading, where it is neither.
    """
    remarks: list[str] = []
    return Table(rows=_rows(path, encoding, remarks), remarks=remarks)


def _rows(path: Path, encoding: str | None, remarks: list[str]) -> Iterator[RowOrProblem]:
    file, remark = open_text(path, encoding, newline="\n")
    remarks += [remark] if remark else []
    with file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if isinstance(_line(first[1]), ValueError):
            whole = _whole(path, encoding, first[1].strip())
            if whole is not None:
                yield from enumerate(map(_checked, whole), start=1)
                return
        yield from ((number, _line(text)) for number, text in itertools.chain([first], lines))


def _line(text: str) -> Row | ValueError:
    try:
        return _checked(DECODER.decode(text))
    except (ValueError, RecursionError):
        return ValueError("not JSON")


def _checked(value: Any) -> Row | ValueError:
    if not isinstance(value, dict):
        return ValueError("not a JSON object")
    if isinstance(problem := value.get(TWICE), ValueError):
        return problem
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """An object, or one that says which key it has twice, wherever in a row it stands."""
    found = dict(pairs)
    inner = (v.get(TWICE) for v in found.values() if isinstance(v, dict))
    listed = (v.get(TWICE) for vs in found.values() if isinstance(vs, list) for v in vs if isinstance(v, dict))
    problem = next(filter(None, itertools.chain(inner, listed)), None)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        problem = ValueError(f"the key {twice} is given twice")
    return {TWICE: problem} if problem else found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _whole(path: Path, encoding: str | None, first: str) -> list[Any] | None:
    """All values of a file whose first line is no object: those of an array, or several; None where lines are tried.

    Raises:
        FileRefused: it begins like JSON over several lines and is none, or is too large to be read whole.
    """
    if first[0] not in "[{" or (size := path.stat().st_size) > MAX_WHOLE_BYTES:
        if first[0] in "[{" and len(first) == 1:
            raise FileRefused(f"{format_bytes(size)} of JSON that is not one object a line; write it as lines")
        return None
    with open_text(path, encoding, newline="\n")[0] as file:
        text = file.read()
    values, place = [], 0
    try:
        while rest := SPACE.match(text, place):
            if rest.end() == len(text):
                break
            value, place = DECODER.raw_decode(text, rest.end())
            values.append(value)
    except json.JSONDecodeError as error:
        if len(first) > 1:
            return None  # one broken line, most likely
        raise FileRefused(f"broken JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        return None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values
