"""One file -> rows: .txt, .md and .html are one row, .jsonl, .json, .parquet and .csv many.

Every reader here meets files that nobody has checked. Size and encoding are looked at before the content is, a broken
line costs that line and not the file, and nothing is executed, decompressed without a bound, or fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from drawplate.data.readers.csv_rows import read_csv
from drawplate.data.readers.encodings import SNIFFED_BYTES, decode
from drawplate.data.readers.html import html_to_text
from drawplate.data.readers.json_rows import read_json
from drawplate.data.readers.rows import no_column
from drawplate.data.readers.table import FileRefused, Row, RowOrProblem, Table, require_single
from drawplate.errors import reason_of
from drawplate.units import GIB, KIB, format_bytes

MAX_FILE_BYTES = 4 * GIB
MAX_TABLE_BYTES = 64 * GIB  # of a parquet file, decompressed
MAX_HTML_BYTES = GIB // 4
ROWS_AT_ONCE = 1024
META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([A-Za-z0-9_-]+)", re.IGNORECASE)


def read_text(path: Path, encoding: str | None = None) -> tuple[str, str]:
    """A text file's content, and a remark where its encoding is not UTF-8.

    Raises:
        FileRefused: it is no text, or in no encoding that is known.
    """
    return decode(path.read_bytes(), asked=encoding)


def read_html(path: Path, *, whole: bool, encoding: str | None = None) -> tuple[str, str, str]:
    """A page's text, a remark on its encoding and one on how the text was found; `whole` takes all visible text.

    Raises:
        FileRefused: the page is too large, or nothing can be read out of a page that is not small.
    """
    data = path.read_bytes()
    if len(data) > MAX_HTML_BYTES:
        raise FileRefused(f"{format_bytes(len(data))} of HTML, at most {format_bytes(MAX_HTML_BYTES)} are read")
    charset = META_CHARSET.search(data, 0, SNIFFED_BYTES)
    html, remark = decode(data, asked=encoding, declared=charset[1].decode() if charset else None)
    text, how = html_to_text(html, whole=whole)
    if not text.strip() and len(data) > KIB:
        raise FileRefused(f"no text was found in {format_bytes(len(data))} of HTML")
    return text, remark, how


def read_parquet(path: Path, columns: tuple[str, ...]) -> Table:
    """Each row's known columns, numbered from 1.

    Raises:
        FileRefused: while reading: not a parquet file, or one that would decompress to more than is read.
    """
    return Table(rows=_parquet_rows(path, columns))


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[RowOrProblem]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
            if size > MAX_TABLE_BYTES:
                raise FileRefused(f"would decompress to {format_bytes(size)}")
            names = file.schema_arrow.names
            require_single(names, columns)
            present = [name for name in names if name in columns]
            if not present:
                raise FileRefused(no_column(columns[0], names))
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=present):
                for row in _plain_rows(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise FileRefused(f"not a readable parquet file: {reason_of(error)}") from None


def _plain_rows(batch: pyarrow.RecordBatch) -> Iterator[Row | ValueError]:
    """The rows as Python has them; row by row where one holds bytes that are no UTF-8, as careless writers leave."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(len(batch)):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield ValueError("a column of text holds bytes that are no UTF-8")


def row_reader(path: Path, columns: tuple[str, ...], encoding: str | None = None) -> Callable[[], Table] | None:
    """What reads a table, by the file's ending; None where the file is not a table."""
    readers: dict[str, Callable[[], Table]] = {
        ".jsonl": lambda: read_json(path, encoding),
        ".json": lambda: read_json(path, encoding),
        ".csv": lambda: read_csv(path, columns, encoding),
        ".parquet": lambda: read_parquet(path, columns),
    }
    return readers.get(path.suffix.lower())
