"""Models other than the one that is meant: each tensor of the files is read, inert, or named in an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from drawplate.data.batches import cut_packed
from drawplate.errors import IntegrityError, UsageError
from drawplate.model.base.hub import INDEX_NAME, TENSORS_NAME
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import open_checkpoint
from drawplate.recipe import ModelSection
from tests.model.base.test_weights import edit_config, nats_of, refused
from tests.model.conftest import random_sequences
from tests.model.test_causal_lm import transformers_nats
from tests.tiny import open_base, tiny_model, write_base

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def doubled(base: Path, tmp_path: Path) -> Path:
    """The tensors of another model of the same shapes."""
    tensors = {name: tensor * 2 for name, tensor in load_file(base / TENSORS_NAME).items()}
    save_file(tensors, tmp_path / "doubled.safetensors", {"format": "pt"})
    return tmp_path / "doubled.safetensors"


def with_tensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    whole = {**load_file(folder / TENSORS_NAME), **tensors}
    save_file({n: t.contiguous() for n, t in whole.items()}, folder / TENSORS_NAME, {"format": "pt"})
    return folder


# --- which file holds a tensor -----------------------------------------------------------------------------------


def test_model_safetensors_is_read_whatever_lies_beside_it(base: Path, copy: Path, doubled: Path) -> None:
    shutil.copy(doubled, copy / SHARD)
    index = {"weight_map": dict.fromkeys(load_file(doubled), SHARD)}
    (copy / INDEX_NAME).write_text(json.dumps(index))
    checkpoint = open_base(copy)
    assert {path.name for path in checkpoint.files.values()} == {TENSORS_NAME}
    assert checkpoint.remarks == (f"Of the weight files in {copy}, {TENSORS_NAME} is read; left out: {SHARD}.",)
    assert open_base(base).remarks == ()


def test_the_index_says_which_of_two_files_holds_a_tensor(base: Path, copy: Path, doubled: Path) -> None:
    (copy / TENSORS_NAME).rename(copy / "a-new.safetensors")
    shutil.copy(doubled, copy / SHARD)
    names = load_file(doubled)
    index = {"weight_map": {**dict.fromkeys(names, "a-new.safetensors"), "model.norm.weight": SHARD}}
    (copy / INDEX_NAME).write_text(json.dumps(index))
    checkpoint = open_base(copy)
    original = load_file(base / TENSORS_NAME)
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), original["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.read("model.norm.weight"), 2 * original["model.norm.weight"])
    assert "each is read from the one that its index names" in checkpoint.remarks[0]


def test_two_files_without_an_index_that_hold_the_same_are_refused(copy: Path, doubled: Path) -> None:
    (copy / TENSORS_NAME).rename(copy / "a-new.safetensors")
    shutil.copy(doubled, copy / SHARD)
    refused(copy, IntegrityError, "nothing says which of them is meant")


def test_a_pointer_of_git_lfs_is_called_one(copy: Path) -> None:
    (copy / TENSORS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4096\n")
    assert "git lfs pull" in refused(copy, IntegrityError, "pointer of Git LFS").next_step


def test_an_adapter_as_the_model_is_called_one(copy: Path) -> None:
    (copy / "config.json").rename(copy / "adapter_config.json")
    assert "--adapter" in refused(copy, UsageError, "holds an adapter, not a model").next_step


def test_a_file_as_the_model_is_led_to_its_folder(copy: Path, tmp_path: Path) -> None:
    refused(copy / TENSORS_NAME, UsageError, "is a file")
    (tmp_path / "some.gguf").touch()
    with pytest.raises(IntegrityError, match=r"some\.gguf cannot be converted"):
        open_checkpoint(ModelSection(name_or_path=str(tmp_path / "some.gguf")))


# --- codes instead of weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "torchao", "later"])
def test_a_configuration_that_says_quantized_is_refused_by_the_format(copy: Path, method: str) -> None:
    edit_config(copy, quantization_config={"quant_method": method})
    refused(copy, UsageError, rf"format that Drawplate does not read \({method}\)")
    edit_config(copy, quantization_config=None, text_config={"quantization_config": {"quant_method": method}})
    refused(copy, UsageError, rf"format that Drawplate does not read \({method}\)")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({UP: torch.ones(128, 64).to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}, "fp8"),
        ({UP: torch.ones(128, 64, dtype=torch.int8), f"{UP}_scale": torch.ones(128, 1)}, "codes with scales"),
        ({UP: torch.ones(128, 64, dtype=torch.int8)}, "stored as I8"),
        ({UP: torch.ones(128, 64).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
        ({UP.replace("weight", "qweight"): torch.ones(8, 128, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({UP.replace("weight", "weight_packed"): torch.ones(8, 128, dtype=torch.int32)}, "compressed-tensors"),
        ({"model.layers.1.mlp.experts.gate_up_proj_blocks": torch.ones(8, dtype=torch.uint8)}, "MXFP4"),
    ],
)
def test_codes_that_no_configuration_mentions_are_refused(copy: Path, tensors: dict[str, Tensor], words: str) -> None:
    refused(with_tensors(copy, tensors), UsageError, words)


def test_int8_of_bitsandbytes_is_the_same_model_with_and_without_a_prefix(copy: Path, tmp_path: Path) -> None:
    meant, coded = {}, {}
    for name, weight in load_file(copy / TENSORS_NAME).items():
        meant[name] = coded[name] = weight
        if name.endswith("_proj.weight"):
            row = weight.abs().amax(1) / 127
            coded[name] = (weight / row[:, None]).round().to(torch.int8)
            coded[name.removesuffix("weight") + "SCB"] = row * 127
            meant[name] = coded[name].float() * row[:, None]
    nats = []
    for kind, prefix in (("prefixed", "model."), ("bare", "")):
        shutil.copytree(copy, tmp_path / kind)
        save_file(
            {prefix + n.removeprefix("model."): t for n, t in coded.items()},
            tmp_path / kind / TENSORS_NAME,
            {"format": "pt"},
        )
        nats.append(nats_of(tmp_path / kind, Storage("int8")))
        with pytest.raises(IntegrityError, match=r"stored as torch\.int8"):
            tiny_model(tmp_path / kind)
    save_file(meant, copy / TENSORS_NAME, {"format": "pt"})
    assert nats[0] == nats[1] == pytest.approx(nats_of(copy, Storage("int8")), rel=1e-6)


# --- tensors that nobody reads -----------------------------------------------------------------------------------


def test_a_head_of_its_own_beside_a_tied_configuration_is_used_as_transformers_does(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "model", tie_word_embeddings=False)
    sequences = random_sequences([9, 17, 30])
    untied = nats_of(folder, Storage("fp32"))
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = open_base(folder)
    assert "another head, which is used" in checkpoint.remarks[0]
    assert nats_of(folder, Storage("fp32")) == untied
    batch = cut_packed(sequences, 64, 8, 0)[0]
    with torch.no_grad():
        ours = float(tiny_model(folder).sum_nats(batch)[0])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert ours == pytest.approx(transformers_nats(checkpoint, sequences, theirs), rel=1e-5)


def test_a_copy_of_the_embedding_as_the_head_is_no_other_head(copy: Path) -> None:
    before = nats_of(copy, Storage("fp32"))
    with_tensors(copy, {"lm_head.weight": load_file(copy / TENSORS_NAME)["model.embed_tokens.weight"]})
    assert open_base(copy).remarks == ()
    assert nats_of(copy, Storage("fp32")) == before


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "score.weight",
        "model.vision_tower.x.weight",
    ],
)
def test_a_tensor_that_the_model_does_not_read_is_named(copy: Path, name: str) -> None:
    refused(with_tensors(copy, {name: torch.ones(4)}), IntegrityError, f"1 tensors .* does not read, the first {name}")


def test_tensors_that_are_known_to_change_nothing_are_let_be(copy: Path) -> None:
    before = nats_of(copy, Storage("fp32"))
    inert = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.embeddings.position_ids": torch.arange(4),
        "model.layers.0.attn.masked_bias": torch.ones(1),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(4),
    }
    assert nats_of(with_tensors(copy, inert), Storage("fp32")) == before
    with_tensors(copy, {"model.layers.0.attn.bias": torch.ones(4)})
    refused(copy, IntegrityError, "model.layers.0.attn.bias")
