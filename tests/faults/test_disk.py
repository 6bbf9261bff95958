"""Disks that are full, failing or closed to us (rows 6 to 8)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import drawplate.run.folder as run_folder
import drawplate.run.saving as saving
import drawplate.run.tune as story
from drawplate.errors import DiskFull, StoppedSafely, StorageError, disk_refusal
from drawplate.machine.doctor import examine
from drawplate.recipe import load_recipe
from drawplate.records import RunRecord
from drawplate.run.folder import RunFolder
from tests.faults.conftest import same_adapter, values_of
from tests.faults.inject import SmallDisk
from tests.faults.rows import shows
from tests.tiny import read_lines

MIB = 2**20


def tune(small: Path, run: Path, **sections: Any) -> RunRecord:
    return story.tune(load_recipe(values_of(small, run, **sections)))


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that fills the disk for the checkpoints of the steps it is given."""
    write = saving.write_checkpoint

    def spoil(steps: set[int], number: int = errno.ENOSPC) -> None:
        def spoiled(checkpoints: Path, position: Any, files: Any) -> Path:
            if position.step not in steps:
                return write(checkpoints, position, files)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync" if number == errno.EIO else "write", _refuse(number))
                return write(checkpoints, position, files)

        monkeypatch.setattr(saving, "write_checkpoint", spoiled)
        monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)

    return spoil


def _refuse(number: int) -> Any:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_row_06_a_full_disk_costs_a_warning_and_is_tried_again(
    small: Path, clean: Path, tmp_path: Path, full_at: Any
) -> None:
    full_at({3})
    record = tune(small, tmp_path / "run")
    shows(6, " ".join(record.warnings), 0)
    assert same_adapter(tmp_path / "run", clean)
    names = [line["name"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "checkpoint"]
    assert names[:2] == ["step-000000", "step-000004"], "tried again at the next step, the older one kept till then"


def test_row_06_the_third_refusal_ends_the_run_where_it_can_go_on(
    small: Path, clean: Path, tmp_path: Path, full_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(set(range(4, 10)))
    with pytest.raises(StoppedSafely) as stopped:
        tune(small, tmp_path / "run")
    assert stopped.value.exit_code == 75
    shows(6, str(stopped.value), 1)
    shows(6, str(stopped.value), 2)
    assert "step-000003" in stopped.value.safe
    monkeypatch.undo()
    story.resume(tmp_path / "run")
    assert same_adapter(tmp_path / "run", clean)


def test_row_06_control_a_refusal_that_is_not_caught_ends_the_run(
    small: Path, tmp_path: Path, full_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at({3})
    monkeypatch.setattr(saving, "DiskFull", ZeroDivisionError)
    with pytest.raises(StorageError):
        tune(small, tmp_path / "run")


def test_row_06_log_and_report_are_written_from_the_reserve(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, on_step = tmp_path / "run", story.Journal.on_step
    disks: list[SmallDisk] = []

    def fill(self: Any, record: Any, progress: float) -> None:
        if record.step == 5:
            disks.append(SmallDisk(monkeypatch, run, 0))
            disks[0].quota = disks[0].used  # not a byte more
        on_step(self, record, progress)

    monkeypatch.setattr(story.Journal, "on_step", fill)
    tune(small, run)
    assert disks[0].refused
    assert not (run / ".reserve").exists()
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]
    assert steps == list(range(1, 10)), "no line is lost"


def test_row_06_control_without_a_reserve_lines_are_lost_and_counted(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, on_step = tmp_path / "run", story.Journal.on_step
    monkeypatch.setattr(RunFolder, "make_room", lambda self: False)
    disks: list[SmallDisk] = []

    def fill(self: Any, record: Any, progress: float) -> None:
        if record.step == 5:
            disks.append(SmallDisk(monkeypatch, run, 0))
        on_step(self, record, progress)
        if record.step == 5:
            disks[0].quota = 10**9

    monkeypatch.setattr(story.Journal, "on_step", fill)
    record = tune(small, run)
    shows(6, " ".join(record.warnings), 3)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]
    assert 5 not in steps
    assert 6 in steps, "and the file holds whole lines only"


def test_row_07_an_io_error_ends_the_run_and_the_checkpoint_is_not_called_good(
    small: Path, tmp_path: Path, full_at: Any
) -> None:
    full_at({6}, errno.EIO)
    with pytest.raises(StorageError) as error:
        tune(small, tmp_path / "run")
    assert error.value.exit_code == 7
    shows(7, str(error.value), 0)
    shows(7, str(error.value), 1)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000000", "step-000003"]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"


def test_row_07_control_an_error_that_nobody_looks_at_is_called_good(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: Any
) -> None:
    full_at({6}, errno.EIO)
    monkeypatch.setattr("drawplate.checkpoint.write.flush_to_disk", lambda path: None)
    write_file = __import__("drawplate.checkpoint.write", fromlist=["x"])._write_file

    def careless(path: Path, pieces: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            return write_file(path, pieces)

    monkeypatch.setattr("drawplate.checkpoint.write._write_file", careless)
    tune(small, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000006").is_dir()


def test_row_08_a_folder_that_is_not_ours_is_refused_before_the_model_is_opened(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "prepare", lambda *_: pytest.fail("the model was opened"))
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere, so the question is answered as for a person
        monkeypatch.setattr("drawplate.run.folder.os.access", lambda path, mode: False)
    with pytest.raises(StorageError) as error:
        tune(small, tmp_path / "locked" / "run")
    assert error.value.exit_code == 7
    shows(8, str(error.value), 0)
    shows(8, str(error.value), 1)


def test_row_08_control_without_the_question_the_model_is_opened(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(story, "prepare", opened)
    monkeypatch.setattr(RunFolder, "check_free", lambda self: None)
    monkeypatch.setattr("drawplate.run.folder.os.access", lambda path, mode: False)
    with pytest.raises(ZeroDivisionError):
        tune(small, tmp_path / "run")


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An arena on a disk that becomes full after step 5 of the run beside it."""
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "cache"))
    arena = tmp_path / "cache" / "arenas" / "nf4-a.arena"
    arena.parent.mkdir(parents=True)
    arena.write_bytes(bytes(MIB))
    on_step = story.Journal.on_step

    def fill(self: Any, record: Any, progress: float) -> None:
        if record.step == 5:
            disk = SmallDisk(monkeypatch, tmp_path, 0)
            disk.quota = disk.used + 4096  # some lines of the log, and no checkpoint
        on_step(self, record, progress)

    monkeypatch.setattr(story.Journal, "on_step", fill)
    return arena


def test_row_46_a_run_without_room_takes_it_from_the_caches(
    small: Path, clean: Path, tmp_path: Path, crowded: Path
) -> None:
    record = tune(small, tmp_path / "run")
    shows(46, " ".join(record.warnings), 0)
    assert not crowded.exists()
    assert "tries again" not in " ".join(record.warnings)
    assert same_adapter(tmp_path / "run", clean)


def test_row_46_control_without_the_caches_room_the_checkpoint_is_refused(
    small: Path, tmp_path: Path, crowded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "release", lambda beside: 0)
    assert "tries again" in " ".join(tune(small, tmp_path / "run").warnings)
    assert crowded.exists()


@pytest.fixture
def no_room_for_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk of the run takes no adapter; the present folder, on another disk, does."""
    write, elsewhere = run_folder.write_folder, tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def refuse(target: Path, fill: Any) -> None:
        if target == tmp_path / "run" / "adapter":
            raise disk_refusal(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write(target, fill)

    monkeypatch.setattr(run_folder, "write_folder", refuse)
    return elsewhere


def test_row_46_an_adapter_that_has_no_room_is_written_elsewhere_and_named(
    small: Path, clean: Path, tmp_path: Path, no_room_for_the_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(StoppedSafely) as stopped:
        tune(small, run)
    for which in (1, 2, 3):
        shows(46, str(stopped.value), which)
    (rescued,) = no_room_for_the_adapter.iterdir()
    weights = "adapter_model.safetensors"
    assert (rescued / weights).read_bytes() == (clean / "adapter" / weights).read_bytes()
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "stopped"
    assert str(rescued) in record["warnings"][-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000009"], "the older one made room"
    monkeypatch.undo()
    story.resume(run)
    assert same_adapter(run, clean)


def test_row_46_control_without_another_place_the_adapter_is_lost(
    small: Path, tmp_path: Path, no_room_for_the_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "TRAINED_NAMES", ())
    with pytest.raises(DiskFull):
        tune(small, tmp_path / "run")
    assert list(no_room_for_the_adapter.iterdir()) == []


def test_row_46_a_full_disk_is_recognised_in_the_words_of_safetensors() -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert isinstance(disk_refusal(Path("x"), error), DiskFull)
    other = SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")
    assert not isinstance(disk_refusal(Path("x"), other), DiskFull)


@pytest.mark.parametrize("name", ["cache", "hub cache"])
def test_row_110_a_cache_below_something_that_is_no_folder_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    row = next(check for check in examine() if check.name == name)
    assert row.status == "missing"
    shows(110, row.found)
