"""Paths with bytes that are no UTF-8, and locales that know ASCII alone: every writer survives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from drawplate.checkpoint.write import json_pieces
from drawplate.data.documents import read_documents
from drawplate.data.readers.files import printable
from drawplate.ending import ending
from drawplate.recipe import DataSection, load_recipe
from drawplate.run.folder import RunFolder
from drawplate.run.journal import Journal

ODD = os.fsdecode(b"/old/donn\xe9es")
KEPT = {"files": [ODD], "name": "donn\u00e9es"}


def test_json_and_text_and_lines_keep_a_path_that_is_no_utf8(tmp_path):
    folder = RunFolder(tmp_path)
    assert json.loads(folder.write_json("record.json", KEPT).read_bytes()) == KEPT
    assert json.loads(folder.write_lines("intake.jsonl", [KEPT]).read_bytes()) == KEPT
    assert json.loads(b"".join(json_pieces(KEPT))) == KEPT
    assert "donn\\udce9es" in folder.write_text("report.html", ODD).read_text(encoding="utf-8")
    journal = Journal()
    journal.open(tmp_path)
    journal.write("warning", KEPT)
    journal.close()
    [line] = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert json.loads(line)["files"] == [ODD]


def test_what_utf8_can_hold_stays_readable(tmp_path):
    assert "donn\u00e9es" in RunFolder(tmp_path).write_json("a.json", {"a": "donn\u00e9es"}).read_text(encoding="utf-8")


def test_a_recipe_with_such_a_path_is_read_back_equal(tmp_path):
    recipe = load_recipe({"model": {"name_or_path": "m"}, "data": {"files": [ODD]}})
    path = RunFolder(tmp_path).write_text("recipe.yaml", recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_such_a_folder_is_read_under_a_name_that_can_be_shown(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"donn\xe9es")
    os.mkdir(folder)
    with open(os.path.join(folder, b"a.txt"), "w") as file:
        file.write("the cat")
    section = DataSection(files=[os.fsdecode(folder)])
    [document] = read_documents(section, section.files).documents
    assert document.name == printable(os.fsdecode(b"donn\xe9es/a.txt")) == "donn\\xe9es/a.txt"


def test_an_unexpected_error_about_such_a_path_is_written_down(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(typer.Exit), ending():
        raise RuntimeError(f"no such thing: {ODD}")
    assert "donn" in capsys.readouterr().err


def test_an_ascii_locale_refuses_an_output_folder_that_it_cannot_name():
    code = (
        "from pathlib import Path\nfrom drawplate.run.folder import RunFolder\nfrom drawplate.errors import UserError\n"
        "try:\n    RunFolder(Path('/tmp/donn\\u00e9es')).check_free()\nexcept UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=True, cwd=Path.cwd()
    )
    assert b"has a name that this system's locale cannot write" in ended.stdout
