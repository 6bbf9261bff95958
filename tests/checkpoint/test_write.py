"""A checkpoint is whole and verified under its name, or it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import drawplate.checkpoint.write as module
from drawplate.checkpoint.write import (
    MANIFEST_NAME,
    Position,
    finished,
    good,
    keep_only,
    problem_of,
    safetensors_pieces,
    unfinished,
    write_checkpoint,
    write_folder,
)
from drawplate.errors import DiskFull, StorageError

FILES = {"a.bin": [b"alpha", b"beta"], "b.json": [b"{}"]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_its_files_and_their_hashes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "deep" / "checkpoints", Position(120, 7), FILES)
    assert folder.name == "step-000120+000007"
    assert (folder / "a.bin").read_bytes() == b"alphabeta"
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["files"].keys() == FILES.keys()
    assert (manifest["schema"], manifest["step"], manifest["micro_batches"]) == (1, 120, 7)
    assert problem_of(folder) is None
    assert names(folder.parent) == [folder.name]


def test_positions_are_ordered_and_read_back_from_names(tmp_path: Path) -> None:
    positions = [Position(2), Position(2, 5), Position(10), Position(1_000_000)]
    for position in reversed(positions):
        write_checkpoint(tmp_path, position, FILES)
    assert [Position.of(path) for path in finished(tmp_path)] == positions[::-1]
    assert Position.of(Path("step-000120.tmp-7")) is None
    assert str(Position(2, 5)) == "step 2 and 5 micro-batches"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "rename", lambda a, b: (events.append(f"to {Path(b).name}"), real_rename(a, b)))
    write_checkpoint(tmp_path, Position(3), FILES)
    partial = f"sync step-000003.tmp-{os.getpid()}"
    files = ["sync a.bin", "sync b.json", f"sync {MANIFEST_NAME}"]
    assert events == [*files, partial, "to step-000003", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
@pytest.mark.parametrize("number", [5, 28])
def test_a_refused_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    write_checkpoint(tmp_path, Position(1), FILES)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, call, refuse)
    with pytest.raises(StorageError) as raised:
        write_checkpoint(tmp_path, Position(2), FILES)
    monkeypatch.undo()
    assert isinstance(raised.value, DiskFull) == (number == 28)
    assert raised.value.exit_code == 7
    assert os.strerror(number) in raised.value.what
    assert names(tmp_path) == ["step-000001"]
    assert problem_of(tmp_path / "step-000001") is None


def test_a_disk_that_gives_back_other_bytes_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda d, data: real(d, bytes(len(data))))
    with pytest.raises(StorageError, match="read back from the disk is not what was written"):
        write_checkpoint(tmp_path, Position(2), FILES)
    assert names(tmp_path) == []


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda d, data: real(d, data[:3]))
    assert problem_of(write_checkpoint(tmp_path, Position(2), FILES)) is None


def test_pieces_become_writes_of_a_sensible_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 10)
    sizes: list[int] = []
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda d, data: (sizes.append(len(data)), real(d, data))[1])
    write_checkpoint(tmp_path, Position(1), {"a": [b"12345"] * 5, "b": [b"x" * 30]})
    assert sizes[:4] == [10, 10, 5, 30]


def test_newest_good_ones_are_found_and_the_rest_is_named(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, Position(step), FILES) for step in (1, 2, 3)]
    (folders[2] / "a.bin").write_bytes(b"alphaBeta")
    reasons: list[str] = []
    assert good(tmp_path, 1, reasons.append) == [folders[1]]
    assert reasons == ["step-000003/a.bin has other bytes than were written (its sha256 differs)."]
    assert good(tmp_path, 5) == [folders[1], folders[0]]


def test_only_what_is_kept_stays(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, Position(step), FILES) for step in (1, 2, 3)]
    for name in ("step-000004.tmp-1", "step-000001.old-2", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in unfinished(tmp_path)] == ["step-000001.old-2", "step-000004.tmp-1"]
    keep_only(tmp_path, folders[1:])
    assert names(tmp_path) == ["notes", "step-000002", "step-000003"], "and nothing that is not a checkpoint"


def test_a_checkpoint_of_that_name_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Position(1), {"old": [b"1"]})
    write_checkpoint(tmp_path, Position(1), {"new": [b"2"]})
    assert names(tmp_path) == ["step-000001"]
    assert names(tmp_path / "step-000001") == [MANIFEST_NAME, "new"]


def test_safetensors_of_every_kind_read_back_equal() -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "slice": torch.randn(4, 6).t()[1:4],
        "long": torch.tensor([2**40]),
        "double": torch.randn(2, dtype=torch.float64),
    }
    read = load(b"".join(bytes(piece) for piece in safetensors_pieces(tensors)))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_folder_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise error

    write_folder(tmp_path / "x", lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(DiskFull if isinstance(error, OSError) else KeyboardInterrupt):
        write_folder(tmp_path / "x", fill)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "old"


def test_a_folder_of_that_name_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_folder(tmp_path / "x", lambda folder, text=text: (folder / text).write_text(text))
    assert names(tmp_path / "x") == ["new"]
