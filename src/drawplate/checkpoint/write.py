"""What must survive a crash: a folder of files that is whole and verified, or is not there under its name.

    checkpoints/step-000120/          after 120 optimizer steps
    checkpoints/step-000120+000512/   after 512 micro-batches of the 121st
        ...                           safetensors and JSON, nothing else
        MANIFEST.json                 size and sha256 of every other file, written last

    step-N.tmp-PID/ is filled -> each file fsynced -> MANIFEST.json -> folder fsynced -> renamed -> parent fsynced
        -> read back from the disk and hashed -> only now are older ones removed

Whoever finds `step-000120` finds all of it, whatever moment the machine died at. Files are written through `os.write`
piece by piece, so that a checkpoint of any size needs the memory of its largest tensor. Reading back asks the kernel to
drop its copy first; a disk that lies about what it keeps below that is beyond this file, which is why two are kept.

Left out: what the files mean (snapshot.py), and when they are written (run/saving.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from drawplate.durable import flush_to_disk
from drawplate.errors import IntegrityError, StorageError, disk_refusal
from drawplate.records import json_text
from drawplate.units import MIB

SCHEMA = 1
MANIFEST_NAME = "MANIFEST.json"
PIECE_BYTES = 4 * MIB
Pieces = Iterable[bytes | memoryview]

_POSITION = re.compile(r"step-(\d+)(?:\+(\d+))?")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True, order=True)
class Position:
    """How far training is: optimizer steps, and micro-batches of the step after them."""

    step: int
    micro_batches: int = 0

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"step-{self.step:06d}" + (f"+{self.micro_batches:06d}" if self.micro_batches else "")

    @classmethod
    def of(cls, folder: Path) -> Position | None:
        """The position that a folder's name says; None where it is not a finished checkpoint's."""
        match = _POSITION.fullmatch(folder.name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None

    def __str__(self) -> str:
        within = f" and {self.micro_batches:,} micro-batches" if self.micro_batches else ""
        return f"step {self.step:,}{within}"


def write_checkpoint(checkpoints: Path, position: Position, files: Mapping[str, Pieces]) -> Path:
    """Write a checkpoint and read it back.

    Args:
        checkpoints: the folder of all checkpoints.
        position: which one this is; one of that name that is there already is replaced.
        files: name -> its bytes, in pieces, drawn one at a time.

    Raises:
        DiskFull: there is no room.
        StorageError: the disk refuses, or gives back something else than was written. In either case nothing is there
            under the name, and earlier checkpoints are untouched.
    """
    target = checkpoints / position.name

    def fill(folder: Path) -> None:
        facts = {name: _write_file(folder / name, pieces) for name, pieces in files.items()}
        manifest = {"schema": SCHEMA, "step": position.step, "micro_batches": position.micro_batches, "files": facts}
        _write_file(folder / MANIFEST_NAME, [json.dumps(manifest, indent=2).encode() + b"\n"])

    _publish(target, fill)
    problem = problem_of(target, from_disk=True)
    if problem:
        _remove(target)
        raise StorageError(
            f"A checkpoint read back from the disk is not what was written: {problem}",
            safe="It was removed; the checkpoint before it is whole.",
            next_step="Look after that disk; set output_dir to another one.",
        )
    return target


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """A folder that appears under its name only when `fill` has written all of it and the disk has it.

    A folder of that name that is there already is replaced.

    Raises:
        DiskFull, StorageError: the disk refuses; what was under the name still is.
    """

    def fill_and_flush(folder: Path) -> None:
        fill(folder)
        for path in folder.rglob("*"):
            flush_to_disk(path)

    _publish(target, fill_and_flush)


def problem_of(folder: Path, *, from_disk: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every byte is as its manifest says.

    Nothing is parsed but the manifest; the files are only hashed.

    Args:
        folder: the checkpoint.
        from_disk: ask the kernel to read the files anew.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return f"{folder.name}/{MANIFEST_NAME} is missing."
    try:
        manifest = json.loads(path.read_bytes())
        schema, files = int(manifest["schema"]), dict(manifest["files"])
        claimed = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (ValueError, KeyError, TypeError, OSError):
        return f"{folder.name}/{MANIFEST_NAME} is damaged."
    if schema != SCHEMA:
        return f"{folder.name} has schema {schema}, and this version of Drawplate reads schema {SCHEMA}."
    there = {child.name for child in folder.iterdir()} - {MANIFEST_NAME}
    for name in sorted(there - claimed.keys()):
        return f"{folder.name}/{name} is not in its manifest; it was not opened."
    for name, (size, sha256) in claimed.items():
        problem = _file_problem(folder / name, size, sha256, from_disk)
        if problem:
            return f"{folder.name}/{name} {problem}."
    return None


def _file_problem(path: Path, size: int, sha256: str, from_disk: bool) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size:
        return f"has {found:,} bytes where {size:,} were written"
    try:
        with path.open("rb") as file:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == sha256 else "has other bytes than were written (its sha256 differs)"


def finished(checkpoints: Path) -> list[Path]:
    """Checkpoints under their final names, newest first; not verified."""
    folders = [path for path in checkpoints.glob("step-*") if Position.of(path)]
    return sorted(folders, key=lambda path: Position.of(path) or Position(0), reverse=True)


def unfinished(checkpoints: Path) -> list[Path]:
    """What a process that was killed left behind while writing or removing."""
    return sorted(path for path in checkpoints.glob("step-*.*-*") if not Position.of(path))


def good(checkpoints: Path, count: int, refuse: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The newest `count` checkpoints whose every byte is right, newest first; `refuse` hears of each that is not."""
    found: list[Path] = []
    for folder in finished(checkpoints):
        if len(found) == count:
            break
        problem = problem_of(folder)
        if problem:
            refuse(problem)
        else:
            found.append(folder)
    return found


def keep_only(checkpoints: Path, kept: Iterable[Path]) -> None:
    """Remove all other checkpoints and what was never finished."""
    names = {path.name for path in kept}
    for path in [*finished(checkpoints), *unfinished(checkpoints)]:
        if path.name not in names:
            _remove(path)


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, a tensor at a time (format: https://github.com/huggingface/safetensors#format).

    Wide types come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        yield tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def json_pieces(values: Any) -> Iterator[bytes]:
    """A JSON file."""
    yield json_text(values, indent=1).encode() + b"\n"


def _write_file(path: Path, pieces: Pieces) -> dict[str, Any]:
    """Write and fsync a file; its size and sha256."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in _gathered(pieces):
            digest.update(piece)
            size += len(piece)
            left = memoryview(piece)
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _gathered(pieces: Pieces) -> Iterator[bytes | memoryview]:
    """The same bytes in writes of at least PIECE_BYTES, but for the last."""
    waiting: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)


def _publish(target: Path, fill: Callable[[Path], None]) -> None:
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        _make_folders(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
        os.mkdir(partial)
        fill(partial)
        flush_to_disk(partial)
        aside = target.with_name(f"{target.name}.old-{os.getpid()}")
        if target.exists():
            os.rename(target, aside)
        os.rename(partial, target)
        flush_to_disk(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise disk_refusal(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_good(checkpoints: Path, count: int, refuse: Callable[[str], None], over_again: str) -> list[Path]:
    """As `good`.

    Raises:
        IntegrityError: there are checkpoints, and every one of them is bad; each with its reason.
    """
    reasons: list[str] = []

    def note(problem: str) -> None:
        reasons.append(problem)
        refuse(problem)

    found = good(checkpoints, count, note)
    if not found and reasons:
        raise IntegrityError(
            "No checkpoint can be trusted. " + " ".join(reasons),
            safe="Nothing was changed or removed.",
            next_step=over_again,
        )
    return found


def _make_folders(folder: Path) -> None:
    """Make a folder and its parents, each known to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        flush_to_disk(path.parent)


def _remove(folder: Path) -> None:
    """Under another name first, so that a half-removed checkpoint is never taken for a whole one."""
    aside = folder
    if Position.of(folder):
        aside = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
