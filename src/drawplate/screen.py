"""Where a person reads, and where libraries write: on the command line these are not the same.

While `library_output` is open, standard error is a file: warnings of Python, loggers, and lines that C++, Rust and
compiler processes write to descriptor 2. `screen()` is what standard error was, for what Drawplate itself says. The
file has no name until a run has a folder; from then on it is that folder's log.txt. In a program that imports Drawplate
nothing of this happens.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LOG_NAME = "log.txt"
LONGEST_TAIL_BYTES = 2**20
STANDARD_ERROR = 2


def screen() -> TextIO:
    """What a person reads: standard error, or what it was before libraries' output was put away."""
    return _open[-1].screen if _open else sys.stderr


def open_standard_streams() -> None:
    """Give a process whose standard streams are closed empty ones.

    Otherwise the next file that is opened would get their descriptors, and a library's message would be written into
    it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, _text_file(number, mode, "utf-8", closefd=False))


class LibraryOutput:
    """Standard error as a file, as long as it is open.

    Attributes:
        screen: what standard error was.
        path: the run's log, once it has one.
    """

    def __init__(self) -> None:
        if sys.stderr is None:
            open_standard_streams()
        self.path: Path | None = None
        self._before = sys.stderr
        self._real = _is_standard_error(sys.stderr)
        self._saved = os.dup(STANDARD_ERROR) if self._real else -1
        self._file = _nameless_file()
        self.screen: TextIO = self._before
        if self._real:
            self.screen = _Unfailing(self._saved, self._before.encoding)
        self._flush()
        self._log = _Unfailing(os.dup(self._file), "utf-8")
        if self._real:
            os.dup2(self._file, STANDARD_ERROR)
        sys.stderr = self._log

    def _flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def move_to(self, path: Path) -> None:
        """Go on in a file of that name, after what was written so far."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(file, self.tail())
        except OSError:
            return  # the disk refuses; the nameless file serves
        os.dup2(file, self._log.fileno())  # the same object: loggers keep the stream that they were made with
        if self._real:
            os.dup2(file, STANDARD_ERROR)
        os.close(self._file)
        self._file, self.path = file, path

    def tail(self) -> bytes:
        """The end of what libraries wrote."""
        self._flush()
        with suppress(OSError):
            size = os.fstat(self._file).st_size
            return os.pread(self._file, LONGEST_TAIL_BYTES, max(0, size - LONGEST_TAIL_BYTES))
        return b""

    def close(self) -> None:
        """Standard error is what it was; a log in which nothing was written goes."""
        self._flush()
        with suppress(OSError):
            if self.path is not None and self.path.stat().st_size == 0:
                self.path.unlink()
        sys.stderr = self._before
        if self._real:
            self.screen.flush()
            os.dup2(self._saved, STANDARD_ERROR)
            self.screen.close()
        self._log.close()
        os.close(self._file)


class _Unfailing(io.TextIOWrapper):
    """A text file that swallows what is refused: by a full disk, a terminal that has gone, a descriptor open to read.

    Nothing may fail because a library's warning was not kept, or because nobody could be told how far a run is.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        raw = io.FileIO(descriptor, "w")
        super().__init__(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            super().write(text)
            super().flush()
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            super().flush()

    def close(self) -> None:
        with suppress(OSError, ValueError):
            super().close()


_open: list[LibraryOutput] = []


@contextmanager
def library_output() -> Iterator[LibraryOutput]:
    """Standard error is a file; `screen()` is what it was."""
    output = LibraryOutput()
    _open.append(output)
    try:
        yield output
    finally:
        _open.remove(output)
        output.close()


def log_into(folder: Path) -> None:
    """From now on libraries' output goes to that folder's log, if it is put away at all."""
    if _open and _open[-1].path is None:
        _open[-1].move_to(folder / LOG_NAME)


def _is_standard_error(stream: TextIO) -> bool:
    try:
        return stream.fileno() == STANDARD_ERROR
    except (OSError, ValueError, AttributeError):
        return False


def _nameless_file() -> int:
    """A file that goes with the process; in memory where no folder can be written."""
    try:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return os.memfd_create("drawplate") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)


def _text_file(descriptor: int, mode: str, encoding: str, *, closefd: bool = True) -> Any:
    """A text file that never refuses a character, written line by line."""
    return open(descriptor, mode, buffering=1, encoding=encoding, errors="backslashreplace", closefd=closefd)
