"""Which encoding a text file is in: one answer for .txt, .html, .jsonl and .csv alike.

UTF-8; UTF-16 and UTF-32 with their mark; UTF-16 without one where every other byte says so; then the encoding that the
recipe (`data.encoding`) or the page itself names; then Windows-1252, if the text looks Western. Anything else is
refused rather than guessed at. A guess is a remark, which the intake and the screen show; and where a few bytes of a
UTF-8 file are broken, the remark says how many became U+FFFD. (charset-normalizer guesses more, and on short texts it
guesses wrong: of five samples of French, Spanish and German in Windows-1252 it took all five for cp1250 and got the
words of one.)

A file is read through once for the answer, in chunks, so that a table need not fit in memory.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from drawplate.data.readers.table import FileRefused
from drawplate.units import KIB, MIB, format_count

SNIFFED_BYTES = 8 * KIB
CHUNK_BYTES = MIB
MAX_FOREIGN_SHARE = 0.25  # of characters beyond ASCII in a Western text; more means another encoding
MAX_NEIGHBOUR_SHARE = 0.5  # of those, with another beside them: Western words have them one by one
FEW_FOREIGN = 8  # characters, too few to speak of neighbours
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WESTERN = "cp1252"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A codec's name, what to do with bytes that it does not know, and a remark, empty for plain UTF-8."""

    name: str
    errors: str = "strict"
    remark: str = ""


@dataclass
class _Tally:
    """Characters of a text, those beyond ASCII, those of them with another beside, and U+FFFD."""

    characters: int = 0
    foreign: int = 0
    neighbours: int = 0
    replaced: int = 0

    def add(self, text: str) -> None:
        self.characters += len(text)
        if text.isascii():
            return
        beyond = [not c.isascii() for c in text]
        self.foreign += sum(beyond)
        around = zip(beyond, [False, *beyond[:-1]], [*beyond[1:], False], strict=True)
        self.neighbours += sum(here and (before or after) for here, before, after in around)
        self.replaced += text.count("\ufffd")


def decode(data: bytes, *, asked: str | None = None, declared: str | None = None) -> tuple[str, str]:
    """Bytes -> text and a remark; `asked` is the recipe's encoding, `declared` a page's own.

    Raises:
        FileRefused: binary data, or an encoding that none of the known ones is.
    """
    found = find_encoding(io.BytesIO(data), asked=asked, declared=declared)
    return data.decode(found.name, found.errors), found.remark


def open_text(path: Path, asked: str | None, newline: str) -> tuple[TextIO, str]:
    """A file opened in its encoding, with `newline` as for `open`, and a remark.

    Raises:
        FileRefused: as `decode`.
    """
    with path.open("rb") as file:
        found = find_encoding(file, asked=asked)
    return path.open(encoding=found.name, errors=found.errors, newline=newline), found.remark


def find_encoding(file: BinaryIO, *, asked: str | None = None, declared: str | None = None) -> Encoding:
    """The encoding of a whole file.

    Raises:
        FileRefused: as `decode`.
    """
    head = file.read(SNIFFED_BYTES)
    if marked := next((name for mark, name in MARKS if head.startswith(mark)), None):
        return _with_mark(file, marked)
    if b"\x00" in head:
        return _without_mark(file, head)
    broken = _first_fault(file, "utf-8")
    if broken is None:
        return Encoding(name="utf-8")
    utf8 = _tally(file, "utf-8")
    if utf8.foreign - utf8.replaced > utf8.replaced:
        return Encoding(name="utf-8", errors="replace", remark=_replaced(utf8.replaced, "UTF-8"))
    for name, source in ((asked, "data.encoding"), (declared, "the page says so")):
        if name and _known(name) and _first_fault(file, name) is None:
            return Encoding(name=name, remark=f"not UTF-8, read as {name} ({source})")
    if _first_fault(file, WESTERN) is None and _looks_western(_tally(file, WESTERN)):
        hint = "" if asked else "; if that is wrong, name its encoding in data.encoding"
        return Encoding(name=WESTERN, remark=f"not UTF-8, read as {WESTERN} (a guess: Western European{hint})")
    raise FileRefused(
        f"neither UTF-8 (byte {broken}) nor Windows-1252; name its encoding in data.encoding, or convert it with "
        "iconv -t UTF-8"
    )


def _with_mark(file: BinaryIO, name: str) -> Encoding:
    shown = name.removesuffix("-sig").upper()
    if _first_fault(file, name) is None:
        return Encoding(name=name, remark="" if shown == "UTF-8" else f"read as {shown}")
    return Encoding(name=name, errors="replace", remark=_replaced(_tally(file, name).replaced, shown))


def _without_mark(file: BinaryIO, head: bytes) -> Encoding:
    """UTF-16 of mostly Latin letters: every other byte is zero, and no byte between."""
    for name, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if zeros.count(0) > len(zeros) / 2 and 0 not in others and _first_fault(file, name) is None:
            return Encoding(name=name, remark=f"read as {name.upper()} (a guess: it has no mark)")
    raise FileRefused("binary data, not text")


def _replaced(count: int, name: str) -> str:
    return f"read as {name}, with {format_count(count)} characters that were broken as U+FFFD"


def _looks_western(tally: _Tally) -> bool:
    if tally.foreign > MAX_FOREIGN_SHARE * tally.characters:
        return False
    return tally.foreign <= FEW_FOREIGN or tally.neighbours <= MAX_NEIGHBOUR_SHARE * tally.foreign


def _known(name: str) -> bool:
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _first_fault(file: BinaryIO, name: str) -> int | None:
    """About which byte is the first that the codec does not know; None where it knows all."""
    decoder = codecs.getincrementaldecoder(name)()
    done = 0
    try:
        for chunk in _chunks(file):
            decoder.decode(chunk)
            done += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return done + error.start
    return None


def _tally(file: BinaryIO, name: str) -> _Tally:
    decoder, tally = codecs.getincrementaldecoder(name)("replace"), _Tally()
    for chunk in _chunks(file):
        tally.add(decoder.decode(chunk))
    tally.add(decoder.decode(b"", final=True))
    return tally
