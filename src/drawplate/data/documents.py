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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drawplate.data.chat import ChatRenderer
from drawplate.data.files import HTML_ENDINGS, Found, find_files
from drawplate.data.formats import FileRefused, RowOrProblem, read_html, read_text, row_reader
from drawplate.data.hub import dataset_rows
from drawplate.data.rows import Text, clean, row_text, words_sha256
from drawplate.errors import DataError, UsageError
from drawplate.recipe import DataSection
from drawplate.records import Document, Intake
from drawplate.units import format_count

LISTED_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents, in the order of the files, and what became of each file."""

    documents: tuple[Document, ...]
    intake: tuple[Intake, ...]


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
        reader.read_rows(section.dataset, 0, dataset_rows(section.dataset, section.dataset_split))
    if not reader.documents:
        raise _nothing(paths or [section.dataset or "data.files"], reader.intake)
    return Corpus(documents=tuple(reader.documents), intake=tuple(reader.intake))


def _nothing(paths: Sequence[str], intake: Sequence[Intake]) -> DataError:
    problems = [f"{line.file}: {line.reason}" for line in intake if line.reason]
    more = len(problems) - LISTED_PROBLEMS
    listed = "; ".join(problems[:LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    files = f"{len(intake)} file" + ("s" if len(intake) != 1 else "")
    return DataError(
        f"There is no document in {', '.join(paths)} ({files})" + (f": {listed}" if listed else "") + ".",
        safe="Nothing was loaded or written.",
        next_step="Name files or folders with text in data.files: .txt .md .html .jsonl .parquet or .csv.",
    )


class _Reader:
    """Gathers documents over all files, because duplicates are found across them."""

    def __init__(self, section: DataSection, render: ChatRenderer | None) -> None:
        self.documents: list[Document] = []
        self.intake: list[Intake] = []
        self._section = section
        self._render = render
        self._pattern = _compiled(section.split_pattern)
        self._known: set[str] = set()

    def read_file(self, found: Found) -> None:
        """Read one file, or note why it is not read."""
        if found.problem:
            self.intake.append(Intake(file=found.name, status="skipped", bytes=found.bytes, reason=found.problem))
            return
        columns = (self._section.text_field, "messages", "prompt", "completion", self._section.group_by or "text")
        rows = row_reader(found.path, columns)
        try:
            if rows is not None:
                self.read_rows(found.name, found.bytes, rows())
            elif found.path.suffix.lower() in HTML_ENDINGS:
                text, remark = read_html(found.path, whole=self._pattern is not None)
                self._read_text(found, text, remark)
            else:
                self._read_text(found, *read_text(found.path))
        except (FileRefused, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self.intake.append(Intake(file=found.name, status="refused", bytes=found.bytes, reason=reason))

    def _read_text(self, found: Found, text: str, remark: str) -> None:
        text, mended = clean(text)
        line = Intake(file=found.name, status="read", bytes=found.bytes)
        parts, removed = _cut(text, self._pattern)
        remarks = [remark] if remark else []
        if removed:
            remarks.append(f"data.split_pattern took out {format_count(removed)} characters")
        if mended:
            remarks.append(_mended(mended))
        for number, part in enumerate(parts, start=1):
            name = found.name if len(parts) == 1 else f"{found.name}#{number}"
            line = self._add(name, Text(text=part, group=self._group(found.name, {})), line)
        self.intake.append(dataclasses.replace(line, reason="; ".join(remarks)))

    def read_rows(self, name: str, size: int, rows: Iterator[RowOrProblem]) -> None:
        """Read a table; a row that cannot be used costs that row."""
        before = len(self.documents)
        line = Intake(file=name, status="read", bytes=size)
        refused, first_refused, mended, removed, alone = 0, "", 0, 0, 0
        try:
            for number, row in rows:
                try:
                    if isinstance(row, ValueError):
                        raise row
                    text = row_text(row, self._section.text_field, self._render)
                    text = dataclasses.replace(text, group=self._group(name, row))
                except ValueError as error:
                    refused += 1
                    first_refused = first_refused or f"row {number}: {error}"
                    continue
                mended += text.mended
                alone += self._section.group_by is not None and not text.group
                line, taken = self._add_row(f"{name}#{number}", text, line)
                removed += taken
        except FileRefused:
            del self.documents[before:]
            self._known = {words_sha256(document.text) for document in self.documents}
            raise
        remarks = [f"{format_count(refused)} rows refused, the first at {first_refused}"] if refused else []
        if removed:
            remarks.append(f"data.split_pattern took out {format_count(removed)} characters")
        if mended:
            remarks.append(_mended(mended))
        if alone:
            remarks.append(f"{format_count(alone)} rows have no {self._section.group_by}: each is a group of its own")
        unusable = refused and not (line.documents or line.duplicate_documents or line.short_documents)
        status: Literal["read", "refused"] = "refused" if unusable else "read"
        line = dataclasses.replace(line, status=status, refused_rows=refused, texts=line.texts + refused)
        self.intake.append(dataclasses.replace(line, reason="; ".join(remarks)))

    def _add_row(self, name: str, text: Text, line: Intake) -> tuple[Intake, int]:
        if self._pattern is None or text.trained_spans is not None:
            return self._add(name, text, line), 0
        parts, removed = _cut(text.text, self._pattern)
        for number, part in enumerate(parts, start=1):
            part_name = name if len(parts) == 1 else f"{name}.{number}"
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


def _mended(count: int) -> str:
    return f"{format_count(count)} control or broken characters mended"


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
