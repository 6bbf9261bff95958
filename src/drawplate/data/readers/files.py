"""Which files there are: a walk that opens nothing, in the same order on every machine.

Inside a folder, a link to a file is read where the file lies in the same folder, or in the blobs of the same model or
dataset in the hub's cache. Other links are not followed: they may lead out of the folder or round in a circle, and can
be named themselves. What is not read is still listed, with the reason.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drawplate.data.readers.formats import MAX_FILE_BYTES
from drawplate.errors import DataError
from drawplate.recipe import expand
from drawplate.units import format_bytes

TEXT_ENDINGS = (".txt", ".md")
HTML_ENDINGS = (".html", ".htm")
TABLE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
ENDINGS = (*TEXT_ENDINGS, *HTML_ENDINGS, *TABLE_ENDINGS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file under the name it is shown by; `problem` says why it is not read, and is empty where it is."""

    path: Path
    name: str
    bytes: int = 0
    problem: str = ""


def find_files(paths: Sequence[str]) -> Iterator[Found]:
    """Every file that the paths name or hold, each once.

    Raises:
        DataError: a path does not exist.
    """
    seen: set[str] = set()
    names: set[str] = set()
    for given in paths:
        root = expand(given)
        try:
            directory = stat.S_ISDIR(root.stat().st_mode)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{printable(given)} cannot be read: {getattr(error, 'strerror', None) or error}.",
                safe="Nothing was loaded or written.",
                next_step="Write several paths in brackets: data.files=[FIRST, SECOND]."
                if "," in given
                else "Name files or folders that exist (data.files, or --data of eval).",
            ) from None
        for found in _walk(root) if directory else [_examine(root, printable(root.name), (None,))]:
            real = os.path.realpath(found.path)
            if real in seen:
                found = Found(path=found.path, name=found.name, bytes=found.bytes, problem="named twice")
            seen.add(real)
            if found.name in names:
                found = Found(
                    path=found.path, name=printable(str(found.path)), bytes=found.bytes, problem=found.problem
                )
            names.add(found.name)
            yield found


def _walk(root: Path) -> Iterator[Found]:
    shown, within = printable(root.resolve().name or str(root)), _link_targets(root)
    pending = [(root, shown)]
    while pending:
        folder, folder_name = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield Found(path=folder, name=folder_name, problem=f"folder cannot be read: {error.strerror}")
            continue
        folders = []
        for entry in entries:
            path, name = Path(entry.path), f"{folder_name}/{printable(entry.name)}"
            if entry.name.startswith("."):
                yield Found(path=path, name=name, problem="hidden")
            elif entry.is_dir(follow_symlinks=False):
                folders.append((path, name))
            else:
                yield _examine(path, name, within)
        pending += reversed(folders)


def _link_targets(root: Path) -> tuple[Path, ...]:
    """Folders into which links below `root` may lead: itself, and the blobs beside the hub's snapshot that it is in."""
    real = root.resolve()
    snapshots = [parent for parent in (real, *real.parents) if parent.name == "snapshots"]
    return (real, *(parent.parent / "blobs" for parent in snapshots[:1]))


def _examine(path: Path, name: str, within: tuple[Path | None, ...]) -> Found:
    """Look at a file's kind, ending and size without opening it; `within` are folders that it may be a link into."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            status = path.stat()
            target = path.resolve()
            if None not in within and not any(target.is_relative_to(folder) for folder in within if folder):
                problem = "a link that leads out of the folder; name the link itself in data.files"
                return Found(path=path, name=name, problem=problem)
    except (OSError, RuntimeError) as error:
        return Found(path=path, name=name, problem=f"cannot be read: {getattr(error, 'strerror', None) or error}")
    problem = ""
    if stat.S_ISDIR(status.st_mode):
        problem = "a link to a folder; name the folder in data.files"
    elif not stat.S_ISREG(status.st_mode):
        problem = "not an ordinary file"
    elif path.suffix.lower() not in ENDINGS:
        problem = f"only {' '.join(ENDINGS)} are read"
    elif status.st_size > MAX_FILE_BYTES:
        problem = f"{format_bytes(status.st_size)} is more than {format_bytes(MAX_FILE_BYTES)}; split it"
    return Found(path=path, name=name, bytes=status.st_size, problem=problem)


def printable(name: str) -> str:
    """A file's name as text that can be written and shown: bytes that are no UTF-8, and control characters, escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
