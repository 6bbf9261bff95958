"""A GGUF file is converted once, whole or not at all, and is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drawplate.data.tokens import load_tokenizer
from drawplate.errors import StorageError, UsageError, UserError
from drawplate.model import gguf as gguf_module
from drawplate.model.storage import Storage
from drawplate.model.weights import open_checkpoint
from drawplate.recipe import ModelSection, cache_folder
from tests.model.test_weights import TENSORS, nats_of
from tests.tiny import write_gguf


@pytest.fixture
def gguf(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSection:
    """A folder with a GGUF file, and a converter that copies the base model in its place and counts its calls."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF and more")

    def convert(source: Path, gguf_file: str, target: Path) -> None:
        CALLS.append(gguf_file)
        for path in base.iterdir():
            shutil.copy(path, target)

    CALLS.clear()
    monkeypatch.setattr(gguf_module, "_write_converted", convert)
    return ModelSection(name_or_path=str(folder), gguf_file="m.gguf")


CALLS: list[str] = []


def test_a_gguf_file_is_converted_once(gguf: ModelSection) -> None:
    first, second = open_checkpoint(gguf), open_checkpoint(gguf)
    assert CALLS == ["m.gguf"]
    assert first.folder == second.folder
    assert first.folder.is_relative_to(cache_folder())


def test_a_converted_gguf_file_is_the_same_model_with_the_same_tokens(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(tmp_path), gguf_file="m.gguf"))
    original = load_file(base / TENSORS)
    for name, tensor in original.items():
        assert torch.equal(checkpoint.read(name), tensor.to(torch.bfloat16)), name
    ours, theirs = load_tokenizer(checkpoint.folder), load_tokenizer(base)
    assert ours("the sea is rising 3.").input_ids == theirs("the sea is rising 3.").input_ids
    assert nats_of(checkpoint.folder, Storage("fp32")) == pytest.approx(nats_of(base, Storage("fp32")), rel=2e-2)


def test_another_file_of_that_name_is_converted_anew(gguf: ModelSection) -> None:
    first = open_checkpoint(gguf)
    (Path(gguf.name_or_path) / "m.gguf").write_bytes(b"GGUF and something else")
    assert open_checkpoint(gguf).folder != first.folder
    assert len(CALLS) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_conversion_is_not_taken_for_a_whole_one(
    gguf: ModelSection, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = gguf_module._write_converted

    def half(source: Path, gguf_file: str, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(gguf_module, "_write_converted", half)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        open_checkpoint(gguf)
    assert list((cache_folder() / "converted").iterdir()) == []
    monkeypatch.setattr(gguf_module, "_write_converted", whole)
    assert "model.norm.weight" in open_checkpoint(gguf).files


def test_a_gguf_file_that_is_not_there_or_is_none_is_a_users_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no GGUF file .*m\.gguf"):
        open_checkpoint(ModelSection(name_or_path=str(base), gguf_file="m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"not a GGUF file at all" * 10)
    with pytest.raises(UserError, match=r"m\.gguf"):
        open_checkpoint(ModelSection(name_or_path=str(tmp_path), gguf_file="m.gguf"))
