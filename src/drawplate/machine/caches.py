"""What Drawplate keeps so that a later run starts sooner, how much of the disk that may take, and how it is given back.

    arenas/*.arena   prepared weights             converted/*/    GGUF files as safetensors
    speed/*.json     the machine's speed          hashes.json     checksums of model files
    settings.json    what `drawplate cache --limit` set

The first two are large, and keep to three rules. Together they take at most half of what would be free without them,
64 GiB at most, or what a person has set. They never take the last tenth of the disk. What was used longest ago goes
first, when something new needs room; all of it goes when a run has no room for its checkpoint or adapter.

Who uses an entry holds a shared `flock` on it for as long as it is mapped, and the kernel gives the lock back when the
process ends, however it ends. What is locked is never removed: the disk would not get its blocks back before the last
mapping is gone. In the moment between opening and locking an entry can be removed under its reader; on Linux what is
open or mapped stays readable without its name. A file system without locks counts as in use by everybody.

Left out: caches of other programs (compilers, the hub). They are listed, with what clears them.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from drawplate.durable import flush_to_disk
from drawplate.errors import UsageError, disk_refusal
from drawplate.recipe import cache_folder
from drawplate.units import GIB, format_bytes, parse_bytes

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is ever known to be unused
    fcntl = None  # type: ignore[assignment]

MOST_BYTES = 64 * GIB
SHARE_OF_FREE = 0.5
SPARED_SHARE_OF_DISK = 0.1
LIMIT_VARIABLE = "DRAWPLATE_CACHE_LIMIT"
SETTINGS_NAME = "settings.json"
ARENAS_NAME, CONVERTED_NAME, SPEED_NAME, HASHES_NAME = "arenas", "converted", "speed", "hashes.json"
FOOTPRINTS_NAME = "footprints"
_held_until_exit: list[int] = []


@dataclass(frozen=True, order=True)
class Entry:
    """Something large that is kept: when it was last used, its bytes, and its file or folder."""

    used: float
    bytes: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A cache for a person to look at; `cleared_by` is the command that empties it, where that is not Drawplate's."""

    name: str
    folder: str
    bytes: int
    count: int
    cleared_by: str = ""


def arenas_folder() -> Path:
    """Where prepared weights are kept."""
    return cache_folder() / ARENAS_NAME


def converted_folder() -> Path:
    """Where converted GGUF files are kept."""
    return cache_folder() / CONVERTED_NAME


def entries() -> list[Entry]:
    """All that is large, used longest ago first; what a killed process left half-written is among it."""
    found = []
    for path in (*arenas_folder().glob("*.arena*"), *converted_folder().glob("*")):
        with suppress(OSError):
            found.append(Entry(path.stat().st_mtime, size_of(path), path))
    return sorted(found)


def hold(file: BinaryIO) -> None:
    """Mark an open entry as in use until every copy of its descriptor is closed; a mapping has one."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)


def hold_until_exit(path: Path) -> None:
    """Mark an entry as in use for the rest of this process."""
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            _held_until_exit.append(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)


def require_room(needed_bytes: int) -> None:
    """Remove what was used longest ago until something new fits by the rules above.

    Raises:
        OSError: it cannot fit; nothing was removed.
    """
    folder, found = cache_folder(), entries()
    free = shutil.disk_usage(standing(folder)).free
    own = sum(entry.bytes for entry in found)
    excess = max(own + needed_bytes - allowed_bytes(), needed_bytes + spared_bytes(folder) - free)
    with _locked(found) as unused:
        if sum(entry.bytes for entry in unused) < excess:
            raise OSError(
                f"{format_bytes(needed_bytes)} are needed, {format_bytes(free)} are free, a tenth of the disk "
                f"({format_bytes(spared_bytes(folder))}) is spared, and the caches may have "
                f"{format_bytes(allowed_bytes())} (drawplate cache --limit)"
            )
        _remove_oldest(unused, excess)


def release(beside: Path | None = None) -> int:
    """Remove everything large that no process uses; the bytes that this gave back.

    Args:
        beside: only where the caches are on the disk of this file or folder.
    """
    folder = cache_folder()
    if beside is not None and _device_of(folder) != _device_of(beside):
        return 0
    with _locked(entries()) as unused:
        for entry in unused:
            _remove(entry.path)
        return sum(entry.bytes for entry in unused)


def clear() -> tuple[int, int]:
    """Remove everything that is kept but the settings and what another process uses; bytes removed, bytes left."""
    before = sum(cache.bytes for cache in own_caches())
    release()
    for name in (SPEED_NAME, FOOTPRINTS_NAME, HASHES_NAME):
        _remove(cache_folder() / name)
    after = sum(cache.bytes for cache in own_caches())
    return before - after, after


def allowed_bytes() -> int:
    """What all large entries together may have of the disk."""
    chosen = limit_bytes()
    if chosen is not None:
        return chosen
    free = shutil.disk_usage(standing(cache_folder())).free
    return min(MOST_BYTES, int(SHARE_OF_FREE * (free + sum(entry.bytes for entry in entries()))))


def spared_bytes(folder: Path) -> int:
    """The last part of the disk, which no cache takes."""
    return int(SPARED_SHARE_OF_DISK * shutil.disk_usage(standing(folder)).total)


def limit_bytes() -> int | None:
    """What a person has set, by DRAWPLATE_CACHE_LIMIT or else by `drawplate cache --limit`; None where nobody has.

    Raises:
        UsageError: the variable is no size.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if given:
        return parse_limit(given, LIMIT_VARIABLE)
    try:
        return int(json.loads((cache_folder() / SETTINGS_NAME).read_text(encoding="utf-8"))["limit_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def allowed_words() -> str:
    """What the caches may take, and who says so, in a sentence."""
    by = "half of what is free and of what they have" if limit_bytes() is None else "the limit that was set"
    return f"Prepared weights and converted models may take {format_bytes(allowed_bytes())} together ({by})."


def cleared_words(removed: int, left: int) -> str:
    """What `clear` came to, in a sentence."""
    rest = f" {format_bytes(left)} are in use by a run and were left." if left else ""
    return f"{format_bytes(removed)} removed.{rest}"


def parse_limit(text: str, name: str) -> int | None:
    """A size, or None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    try:
        return None if text == "auto" else parse_bytes(text)
    except ValueError as error:
        raise UsageError(
            f"{name}: {error}.",
            safe="Nothing was changed.",
            next_step=f"Write a size, like 20GiB, or auto for half of what is free and {format_bytes(MOST_BYTES)} at "
            "most.",
        ) from None


def set_limit(limit: int | None) -> None:
    """Remember it for every later run, and remove what was used longest ago until it holds; None is the default.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    folder = cache_folder()
    partial = folder / f"{SETTINGS_NAME}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({} if limit is None else {"limit_bytes": limit}) + "\n", encoding="utf-8")
        partial.replace(folder / SETTINGS_NAME)
        flush_to_disk(folder)
    except OSError as error:
        raise disk_refusal(folder / SETTINGS_NAME, error) from None
    found = entries()
    with _locked(found) as unused:
        _remove_oldest(unused, sum(entry.bytes for entry in found) - allowed_bytes())


def own_caches() -> list[Cache]:
    """Drawplate's own, with their sizes."""
    folder = cache_folder()
    named = (
        ("prepared weights", arenas_folder(), "*.arena*"),
        ("converted models", converted_folder(), "*"),
        ("speed probe", folder / SPEED_NAME, "*"),
        ("measured layers", folder / FOOTPRINTS_NAME, "*"),
        ("checksums", folder, HASHES_NAME),
    )
    return [_cache(name, where, list(where.glob(pattern))) for name, where, pattern in named]


def other_caches() -> list[Cache]:
    """Those of the compilers and of the hub, which other programs use too; only what is there."""
    from huggingface_hub import constants  # late: it is slow to import, and only a list of caches needs it

    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{_user()}"
    triton = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    datasets = os.environ.get("HF_DATASETS_CACHE") or f"{constants.HF_HOME}/datasets"
    named = (
        ("compiler cache (torch)", inductor, "rm -r {}"),
        ("compiler cache (triton)", triton, "rm -r {}"),
        ("hub cache", constants.HF_HUB_CACHE, "hf cache rm MODEL"),
        ("datasets cache", datasets, "rm -r {}"),
    )
    found = []
    for name, place, command in named:
        folder = Path(place).expanduser()
        if folder.is_dir():
            found.append(_cache(name, folder, list(folder.iterdir()), command.format(folder)))
    return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed, and what goes meanwhile is nothing."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    size = 0
    with suppress(OSError), os.scandir(path) as found:
        for entry in found:
            with suppress(OSError):
                inner = entry.is_dir(follow_symlinks=False)
                size += size_of(Path(entry.path)) if inner else entry.stat(follow_symlinks=False).st_size
    return size


def _cache(name: str, folder: Path, paths: list[Path], cleared_by: str = "") -> Cache:
    size = 0
    for path in paths:
        with suppress(OSError):
            size += size_of(path)
    return Cache(name=name, folder=str(folder), bytes=size, count=len(paths), cleared_by=cleared_by)


@contextmanager
def _locked(found: list[Entry]) -> Iterator[list[Entry]]:
    """Those of some entries that no process uses, locked so that none begins to."""
    unused, descriptors = [], []
    try:
        for entry in found:
            with suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY)
                descriptors.append(descriptor)
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    unused.append(entry)
        yield unused
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _remove_oldest(unused: list[Entry], excess: int) -> None:
    """Remove entries until so many bytes are gone, and whatever a killed process left half-written."""
    for entry in unused:
        if excess > 0 or ".partial-" in entry.path.name:
            _remove(entry.path)
            excess -= entry.bytes


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def standing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def _device_of(path: Path) -> int:
    return standing(path).stat().st_dev


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in the system's list: torch names its folder by number then
        return f"uid_{os.getuid()}"
