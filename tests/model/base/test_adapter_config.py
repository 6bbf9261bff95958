"""Adapters as other programs save them: PEFT's own loss, or an error that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drawplate.data.batches import cut_packed
from drawplate.errors import IntegrityError, UsageError, UserError
from drawplate.model.base.adapter_config import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from drawplate.model.base.weights import Checkpoint
from drawplate.model.layer.adapter import read_adapter
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import require_fit
from tests.model.test_causal_lm import FP32, nats, transformers_nats

TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
COMPUTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "an alpha by module": {"alpha_pattern": {"q_proj": 64, "layers.1.self_attn.v_proj": 3}},
    "a rank by module": {"rank_pattern": {"v_proj": 2, ".*1.mlp.down_proj": 7}},
    "both, rank-stabilised": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 1.5}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "all but some modules": {"exclude_modules": ["down_proj"]},
    "a Gaussian start": {"init_lora_weights": "gaussian"},
    "an orthogonal start": {"init_lora_weights": "orthogonal"},
}
NOT_COMPUTED: dict[str, Any] = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "alora_invocation_tokens": [1],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "arrow_config": {"router_top_k": 2},
    "rotate_every_layer": True,
}


@pytest.fixture
def plain(llama: Checkpoint, tmp_path: Path) -> Path:
    return saved(llama, tmp_path / "plain")


def saved(llama: Checkpoint, folder: Path, **keys: Any) -> Path:
    """An adapter that PEFT made, with noise in every tensor."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(**{**TARGETS, **keys}, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    made.save_pretrained(folder)
    return folder


def edited(folder: Path, **keys: Any) -> Path:
    values = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**values, **keys}))
    return folder


@pytest.mark.parametrize("keys", COMPUTED.values(), ids=COMPUTED.keys())
def test_an_adapter_that_peft_saved_gives_pefts_loss(llama, sequences, keys: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(llama, tmp_path / "adapter", **keys)
    config, state = read_adapter(folder)
    require_fit(config, state, build_anatomy(llama.config), "it")
    model = assemble(llama, Placement(**FP32), config, seed=0)
    model.adapter.load_state(state, "it")
    base = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    expected = transformers_nats(llama, sequences, PeftModel.from_pretrained(base, folder))
    assert nats(model, cut_packed(sequences, 64, 8, 0)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(transformers_nats(llama, sequences), rel=1e-3), "the adapter has an effect"


@pytest.mark.parametrize("key", NOT_COMPUTED)
def test_what_is_not_computed_is_refused_by_its_key(plain: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"asks for {key}: ") as error:
        read_adapter_config(edited(plain, **{key: NOT_COMPUTED[key]}))
    assert "PEFT" in error.value.next_step


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "later", ["x"]])
def test_a_start_that_changes_the_base_is_refused(plain: Path, start: Any) -> None:
    with pytest.raises(UsageError, match="init_lora_weights"):
        read_adapter_config(edited(plain, init_lora_weights=start))


def test_keys_of_a_later_peft_that_say_off_change_nothing(plain: Path) -> None:
    assert read_adapter_config(edited(plain, rotate_every_layer=False, later_config=None, later_list=[])).r == 4


@pytest.mark.parametrize(
    "keys",
    [
        *({"r": r} for r in (0, -1, 2.5, "4", True, None)),
        *({"lora_alpha": alpha} for alpha in ("8", None, True)),
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"target_modules": "("},
        {"target_modules": None},
        {"layers_pattern": "layers", "layers_to_transform": None},
        {"peft_type": "ADALORA"},
        {"peft_type": None},
    ],
)
def test_values_that_cannot_be_meant_are_a_users_error(plain: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        read_adapter_config(edited(plain, **keys))


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", ', "[1]", "7", "", "\udcff"])
def test_a_damaged_configuration_is_a_users_error(plain: Path, text: str) -> None:
    (plain / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(IntegrityError, match=CONFIG_NAME):
        read_adapter_config(plain)


@pytest.mark.parametrize("keep", [0, 4, 300, -10])
def test_truncated_tensors_are_a_users_error(plain: Path, keep: int) -> None:
    (plain / WEIGHTS_NAME).write_bytes((plain / WEIGHTS_NAME).read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=f"{WEIGHTS_NAME} is damaged"):
        read_adapter(plain)


def test_the_folder_of_a_run_points_to_its_adapter(plain: Path) -> None:
    with pytest.raises(UsageError, match="One of its folders does") as error:
        read_adapter(plain.parent)
    assert error.value.next_step == f"Name {plain}."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {}, r"of 32 tensors .* it lacks 32 \(the first base_model"),
        (lambda state: dict(list(state.items())[:16]), "it lacks 16"),
        (lambda state: {f"model.{n}": t for n, t in state.items()}, "it lacks 32 .* no place for 32"),
        (lambda state: {n: t.repeat(2, 1) for n, t in state.items()}, "have another shape: 32"),
        (lambda state: {**state, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, r"no place for 1 \(the"),
    ],
)
def test_tensors_that_do_not_fit_are_counted(llama: Checkpoint, plain: Path, change: Any, words: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in change(load_file(plain / WEIGHTS_NAME)).items()}
    save_file(state, plain / WEIGHTS_NAME)
    config, read = read_adapter(plain)
    with pytest.raises(IntegrityError, match=words):
        require_fit(config, read, build_anatomy(llama.config), "it")
    with pytest.raises(IntegrityError, match=words):
        assemble(llama, Placement(**FP32), config, seed=0).adapter.load_state(read, "it")
