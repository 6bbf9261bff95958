"""Every tensor of a base model is read, known to change nothing, or named in a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from drawplate.errors import IntegrityError, UsageError, UserError
from drawplate.model.storage import Storage
from drawplate.model.weights import open_checkpoint
from drawplate.recipe import ModelSection
from tests.tiny import tiny_model, write_base

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("accounting") / "base", tie_word_embeddings=False)


@pytest.fixture
def altered(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model with other tensors, and other keys in its configuration."""

    def make(change: Callable[[State], State], **keys: object) -> Path:
        folder = tmp_path / "altered"
        folder.mkdir()
        for path in plain.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file(change(load_file(plain / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        return folder

    return make


def with_biases(state: State) -> State:
    return state | {
        n.replace("weight", "bias"): t[:, 0].clone() for n, t in state.items() if n.endswith("q_proj.weight")
    }


def of_scales(state: State) -> State:
    codes = {n: t.to(torch.float8_e4m3fn) for n, t in state.items() if n.endswith("_proj.weight")}
    return state | codes | {f"{n}_scale_inv": torch.ones(1, 1) for n in codes}


@pytest.mark.parametrize(
    ("change", "keys", "kind", "said"),
    [
        (with_biases, {}, IntegrityError, "2 tensors that LlamaForCausalLM does not read: .*q_proj.bias"),
        (lambda state: state, {"num_hidden_layers": 1}, IntegrityError, r"9 tensors .*model\.layers\.1\."),
        (of_scales, {}, UsageError, "stored as float8_e4m3fn codes"),
        (of_scales, {"quantization_config": {"quant_method": "fp8"}}, UsageError, "quantized with fp8"),
        (lambda s: s, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, UsageError, "quantized with gptq"),
    ],
)
def test_what_the_model_does_not_read_is_named(altered, change, keys, kind: type[UserError], said: str) -> None:
    with pytest.raises(kind, match=said):
        tiny_model(altered(change, **keys))


def test_tables_that_code_computes_are_let_through(altered) -> None:
    tiny_model(altered(lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))


def test_a_head_beside_tied_embeddings_is_used_as_transformers_does_and_said(altered) -> None:
    folder = altered(lambda state: state, tie_word_embeddings=True)
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(folder)))
    assert "The head in the files is used" in checkpoint.notes[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight
    assert torch.equal(tiny_model(folder).head.weights.weight_VH, theirs)
    assert not torch.equal(theirs, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def test_a_head_that_is_the_embedding_stays_tied(altered) -> None:
    def same(state: State) -> State:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

    folder = altered(same, tie_word_embeddings=True)
    assert open_checkpoint(ModelSection(name_or_path=str(folder))).notes == ()
    assert tiny_model(folder).anatomy.tied


def two_files(plain: Path, folder: Path) -> tuple[State, State]:
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    new = load_file(plain / "model.safetensors")
    return new, {name: tensor * 2 for name, tensor in new.items()}


def test_one_file_counts_before_any_index_and_others_are_said(plain: Path, tmp_path: Path) -> None:
    new, old = two_files(plain, tmp_path)
    save_file(new, tmp_path / "model.safetensors")
    save_file(old, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(new, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(tmp_path)))
    assert {path.name for path in checkpoint.files.values()} == {"model.safetensors"}
    assert "model-00001-of-00001.safetensors is not read" in checkpoint.notes[0]


def test_an_index_says_which_of_two_files_holds_a_tensor(plain: Path, tmp_path: Path) -> None:
    new, old = two_files(plain, tmp_path)
    save_file(new, tmp_path / "a-new.safetensors")
    save_file(old, tmp_path / "z-old.safetensors")
    places = {**dict.fromkeys(new, "a-new.safetensors"), "model.norm.weight": "z-old.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(tmp_path)))
    assert torch.equal(checkpoint.read("lm_head.weight"), new["lm_head.weight"])
    assert torch.equal(checkpoint.read("model.norm.weight"), old["model.norm.weight"])


def test_two_files_with_one_tensor_and_no_index_are_refused(plain: Path, tmp_path: Path) -> None:
    new, old = two_files(plain, tmp_path)
    save_file(new, tmp_path / "one.safetensors")
    save_file(old, tmp_path / "two.safetensors")
    with pytest.raises(IntegrityError, match=r"one\.safetensors and two\.safetensors both hold"):
        open_checkpoint(ModelSection(name_or_path=str(tmp_path)))


def test_a_pointer_of_git_lfs_is_called_one(plain: Path, tmp_path: Path) -> None:
    two_files(plain, tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n"
    )
    with pytest.raises(IntegrityError, match="Git LFS pointer"):
        open_checkpoint(ModelSection(name_or_path=str(tmp_path)))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_that_bitsandbytes_stored_in_int8_are_read_under_either_naming(altered, prefix: str) -> None:
    """Both hold the same codes and scales, so both give the same numbers."""

    def stored(state: State) -> State:
        out: State = {}
        for name, weight in state.items():
            bare = name if name.startswith("lm_head") else prefix + name.removeprefix("model.")
            if not name.endswith("_proj.weight"):
                out[bare] = weight
                continue
            row = weight.abs().amax(1) / 127
            out[bare] = (weight / row[:, None]).round().to(torch.int8)
            out[bare.removesuffix("weight") + "SCB"] = row * 127
        return out

    folder = altered(stored, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    model = tiny_model(folder, storage=Storage("int8"))
    weight = model.residency.stored(0)["self_attn.q_proj.int8"]
    assert int(weight.abs().max()) == 127
    with pytest.raises(UsageError, match="already quantized to int8"):
        tiny_model(folder)
