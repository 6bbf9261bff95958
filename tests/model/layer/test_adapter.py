"""Adapters in PEFT's format: what we save, PEFT loads, and the two give the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drawplate.data.batches import cut_packed
from drawplate.errors import IntegrityError, UsageError
from drawplate.model.base.adapter_config import WEIGHTS_NAME
from drawplate.model.layer.adapter import Adapter, read_adapter
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from tests.model.conftest import write_model
from tests.model.test_causal_lm import build, nats, transformers_nats

SECTIONS = {
    "q and v": LoraSection(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all linear": LoraSection(r=3, lora_alpha=5),
    "rank stabilised": LoraSection(r=4, lora_alpha=8, use_rslora=True),
    "one layer by full name": LoraSection(r=2, target_modules=["model.layers.1.self_attn.q_proj"]),
    "by pattern": LoraSection(r=2, target_modules=r".*layers\.[02]\..*\.(up|down)_proj"),
}


def perturb(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_peft_loads_what_we_save_and_gives_the_same_loss(section, llama, sequences, tmp_path: Path) -> None:
    model = build(llama, section)
    perturb(model.adapter)
    model.adapter.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = nats(model, cut_packed(sequences, 64, 8, 0))
    assert ours == pytest.approx(transformers_nats(llama, sequences, theirs), rel=1e-5)
    assert ours != pytest.approx(transformers_nats(llama, sequences), rel=1e-3), "the adapter has an effect"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_reach_peft(bias: str, sequences, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "qwen2", "qwen2")
    model = build(checkpoint, LoraSection(r=2, bias=bias))
    perturb(model.adapter)
    model.adapter.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = nats(model, cut_packed(sequences, 64, 8, 0))
    assert ours == pytest.approx(transformers_nats(checkpoint, sequences, theirs), rel=1e-5)


def test_an_adapter_comes_back_as_it_was(llama, tmp_path: Path) -> None:
    model = build(llama)
    perturb(model.adapter)
    model.adapter.save(tmp_path / "a")
    config, state = read_adapter(tmp_path / "a")
    other = build(llama, seed=99)
    other.adapter.load_state(state, "a")
    assert config.r == 4
    assert all(torch.equal(a, b) for a, b in zip(model.adapter.parameters(), other.adapter.parameters(), strict=True))


def test_the_seed_alone_decides_the_start(llama) -> None:
    torch.manual_seed(1)
    first = build(llama, seed=3).adapter.state()
    torch.manual_seed(2)
    second, third = build(llama, seed=3).adapter.state(), build(llama, seed=4).adapter.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_save_that_loses_tensors_is_refused(llama, tmp_path: Path) -> None:
    model = build(llama)
    state = model.adapter.state()
    state.pop(next(iter(state)))
    with pytest.raises(IntegrityError, match="where 56 were trained"):
        model.adapter.save(tmp_path / "a", state)


def test_an_adapter_of_another_shape_is_refused(llama, tmp_path: Path) -> None:
    build(llama).adapter.save(tmp_path / "a")
    _, state = read_adapter(tmp_path / "a")
    with pytest.raises(IntegrityError, match="does not fit"):
        build(llama, LoraSection(r=8)).adapter.load_state(state, "a")


def test_a_pickled_adapter_is_not_opened(llama, tmp_path: Path) -> None:
    build(llama).adapter.save(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS_NAME).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(IntegrityError, match="not opened"):
        read_adapter(tmp_path / "a")


def test_an_unknown_target_names_those_there_are(llama) -> None:
    with pytest.raises(UsageError, match="query_proj") as error:
        lora_config(LoraSection(target_modules=["query_proj"]), build_anatomy(llama.config), "x", None)
    assert "q_proj" in error.value.next_step


def test_saved_tensors_are_those_of_peft_by_name(llama, tmp_path: Path) -> None:
    from peft import get_peft_model, get_peft_model_state_dict

    model = build(llama)
    model.adapter.save(tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(llama.folder)
    config = lora_config(LoraSection(r=4), build_anatomy(llama.config), str(llama.folder), None)
    config.inference_mode = False
    theirs = get_peft_model_state_dict(get_peft_model(base, config))
    ours = load_file(tmp_path / "a" / WEIGHTS_NAME)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
