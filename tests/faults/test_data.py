"""What is left out of the data, or learnt otherwise than it looks, is said (rows 80 to 82)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drawplate.data.cautions import cautions
from drawplate.data.chat.template import chat_renderer
from drawplate.data.documents import Corpus, read_documents
from drawplate.data.tokens import load_tokenizer, tokenize
from drawplate.recipe import DataSection
from tests.faults.rows import shows
from tests.tiny import write_tokenizer

CLOSED = "{% for m in messages %}{{ '<s>' + m.role + ' ' + m.content + '</s>' }}{% endfor %}"
TALK = [{"role": "user", "content": "sea"}, {"role": "assistant", "content": "ice"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


def read(folder: Path, path: Path, template: str = CLOSED, **changes: Any) -> tuple[Corpus, Any]:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    section = DataSection(files=[str(path)])
    return read_documents(section, section.files, chat_renderer(tokenizer)), tokenizer


def said(corpus: Corpus, tokenizer: Any, length: int = 64) -> str:
    windows = tokenize(corpus.documents, tokenizer, length, append_eos=True)
    return "\n".join(cautions(corpus.documents, windows, tokenizer, length))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_row_80_what_is_left_out_or_guessed_is_said_in_a_line_each(folder: Path, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "function_call": {"name": "look"}}
    write(tmp_path / "rows.jsonl", {"messages": TALK}, {"messages": [TALK[0], call]})
    (tmp_path / "cells.csv").write_text('text\n"ice" melts\n')
    (tmp_path / "old.txt").write_bytes("la mer près des côtes".encode("cp1252"))
    (tmp_path / "letter.docx").write_bytes(b"PK")
    corpus, _ = read(folder, tmp_path)
    seen = "\n".join(corpus.left_out)
    shows(80, seen, 0)
    shows(80, seen, 1)
    shows(80, seen, 2)
    shows(80, seen, 3)
    assert len(corpus.documents) == 2


def test_row_80_control_what_is_read_whole_is_not_remarked_on(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"messages": TALK})
    (tmp_path / "cells.csv").write_text('text\n"ice ""melts"""\n')
    assert read(folder, tmp_path)[0].left_out == ()


def test_row_81_what_does_not_teach_the_model_to_stop_is_said(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": TALK}, {"text": "ice melts"})
    shows(81, said(*read(folder, path, CLOSED.replace("</s>", "\\n"))), 0)
    shows(81, said(*read(folder, path, eos_token=None)), 1)


def test_row_81_control_closed_answers_and_texts_are_not_remarked_on(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": TALK}, {"text": "ice melts"})
    assert said(*read(folder, path)) == ""


def test_row_82_prompts_that_do_not_fit_are_said(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "sea " * 30, "completion": "ice"})
    shows(82, said(*read(folder, path), length=16))


def test_row_82_control_prompts_that_fit_are_not_remarked_on(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "sea " * 3, "completion": "ice"})
    assert said(*read(folder, path), length=64) == ""
