"""A run's folder: who owns it, and how files get into it whole.

Every file that others read is written beside its final name, flushed to the disk and renamed, so that a reader sees the
old one or the new one and never half of either. metrics.jsonl is the exception: it grows by lines.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from drawplate.errors import StorageError
from drawplate.records import to_json

LOCK_NAME = "run.lock"


class RunFolder:
    """The folder at `path`; nothing is created before `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed = False
        self._abandoned = False
        self._made: list[Path] = []

    def check_free(self) -> None:
        """Refuse a folder that another run uses, that holds anything, or that cannot be written.

        Raises:
            StorageError: it does; nothing was touched.
        """
        if self.path.exists() and not self.path.is_dir():
            raise self._refusal("is not a folder")
        if self.path.is_dir():
            owner = self._living_owner()
            if owner:
                raise self._refusal(f"is in use by another run ({owner})")
            if any(child.name != LOCK_NAME for child in self.path.iterdir()):
                raise self._refusal("is not empty")
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise self._refusal("cannot be written")

    def claim(self) -> None:
        """Create the folder and mark it as in use by this process.

        Raises:
            StorageError: it is not free, or cannot be written.
        """
        self.check_free()
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            with (self.path / LOCK_NAME).open("x", encoding="utf-8") as lock:
                json.dump(
                    {"pid": os.getpid(), "host": socket.gethostname(), "started": _process_start(os.getpid())}, lock
                )
        except FileExistsError:
            raise self._refusal("was claimed by another run just now") from None
        except OSError as error:
            raise self._refusal(f"cannot be written ({error.strerror})") from None
        self._claimed = True

    def release(self) -> None:
        """The run is over; what it wrote stays, unless it was abandoned."""
        if not self._claimed:
            return
        self._claimed = False
        if self._abandoned:
            self._remove_contents()
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        if self._abandoned:
            with suppress(OSError):  # somebody has put something there meanwhile
                for path in self._made:
                    path.rmdir()

    def abandon(self) -> None:
        """The run ended before anything of value was written: `release` will leave the disk as `claim` found it."""
        self._abandoned = True

    def _remove_contents(self) -> None:
        """All of it is this run's: `claim` found the folder empty."""
        for child in self.path.iterdir():
            if child.name == LOCK_NAME:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file.

        Raises:
            StorageError: the disk refuses; an earlier file of that name is untouched.
        """
        target = self.path / name
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(
                f"{target} could not be written: {error.strerror}.",
                safe="Files written before it are complete.",
                next_step="Free some space on that disk, then start again.",
            ) from None
        return target

    def write_json(self, name: str, record: Any) -> Path:
        """Write a record as indented JSON."""
        return self.write_text(name, json.dumps(to_json(record), indent=2, ensure_ascii=False) + "\n")

    def write_lines(self, name: str, records: Iterable[Any]) -> Path:
        """Write records as one JSON line each."""
        return self.write_text(name, "".join(json.dumps(to_json(r), ensure_ascii=False) + "\n" for r in records))

    def _living_owner(self) -> str | None:
        try:
            lock = json.loads((self.path / LOCK_NAME).read_text(encoding="utf-8"))
            pid, host, started = int(lock["pid"]), str(lock["host"]), lock.get("started")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same_host = host == socket.gethostname()
        if same_host and (_process_start(pid) is None or _process_start(pid) != started):
            return None  # that process is gone, or its number was given to another
        return f"process {pid} on {host}"

    def _refusal(self, why: str) -> StorageError:
        return StorageError(
            f"The output folder {self.path} {why}.",
            safe="Nothing in it was touched.",
            next_step="Choose another with --set output_dir=FOLDER, or move the old one away.",
        )


def _process_start(pid: int) -> str | None:
    """When a process began, in kernel ticks: with its number, what tells it from a later one. None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
