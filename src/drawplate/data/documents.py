"""Files, folders or a hub dataset -> documents, with a line of intake for every file.

Nothing is passed over in silence: a file that is skipped or refused says why, and empty documents, short ones, exact
duplicates and broken rows are counted where they were met. The first of several equal documents stays; equal means the
same words, whatever the spaces between them. Near-duplicates stay too: telling them apart is the split's business.
PDF, DOCX and EPUB are not read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drawplate.data.chat.conversations import COLUMNS
from drawplate.data.chat.template import ChatRenderer
from drawplate.data.left_out import LeftOut
from drawplate.data.readers.files import ENDINGS, HTML_ENDINGS, Found, find_files
from drawplate.data.readers.formats import read_html, read_text, row_reader
from drawplate.data.readers.hub import dataset_rows
from drawplate.data.readers.row_counts import RowCounts, cut_out, mended
from drawplate.data.readers.rows import Text, plain_text, row_text, words_sha256
from drawplate.data.readers.table import FileRefused, Row, Table
from drawplate.errors import DataError, UsageError
from drawplate.recipe import DataSection
from drawplate.records import Document, Intake

LISTED_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents, in the order of the files, and what became of each file.

    Attributes:
        left_out: in sentences, what was left out or guessed at and where to look.
    """

    documents: tuple[Document, ...]
    intake: tuple[Intake, ...]
    left_out: tuple[str, ...] = ()


def read_documents(section: DataSection, paths: Sequence[str], render: ChatRenderer | None = None) -> Corpus:
    """The documents of `paths`, or of the section's hub dataset where `paths` is empty.

    Args:
        section: text field, split pattern and the least number of characters.
        paths: files and folders; `~` and `${DRAWPLATE_CACHE}` are filled in.
        render: writes conversations; without it rows of messages are refused.

    Raises:
        DataError: a path does not exist, or there is no document in all of them.
        UsageError: the split pattern is not a regular expression.
        NeedsNetwork: the dataset is neither on this machine nor to be fetched.
    """
    reader = _Reader(section, render)
    if paths:
        for found in find_files(paths):
            reader.read_file(found)
    elif section.dataset:
        reader.read_rows(section.dataset, 0, Table(rows=dataset_rows(section)))
    if not reader.documents:
        raise _nothing(paths or [section.dataset or "data.files"], reader.intake)
    left_out = reader.left_out.sentences(reader.intake)
    return Corpus(documents=tuple(reader.documents), intake=tuple(reader.intake), left_out=left_out)


def _nothing(paths: Sequence[str], intake: Sequence[Intake]) -> DataError:
    problems = [f"{line.file}: {line.reason}" for line in intake if line.reason]
    more = len(problems) - LISTED_PROBLEMS
    listed = "; ".join(problems[:LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    files = f"{len(intake)} file" + ("s" if len(intake) != 1 else "")
    return DataError(
        f"There is no document in {', '.join(paths)} ({files})" + (f": {listed}" if listed else "") + ".",
        safe="Nothing was loaded or written.",
        next_step=f"Name files or folders with text in data.files: {' '.join(ENDINGS)}.",
    )


class _Reader:
    """Gathers documents over all files, because duplicates are found across them."""

    def __init__(self, section: DataSection, render: ChatRenderer | None) -> None:
        self.documents: list[Document] = []
        self.intake: list[Intake] = []
        self.left_out = LeftOut()
        self._section = section
        self._render = render
        self._pattern = _compiled(section.split_pattern)
        self._known: set[str] = set()

    def read_file(self, found: Found) -> None:
        """Read one file, or note why it is not read."""
        if found.problem:
            self._not_read(found, "skipped", found.problem)
            return
        columns = tuple(dict.fromkeys((self._section.text_field, *COLUMNS, *filter(None, [self._section.group_by]))))
        rows = row_reader(found.path, columns, self._section.encoding)
        try:
            if found.bytes == 0:
                raise FileRefused("it is empty")
            if rows is not None:
                self.read_rows(found.name, found.bytes, rows())
            elif found.path.suffix.lower() in HTML_ENDINGS:
                whole = self._pattern is not None
                text, guess, how = read_html(found.path, whole=whole, encoding=self._section.encoding)
                self._read_text(found, text, guess, how)
            else:
                self._read_text(found, *read_text(found.path, self._section.encoding))
        except (FileRefused, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self._not_read(found, "refused", reason)

    def _not_read(self, found: Found, status: Literal["skipped", "refused"], reason: str) -> None:
        self.intake.append(Intake(file=found.name, status=status, bytes=found.bytes, reason=reason))
        self.left_out.file(found.name, reason)

    def _read_text(self, found: Found, text: str, guess: str, how: str = "") -> None:
        line = Intake(file=found.name, status="read", bytes=found.bytes)
        try:
            whole = plain_text(text, self._render, parse=self._section.chat_markup == "parse")
        except ValueError as error:
            raise FileRefused(str(error)) from None
        guesses = [*filter(None, [guess]), *whole.remarks, *([mended(whole.mended)] if whole.mended else [])]
        for remark in guesses:
            self.left_out.remark(found.name, remark)
        whole = dataclasses.replace(whole, group=self._group(found.name, {}))
        line, removed = self._add_cut(found.name, whole, line, "#")
        remarks = [*filter(None, [guess, how]), *([cut_out(removed)] if removed else []), *guesses[bool(guess) :]]
        self.intake.append(dataclasses.replace(line, reason="; ".join(remarks)))

    def read_rows(self, name: str, size: int, table: Table) -> None:
        """Read a table; a row that cannot be used costs that row."""
        before, counts = len(self.documents), RowCounts()
        line = Intake(file=name, status="read", bytes=size)
        try:
            for number, row in table.rows:
                try:
                    text = self._row_text(name, row)
                except ValueError as error:
                    counts.refuse(number, str(error))
                    continue
                counts.add(number, text, alone=self._section.group_by is not None and not text.group)
                line, removed = self._add_cut(f"{name}#{number}", text, line, ".")
                counts.removed += removed
        except FileRefused:
            del self.documents[before:]
            self._known = {words_sha256(document.text) for document in self.documents}
            raise
        counts.tell(name, self.left_out, table.remarks)
        used = line.documents or line.duplicate_documents or line.short_documents
        status: Literal["read", "refused"] = "refused" if counts.refused and not used else "read"
        line = dataclasses.replace(
            line, status=status, refused_rows=len(counts.refused), texts=line.texts + len(counts.refused)
        )
        reason = "; ".join(counts.remarks(table.remarks, self._section.group_by))
        self.intake.append(dataclasses.replace(line, reason=reason or ("it has no rows" if not line.texts else "")))
        if not line.texts:
            self.left_out.file(name, "it has no rows")

    def _row_text(self, name: str, row: Row | ValueError) -> Text:
        if isinstance(row, ValueError):
            raise row
        parse = self._section.chat_markup == "parse"
        text = row_text(row, self._section.text_field, self._render, parse=parse)
        return dataclasses.replace(text, group=self._group(name, row))

    def _add_cut(self, name: str, text: Text, line: Intake, joint: str) -> tuple[Intake, int]:
        """Keep a text, or the pieces that the split pattern makes of it; and how many characters that took out."""
        if self._pattern is None or text.trained_spans is not None:
            return self._add(name, dataclasses.replace(text, text=_stripped(text)), line), 0
        parts, removed = _cut(text.text, self._pattern)
        for number, part in enumerate(parts, start=1):
            part_name = name if len(parts) == 1 else f"{name}{joint}{number}"
            line = self._add(part_name, Text(text=part, group=text.group), line)
        return line, removed

    def _group(self, file: str, row: Mapping[str, Any]) -> str:
        """The group of a text of this file, empty where it has none."""
        group_by = self._section.group_by
        if group_by is None:
            return ""
        if group_by == "file":
            return file
        if group_by == "folder":
            return file.rpartition("/")[0] or file
        value = row.get(group_by)
        return "" if value is None else str(value)

    def _add(self, name: str, text: Text, line: Intake) -> Intake:
        """Keep a text as a document, or count why not."""
        line = dataclasses.replace(line, texts=line.texts + 1)
        if not text.text.strip():
            return dataclasses.replace(line, empty_documents=line.empty_documents + 1)
        if len(text.text) < self._section.min_characters:
            return dataclasses.replace(line, short_documents=line.short_documents + 1)
        key = words_sha256(text.text)
        if key in self._known:
            return dataclasses.replace(line, duplicate_documents=line.duplicate_documents + 1)
        self._known.add(key)
        self.documents.append(
            Document(
                name=name,
                text=text.text,
                sha256=hashlib.sha256(text.text.encode()).hexdigest(),
                trained_spans=text.trained_spans,
                control_spans=text.control_spans,
                group=text.group,
            )
        )
        return dataclasses.replace(line, documents=line.documents + 1, characters=line.characters + len(text.text))


def _stripped(text: Text) -> str:
    return text.text.strip() if text.trained_spans is None else text.text


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UsageError(
            f"data.split_pattern is not a regular expression: {error}.",
            safe="Nothing was loaded or written.",
            next_step="Mend it; for example '^# ' starts a document at each heading of a Markdown file.",
        ) from None


def _cut(text: str, pattern: re.Pattern[str] | None) -> tuple[list[str], int]:
    """The documents of a text, stripped, and how many characters the pattern took out.

    A line that the pattern matches starts a new document; what it matches is left out (`^# ` keeps the heading's words,
    `^# .*` drops them, the lookahead `^(?=# )` keeps all).
    """
    if pattern is None:
        return [text.strip()], 0
    parts: list[list[str]] = [[]]
    removed = 0
    for line in text.split("\n"):
        match = pattern.search(line)
        if match:
            removed += match.end() - match.start()
            parts.append([line[: match.start()] + line[match.end() :]])
        else:
            parts[-1].append(line)
    documents = ["\n".join(part).strip() for part in parts]
    return documents if documents[0] else documents[1:] or documents, removed
