"""A run's folder: who owns it, and how files get into it whole.

Every file that others read is written beside its final name, flushed to the disk and renamed, so that a reader sees the
old one or the new one and never half of either. metrics.jsonl is the exception: it grows by lines.

A reserve of some MiB is held while the run goes. When the disk is full, what Drawplate's caches hold of it is given up,
and then the reserve, so that the log and the report of a run that has to stop can still be written. A trained adapter
is worth more: for it older checkpoints go too, and if there is still no room it is written somewhere else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from drawplate.checkpoint.write import finished, good, keep_only, write_folder
from drawplate.durable import write_whole
from drawplate.errors import DiskFull, StoppedSafely, StorageError, UsageError, disk_refusal
from drawplate.machine.caches import release
from drawplate.planner.disk import RESERVE_BYTES
from drawplate.records import json_text, to_json
from drawplate.units import format_bytes

LOCK_NAME = "run.lock"
RESERVE_NAME = ".reserve"
RECIPE_NAME = "recipe.yaml"
ADAPTER_NAME = "adapter"
START_NAME = "adapter_start"
UNQUANTIZED_NAME = "adapter_unquantized"
TRAINED_NAMES = (ADAPTER_NAME, UNQUANTIZED_NAME)
RECORD_NAME = "record.json"
CHECKPOINTS_NAME = "checkpoints"
OWN_NAMES = (LOCK_NAME, RESERVE_NAME)


class RunFolder:
    """The folder at `path`; nothing is created before `claim`.

    Attributes:
        tell: takes a warning, such as that the caches were emptied to make room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed = False
        self._abandoned = False
        self._may_abandon = True
        self._made: list[Path] = []
        self._elsewhere: dict[str, Path] = {}
        self.tell: Callable[[str], None] = lambda _: None

    def check_free(self) -> None:
        """Refuse a folder that another run uses, that holds anything, or that cannot be written.

        Raises:
            StorageError: it does; nothing was touched.
        """
        self._refuse_if_unnameable()
        if self.path.exists() and not self.path.is_dir():
            raise self._refusal("is not a folder")
        if self.path.is_dir():
            self._refuse_if_owned()
            if any(not _is_nothing(child.name) for child in self.path.iterdir()):
                raise self._refusal("is not empty")
        self._refuse_if_read_only()

    def _refuse_if_unnameable(self) -> None:
        try:
            os.fsencode(self.path)
        except UnicodeEncodeError:
            raise StorageError(
                f"The output folder {str(self.path)!a} has a name that this system's locale cannot write.",
                safe="Nothing was loaded or written.",
                next_step="Set LC_ALL=C.UTF-8, or choose a name in ASCII with --set output_dir=FOLDER.",
            ) from None
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            try:
                os.lstat(self.path)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise self._refusal("has a name that is longer than this system allows") from None
                raise

    def _refuse_if_owned(self) -> None:
        owner = self._living_owner()
        if owner:
            raise self._refusal(f"is in use by another run ({owner})")

    def _refuse_if_read_only(self) -> None:
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
        self._lock()

    def claim_again(self) -> None:
        """Mark the folder of a run that ended early as in use by this process.

        Raises:
            UsageError: no run was begun there.
            StorageError: a living process has it, or it cannot be written.
        """
        self.require_run()
        self._refuse_if_owned()
        self._refuse_if_read_only()
        self._lock()
        self._may_abandon = False

    @property
    def finished(self) -> bool:
        """Whether the record in it says that nothing is left to do."""
        try:
            return bool(json.loads((self.path / RECORD_NAME).read_text(encoding="utf-8"))["status"] == "finished")
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def require_run(self) -> None:
        """Refuse a folder in which no run was begun.

        Raises:
            UsageError: it holds no recipe.
        """
        if not (self.path / RECIPE_NAME).is_file():
            raise UsageError(
                f"{self.path} is not the folder of a run: it holds no {RECIPE_NAME}.",
                next_step="Name the folder that a run reported as its output_dir.",
            )

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            with (self.path / LOCK_NAME).open("x", encoding="utf-8") as lock:
                json.dump(
                    {"pid": os.getpid(), "host": socket.gethostname(), "started": _process_start(os.getpid())}, lock
                )
            with (self.path / RESERVE_NAME).open("wb") as reserve:
                os.posix_fallocate(reserve.fileno(), 0, RESERVE_BYTES)
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
        self._give_up_reserve()
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        if self._abandoned:
            with suppress(OSError):  # somebody has put something there meanwhile
                for path in self._made:
                    path.rmdir()

    def abandon(self) -> None:
        """The run ended before anything of value was written: `release` will leave the disk as `claim` found it."""
        self._abandoned = self._may_abandon

    def make_room(self) -> bool:
        """Give up what Drawplate's caches have of this disk, else the reserve; whether there was anything."""
        return self.release_caches() or self._give_up_reserve()

    def release_caches(self) -> bool:
        """Empty Drawplate's caches, if they are on this disk; whether that gave anything."""
        given_back = release(beside=self.path)
        if given_back:
            self.tell(
                f"The disk of {self.path} is full: {format_bytes(given_back)} of prepared weights were removed from "
                "the cache. The next run prepares them again."
            )
        return given_back > 0

    def _give_up_reserve(self) -> bool:
        try:
            (self.path / RESERVE_NAME).unlink()
        except OSError:
            return False
        return True

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / CHECKPOINTS_NAME

    def remove_checkpoints(self) -> None:
        """Of a finished run, with what only resuming needs."""
        keep_only(self.checkpoints, [])
        with suppress(OSError):  # something that is not ours lies there
            self.checkpoints.rmdir()
        shutil.rmtree(self.path / START_NAME, ignore_errors=True)

    def _remove_older_checkpoints(self) -> bool:
        """All but the newest good one; whether there were others."""
        there = finished(self.checkpoints)
        newest = good(self.checkpoints, 1)
        if not newest or len(there) < 2:
            return False
        keep_only(self.checkpoints, newest)
        return True

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
        """Write a whole file; where the disk is full, caches and reserve are given up for it.

        Raises:
            StorageError: the disk refuses; an earlier file of that name is untouched.
        """
        while True:
            try:
                return self._write_text(name, text)
            except DiskFull:
                if not self.make_room():
                    raise

    def _write_text(self, name: str, text: str) -> Path:
        target = self.path / name
        try:
            write_whole(target, text)
        except OSError as error:
            raise disk_refusal(target, error) from None
        return target

    def write_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Write a folder that is whole under its name, as `write_text` writes a file.

        Raises:
            StorageError: the disk refuses.
            StoppedSafely: it had no room for an adapter, which is in another place now.
        """
        trained = name in TRAINED_NAMES
        while True:
            try:
                write_folder(self.path / name, fill)
                return self.path / name
            except DiskFull as error:
                if self.make_room() or (trained and self._remove_older_checkpoints()):
                    continue
                if trained:
                    self._write_elsewhere(name, fill, error)
                raise

    def _write_elsewhere(self, name: str, fill: Callable[[Path], None], full: DiskFull) -> None:
        """An adapter, once, in the first place that takes it; returns only where none does."""
        where = self._elsewhere.get(name)
        for place in () if where else (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
            there = place / f"{self.path.name}-{name}-{os.getpid()}"
            with suppress(StorageError, OSError):
                write_folder(there, fill)
                where = self._elsewhere[name] = there
                break
        if where:
            raise StoppedSafely(
                full.what,
                safe=f"The trained adapter is whole in {where}.",
                next_step=f"Free some space, then write adapter and report: drawplate resume {self.path}. Or move the "
                "folder to another disk and resume it there.",
            )

    def write_json(self, name: str, record: Any) -> Path:
        """Write a record as indented JSON."""
        return self.write_text(name, json_text(to_json(record), indent=2) + "\n")

    def write_lines(self, name: str, records: Iterable[Any]) -> Path:
        """Write records as one JSON line each."""
        return self.write_text(name, "".join(json_text(to_json(r)) + "\n" for r in records))

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
        unfinished = self.checkpoints.is_dir() and not self.finished and "in use" not in why
        go_on = f"Go on with the run in it: drawplate resume {self.path}. Or choose" if unfinished else "Choose"
        return StorageError(
            f"The output folder {self.path} {why}.",
            safe="Nothing in it was touched.",
            next_step=f"{go_on} another with --set output_dir=FOLDER, or move the old one away.",
        )


def _is_nothing(name: str) -> bool:
    """What a run that was killed before it had a recipe may have left."""
    return name in OWN_NAMES or name.startswith(f".{RECIPE_NAME}.tmp-")


def _process_start(pid: int) -> str | None:
    """When a process began, in kernel ticks: with its number, what tells it from a later one. None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
