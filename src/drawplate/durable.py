"""What must outlive a power cut: a file or folder is on the disk, and not only in the system's memory."""

from __future__ import annotations

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whose readers find the old text or the new one, never half of either.

    Args:
        path: in a folder that is there.
        text: half of a surrogate pair, which UTF-8 cannot hold, is written as an escape.

    Raises:
        OSError: the disk refuses; the old file is as it was.
    """
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
