"""A folder is whole under its name, or it is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import drawplate.checkpoint as module
from drawplate.checkpoint import save_checkpoint, write_folder
from drawplate.errors import StorageError
from drawplate.model.adapter import read_adapter
from tests.tiny import tiny_model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_an_adapter_that_peft_reads_and_its_facts(base: Path, tmp_path: Path) -> None:
    model = tiny_model(base)
    target = save_checkpoint(tmp_path / "checkpoints", 120, model.adapter, {"tokens": 7})
    assert target.name == "step-000120"
    assert json.loads((target / "state.json").read_text()) == {"step": 120, "tokens": 7}
    _, state = read_adapter(target)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.adapter.state().items())


def test_the_newest_and_the_best_are_kept(base: Path, tmp_path: Path) -> None:
    adapter = tiny_model(base).adapter
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save_checkpoint(tmp_path, step, adapter, {}, best_step=best)
        kept = {f"step-{step:06d}"} | ({f"step-{best:06d}"} if best else set())
        assert set(names(tmp_path)) == kept


@pytest.mark.parametrize("where", ["fill", "flush", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        if where == "fill":
            raise error

    write_folder(tmp_path / "x", lambda folder: (folder / "a").write_text("old"))
    if where == "flush":
        monkeypatch.setattr(module.os, "fsync", fail)
    if where == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write_folder(tmp_path / "y", fill)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "old"
    if isinstance(error, OSError):
        assert "No space left on device" in raised.value.what
        assert raised.value.exit_code == 7


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = module._flush, Path.rename
    monkeypatch.setattr(module, "_flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"to {to.name}"), rename(self, to)))

    def fill(folder: Path) -> None:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")

    write_folder(tmp_path / "x", fill)
    assert set(events[:2]) == {"a", "b"}
    assert events[2].startswith("x.tmp-")
    assert events[3:] == ["to x", tmp_path.name]


def test_a_folder_of_that_name_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_folder(tmp_path / "x", lambda folder, text=text: (folder / text).write_text(text))
    assert names(tmp_path / "x") == ["new"]
