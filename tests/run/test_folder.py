"""Who owns a run's folder, and how files get into it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import drawplate.run.folder as module
from drawplate.errors import StorageError
from drawplate.records import Evaluation
from drawplate.run.folder import LOCK_NAME, RunFolder


def refused(path: Path) -> str:
    with pytest.raises(StorageError) as error:
        RunFolder(path).claim()
    assert error.value.exit_code == 7
    assert error.value.safe == "Nothing in it was touched."
    assert "--set output_dir=" in error.value.next_step
    return error.value.what


def test_a_claimed_folder_is_refused_to_a_second_run_until_released(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "a" / "run")
    first.claim()
    assert f"in use by another run (process {os.getpid()} on {socket.gethostname()})" in refused(first.path)
    first.release()
    RunFolder(first.path).claim()


def test_a_lock_of_a_living_process_holds_and_of_a_dead_one_does_not(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from drawplate.run.folder import RunFolder\n"
        f"RunFolder(Path({str(tmp_path)!r})).claim(); print('claimed', flush=True); input()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    owner.stdout.readline()
    assert f"process {owner.pid} " in refused(tmp_path)
    owner.kill()
    owner.communicate()
    assert (tmp_path / LOCK_NAME).is_file(), "a killed run leaves its lock"
    RunFolder(tmp_path).claim()


def test_a_number_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(lock))
    RunFolder(tmp_path).claim()


def test_a_lock_from_another_machine_is_believed(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
    assert "process 1 on elsewhere" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_a_damaged_lock_of_nobody_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    RunFolder(tmp_path).claim()


def test_a_folder_with_anything_in_it_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "is not empty" in refused(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("status", "goes_on"), [("stopped", True), ("finished", False)])
def test_only_a_run_that_is_not_finished_is_offered_to_go_on_with(tmp_path: Path, status: str, goes_on: bool) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "record.json").write_text(json.dumps({"status": status}))
    with pytest.raises(StorageError) as error:
        RunFolder(tmp_path).claim()
    assert ("drawplate resume" in error.value.next_step) is goes_on


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("precious")
    assert "is not a folder" in refused(tmp_path / "f")
    assert "cannot be written" in refused(tmp_path / "f" / "run")
    assert (tmp_path / "f").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert "cannot be written" in refused(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_the_lock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert "No space left on device" in refused(tmp_path / "run")


def test_an_abandoned_run_leaves_the_disk_as_it_found_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "deep" / "run")
    folder.claim()
    folder.write_text("plan.json", "{}")
    (folder.path / "events").mkdir()
    (folder.path / "events" / "e1").write_text("a tracker's")
    folder.abandon()
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_run_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.write_text("plan.json", "{}")
    folder.abandon()
    folder.release()
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_never_claimed_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    folder = RunFolder(tmp_path)
    folder.abandon()
    folder.release()
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_released_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.write_json("e.json", Evaluation(nats=2.0, tokens=1, bytes=3))
    folder.write_lines("e.jsonl", [Evaluation(nats=float("inf"), tokens=1, bytes=3)] * 2)
    folder.release()
    assert sorted(p.name for p in folder.path.iterdir()) == ["e.json", "e.jsonl"]
    assert json.loads((folder.path / "e.json").read_text())["loss"] == 2.0
    lines = (folder.path / "e.jsonl").read_text().splitlines()
    assert [json.loads(line)["nats"] for line in lines] == ["inf", "inf"], "strict JSON has no Infinity"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    folder = RunFolder(tmp_path)
    folder.write_text("record.json", "old")
    monkeypatch.setattr(module.os, call, refuse)
    with pytest.raises(StorageError, match=r"record\.json could not be written: Input/output error"):
        folder.write_text("record.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert (tmp_path / "record.json").read_text() == "old"
