"""One file -> rows: .txt, .md and .html are one row, .jsonl, .parquet and .csv many.

Every reader here meets files that nobody has checked. Size and encoding are looked at before the content is, a broken
line costs that line and not the file, and nothing is executed, decompressed without a bound, or fetched. Text that is
neither UTF-8, UTF-16 with its mark, nor plausibly Windows-1252 is refused rather than guessed at.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from drawplate.data.html import html_to_text
from drawplate.errors import reason_of
from drawplate.units import GIB, KIB, format_bytes

MAX_FILE_BYTES = 4 * GIB
MAX_TABLE_BYTES = 64 * GIB  # of a parquet file, decompressed
MAX_HTML_BYTES = GIB // 4
SNIFFED_BYTES = 8 * KIB
MAX_FOREIGN_SHARE = 0.25  # of characters beyond ASCII in a Western text; more means another encoding
ROWS_AT_ONCE = 1024
META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([A-Za-z0-9_-]+)", re.IGNORECASE)

Row = Mapping[str, Any]
RowOrProblem = tuple[int, Row | ValueError]


class FileRefused(Exception):
    """A file that cannot be used; the message is the reason shown to the user."""


def read_text(path: Path) -> tuple[str, str]:
    """A text file's content, and a remark where its encoding is not UTF-8."""
    return decode(path.read_bytes())


def read_html(path: Path, *, whole: bool) -> tuple[str, str]:
    """A page's text and a remark; `whole` takes all visible text.

    Raises:
        FileRefused: the page is too large, or nothing can be read out of a page that is not small.
    """
    data = path.read_bytes()
    if len(data) > MAX_HTML_BYTES:
        raise FileRefused(f"{format_bytes(len(data))} of HTML, at most {format_bytes(MAX_HTML_BYTES)} are read")
    charset = META_CHARSET.search(data, 0, SNIFFED_BYTES)
    html, remark = decode(data, declared=charset[1].decode() if charset else None)
    text, how = html_to_text(html, whole=whole)
    if not text.strip() and len(data) > KIB:
        raise FileRefused(f"no text was found in {format_bytes(len(data))} of HTML")
    return text, "; ".join(part for part in (remark, how) if part)


def decode(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """Bytes -> text and a remark: UTF-8, UTF-16 with its mark, the declared encoding, or Windows-1252.

    Raises:
        FileRefused: binary data, or an encoding that none of these is.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace"), "read as UTF-16"
    if b"\x00" in data[:SNIFFED_BYTES]:
        raise FileRefused("binary data, not text")
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        place = error.start
    for encoding in filter(None, (declared, "cp1252")):
        try:
            text = data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
        if encoding == declared or sum(not c.isascii() for c in text) <= MAX_FOREIGN_SHARE * len(text):
            return text, f"not UTF-8, read as {encoding}"
    raise FileRefused(f"neither UTF-8 (byte {place}) nor Windows-1252; convert it with iconv -t UTF-8")


def read_jsonl(path: Path) -> Iterator[RowOrProblem]:
    """Each line's object with the line's number; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError):
                yield number, ValueError("not JSON")
                continue
            yield number, row if isinstance(row, dict) else ValueError("not a JSON object")


def read_csv(path: Path) -> Iterator[RowOrProblem]:
    """Each record under the header line, numbered from 1."""
    text, _ = decode(path.read_bytes())
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document
    reader = csv.DictReader(io.StringIO(text, newline=""))
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ValueError(f"not CSV: {error}")
            continue
        yield number, row


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[RowOrProblem]:
    """Each row's known columns, numbered from 1.

    Raises:
        FileRefused: not a parquet file, or one that would decompress to more than is read.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
            if size > MAX_TABLE_BYTES:
                raise FileRefused(f"would decompress to {format_bytes(size)}")
            present = [name for name in file.schema_arrow.names if name in columns]
            if not present:
                names = ", ".join(file.schema_arrow.names[:8])
                raise FileRefused(f"none of the columns {', '.join(columns)} (there are: {names})")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=present):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise FileRefused(f"not a readable parquet file: {reason_of(error)}") from None


def row_reader(path: Path, columns: tuple[str, ...]) -> Callable[[], Iterator[RowOrProblem]] | None:
    """What reads a table, by the file's ending; None where the file is not a table."""
    readers: dict[str, Callable[[], Iterator[RowOrProblem]]] = {
        ".jsonl": lambda: read_jsonl(path),
        ".csv": lambda: read_csv(path),
        ".parquet": lambda: read_parquet(path, columns),
    }
    return readers.get(path.suffix.lower())
