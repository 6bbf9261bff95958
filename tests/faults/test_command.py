"""What the command says before, after and beside a run (rows 48 and 90 to 99)."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from drawplate import cli
from tests.faults.conftest import write_recipe
from tests.faults.rows import shows


def invoke(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and what was printed on standard error."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def test_row_90_a_recipe_that_cannot_be_meant_is_refused_with_its_place(small: Path, tmp_path: Path) -> None:
    path = write_recipe(small, tmp_path / "run")
    assert invoke("plan", path)[0] == 0, "the control"
    path.write_text(path.read_text() + "train: {seed: 1}\n")
    code, said = invoke("plan", path)
    assert code == 2
    shows(90, said, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "RECIPE", "--set", "data={files: ''}"),
        ("tune", "RECIPE", "--set", "output_dir=''"),
        ("eval", "--model", "BASE", "--data", ""),
        ("eval", "--model", "", "--data", "TEXTS"),
        ("eval", "--model", "BASE", "--adapter", "", "--data", "TEXTS"),
        ("resume", ""),
        ("plan", ""),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1] or 'empty'}",
)
def test_row_90_an_empty_path_is_not_the_current_folder(
    arguments: tuple[str, ...], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"RECIPE": str(write_recipe(small, tmp_path / "run")), "BASE": str(small / "base")}
    names["TEXTS"] = str(small / "texts")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "private.txt").write_text("nobody asked to train on this")
    monkeypatch.chdir(tmp_path / "here")
    code, said = invoke(*(names.get(argument, argument) for argument in arguments))
    assert code == 2
    shows(90, said, 1)
    assert [path.name for path in Path().iterdir()] == ["private.txt"]


def test_row_90_a_pattern_that_is_none_and_a_key_of_another_library(small: Path, tmp_path: Path) -> None:
    path = write_recipe(small, tmp_path / "run")
    code, said = invoke("plan", path, "--set", "lora.target_modules=.*(q_proj")
    assert code == 2
    shows(90, said, 2)
    code, said = invoke("plan", path, "--set", "lora.use_dora=true")
    assert code == 2
    shows(90, said, 3)
