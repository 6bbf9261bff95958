"""Base models as they lie on people's disks: whole, damaged, quantized by others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from drawplate.data.batches import cut_packed
from drawplate.errors import IntegrityError, NeedsNetwork, UsageError, UserError
from drawplate.model.base.hub import INDEX_NAME
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import open_checkpoint
from drawplate.recipe import ModelSection
from drawplate.run.tune import plan
from tests.model.conftest import random_sequences
from tests.tiny import open_base, tiny_model, tiny_recipe

TENSORS = "model.safetensors"


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A base model that a test may damage."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or leave them out where None; dots in names are written as double underscores."""
    tensors = load_file(folder / TENSORS)
    for name, tensor in changes.items():
        del tensors[name.replace("__", ".")]
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def refused(folder: Path, kind: type[UserError], words: str) -> UserError:
    with pytest.raises(kind, match=words) as error:
        tiny_model(folder)
    assert error.value.next_step
    return error.value


# --- what is there, and what is wrong with it --------------------------------------------------------------------


def test_a_whole_model_opens_and_nothing_is_read_before_it_is_asked_for(base: Path) -> None:
    checkpoint = open_base(base)
    original = load_file(base / TENSORS)
    assert checkpoint.files.keys() == original.keys()
    assert torch.equal(checkpoint.read("model.norm.weight"), original["model.norm.weight"])
    assert checkpoint.quantized_precision is None


def test_a_sharded_model_opens(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(set(open_base(tmp_path).files.values())) > 1
    batches = cut_packed(random_sequences([9, 17]), 64, 8, 0)
    with torch.no_grad():
        one, many = (float(tiny_model(folder).sum_nats(batches[0])[0]) for folder in (base, tmp_path))
    assert one == many
    shard = next(iter(set(open_base(tmp_path).files.values())))
    shard.unlink()
    refused(tmp_path, IntegrityError, "missing or damaged")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(copy: Path, text: str) -> None:
    (copy / TENSORS).rename(copy / "model-00001-of-00001.safetensors")
    (copy / INDEX_NAME).write_text(text)
    refused(copy, IntegrityError, INDEX_NAME)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(NeedsNetwork, match="nowhere") as error:
        open_checkpoint(ModelSection(name_or_path=name))
    assert error.value.exit_code == 9


def test_a_folder_without_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    refused(tmp_path, UsageError, r"holds no config\.json")


def test_a_folder_without_weights_is_said_to_have_none(copy: Path) -> None:
    (copy / TENSORS).unlink()
    refused(copy, UsageError, "holds no weights")


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"model_type": "no-such-thing"}', "{}"])
def test_a_config_that_is_none_is_a_users_error(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(copy, UserError, "config")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_a_pickle_is_never_opened(copy: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (copy / name).write_bytes(pickle.dumps(_Canary(canary)))
    tiny_model(copy)
    (copy / TENSORS).unlink()
    error = refused(copy, IntegrityError, name)
    assert error.exit_code == 8
    assert not canary.exists()
    pickle.loads((copy / name).read_bytes())
    assert canary.exists(), "the test can tell"


def test_code_that_comes_with_a_model_is_never_imported(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (copy / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\nclass Evil: pass\n")
    before = nats_of(copy, Storage("fp32"))
    edit_config(copy, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    assert nats_of(copy, Storage("fp32")) == before, "an architecture that transformers has is read as it has it"
    edit_config(copy, model_type="evil")
    assert refused(copy, IntegrityError, "asks to run code").exit_code == 8
    assert not canary.exists()


def test_an_attention_implementation_from_the_hub_is_refused(copy: Path) -> None:
    edit_config(copy, _attn_implementation="somebody/kernels")
    refused(copy, IntegrityError, "asks to run code")


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_file_is_named(copy: Path, keep: int) -> None:
    whole = (copy / TENSORS).read_bytes()
    (copy / TENSORS).write_bytes(whole[:keep])
    assert TENSORS in refused(copy, IntegrityError, "damaged").what


def test_a_file_that_is_something_else_is_named(copy: Path) -> None:
    (copy / TENSORS).write_bytes(b"<html>404</html>" * 100)
    refused(copy, IntegrityError, TENSORS)


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__1__mlp__up_proj__weight",
        "model__layers__0__input_layernorm__weight",
        "model__norm__weight",
        "model__embed_tokens__weight",
    ],
)
def test_a_missing_tensor_is_named(copy: Path, name: str) -> None:
    edit_tensors(copy, **{name: None})
    refused(copy, IntegrityError, name.replace("__", r"\."))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model__layers__1__mlp__up_proj__weight", (127, 64)),
        ("model__layers__1__mlp__up_proj__weight", (1, 64)),
        ("model__layers__1__mlp__up_proj__weight", (64, 128)),
        ("model__layers__0__input_layernorm__weight", (1,)),
        ("model__layers__0__input_layernorm__weight", (65,)),
        ("model__norm__weight", (1,)),
        ("model__embed_tokens__weight", (100, 64)),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_tensor_of_the_wrong_shape_is_named_and_never_broadcast(
    copy: Path, name: str, shape: tuple[int, ...], precision: str
) -> None:
    edit_tensors(copy, **{name: torch.ones(shape)})
    with pytest.raises(IntegrityError, match=name.replace("__", r"\.") + ".*shape"):
        tiny_model(copy, storage=Storage(precision))


def test_the_hash_follows_the_content(copy: Path) -> None:
    first = open_base(copy).sha256()
    assert open_base(copy).sha256() == first
    edit_tensors(copy, model__norm__weight=torch.full((64,), 2.0))
    assert open_base(copy).sha256() != first


# --- quantized by others -----------------------------------------------------------------------------------------


def quantized(base: Path, folder: Path, **options: object) -> Path:
    """The base model as transformers and bitsandbytes save it in 4 or 8 bits."""
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def nats_of(folder: Path, storage: Storage) -> float:
    with torch.no_grad():
        batch = cut_packed(random_sequences([9, 17, 30]), 64, 8, 0)[0]
        return float(tiny_model(folder, storage=storage).sum_nats(batch)[0])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_a_model_quantized_by_bitsandbytes_is_taken_as_it_is(
    base: Path, tmp_path: Path, kind: str, double: bool
) -> None:
    folder = quantized(
        base, tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    checkpoint, storage = open_base(folder), Storage(kind, double)
    assert (checkpoint.quantized_precision, checkpoint.quantized_doubly) == (kind, double)
    name = "model.layers.1.mlp.up_proj"
    stored = checkpoint.stored_linear(name, storage)
    weight = open_base(base).read(f"{name}.weight")
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    assert torch.equal(stored["packed"], packed)
    decoded = storage.decode(
        [stored[part] for part in storage.specs(*weight.shape)], tuple(weight.shape), torch.float32
    )
    assert torch.equal(decoded, bnb.dequantize_4bit(packed, state))
    assert nats_of(folder, storage) == pytest.approx(nats_of(base, storage), rel=1e-6)
    with pytest.raises(UsageError, match="already quantized") as error:
        checkpoint.stored_linear(name, Storage(kind, not double))
    assert f"bnb_4bit_use_double_quant: {str(double).lower()}" in error.value.next_step


def test_the_plan_follows_a_quantized_checkpoint_and_refuses_another_precision(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = quantized(base, tmp_path / "q", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    auto = {"precision": "auto"}
    chosen = plan(tiny_recipe(folder, corpus, tmp_path / "run", quantization=auto))
    assert (chosen.precision, chosen.double_quant) == ("fp4", False)
    for asked in ("bf16", "nf4"):
        with pytest.raises(UsageError, match="already quantized to fp4"):
            plan(tiny_recipe(folder, corpus, tmp_path / "run", quantization={"precision": asked}))


def test_a_model_in_8_bits_is_taken_as_it_is(base: Path, tmp_path: Path) -> None:
    folder = quantized(base, tmp_path, load_in_8bit=True)
    checkpoint = open_base(folder)
    assert checkpoint.quantized_precision == "int8"
    assert checkpoint.quantized_doubly is None
    assert nats_of(folder, Storage("int8")) == pytest.approx(nats_of(base, Storage("int8")), rel=2e-3)


def test_blocks_of_another_size_are_refused(base: Path, tmp_path: Path) -> None:
    folder = quantized(base, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    name = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = load_file(folder / TENSORS)
    facts = json.loads(bytes(tensors[name].tolist()))
    tensors[name] = torch.tensor(list(json.dumps({**facts, "blocksize": 128}).encode()), dtype=torch.uint8)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="128"):
        tiny_model(folder, storage=Storage("nf4", False))


def test_an_adapter_names_a_hub_base_by_its_repository_and_a_local_one_by_its_folder(llama) -> None:
    assert llama.loadable_name == str(llama.folder)
    snapshot = replace(llama, name="owner/model", folder=llama.folder.parent / "abc123", revision="abc123")
    assert snapshot.loadable_name == "owner/model"
    converted = replace(snapshot, folder=llama.folder)
    assert converted.loadable_name == str(llama.folder)


def test_an_index_that_names_a_file_outside_of_the_folder_is_refused_though_the_file_exists(llama, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(llama.files, "../elsewhere.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="outside"):
        open_checkpoint(ModelSection(name_or_path=str(folder)))
