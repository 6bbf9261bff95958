"""A GGUF file is converted once, whole or not at all, and is the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file

from drawplate.data.tokens import load_tokenizer
from drawplate.errors import IntegrityError, StorageError, UsageError, UserError
from drawplate.machine.caches import converted_folder
from drawplate.model.base import gguf as gguf_module
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import open_checkpoint
from drawplate.recipe import ModelSection, cache_folder
from tests.model.base.test_weights import TENSORS, nats_of
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


def parts(base: Path, folder: Path) -> list[Path]:
    """The base model as a GGUF in two parts."""
    folder.mkdir()
    write_gguf(base, folder / "whole.gguf")
    reader = GGUFReader(folder / "whole.gguf")
    half = len(reader.tensors) // 2
    for i, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = GGUFWriter(str(folder / f"m-0000{i + 1}-of-00002.gguf"), "llama")
        for name, field in reader.fields.items() if i == 0 else ():
            if name != "general.architecture" and not name.startswith("GGUF."):
                inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "whole.gguf").unlink()
    return sorted(folder.glob("*.gguf"))


def nothing_is_kept() -> bool:
    folder = converted_folder()
    return not folder.is_dir() or list(folder.iterdir()) == []


def test_parts_that_lie_side_by_side_are_read_together_and_a_part_alone_is_refused(base: Path, tmp_path: Path) -> None:
    first, second = parts(base, tmp_path / "parts")
    for section in (
        ModelSection(name_or_path=str(first.parent)),
        ModelSection(name_or_path=str(first.parent), gguf_file=second.name),
        ModelSection(name_or_path=str(first)),
    ):
        checkpoint = open_checkpoint(section)
        for name, tensor in load_file(base / TENSORS).items():
            assert torch.equal(checkpoint.read(name), tensor.to(torch.bfloat16)), name
    second.unlink()
    shutil.rmtree(converted_folder())
    with pytest.raises(IntegrityError, match=r"one of 2 parts of a model, and m-00002-of-00002\.gguf is not beside it"):
        open_checkpoint(ModelSection(name_or_path=str(first.parent)))
    first.rename(first.with_name("renamed.gguf"))
    with pytest.raises(IntegrityError, match="by its metadata, and not by its name"):
        open_checkpoint(ModelSection(name_or_path=str(first.parent)))
    assert nothing_is_kept()


def test_a_file_that_lacks_tensors_is_refused_and_nothing_is_made_up(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(base, folder)
    tensors = load_file(base / TENSORS)
    write_gguf(folder, tmp_path / "whole.gguf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 1}))
    write_gguf(folder, folder / "m.gguf")
    assert len(tensors) > 11
    whole = (folder / "m.gguf").read_bytes()
    key = b"llama.block_count"
    place = whole.index(key) + len(key) + 4
    (folder / "m.gguf").write_bytes(whole[:place] + (2).to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(IntegrityError, match=r"lacks 9 tensors .* model\.layers\.1\."):
        open_checkpoint(ModelSection(name_or_path=str(folder), gguf_file="m.gguf"))
    assert nothing_is_kept()


def test_a_merge_whose_result_is_no_token_is_a_users_error(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vocabulary"
    shutil.copytree(base, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["merges"].append(["Q", "Z"])
    (folder / "tokenizer.json").write_text(json.dumps(values))
    write_gguf(folder, tmp_path / "m.gguf")
    with pytest.raises(IntegrityError, match=r"vocabulary of .* cannot be read"):
        open_checkpoint(ModelSection(name_or_path=str(tmp_path / "m.gguf")))
    assert nothing_is_kept()
