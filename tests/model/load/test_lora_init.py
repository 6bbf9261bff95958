"""An adapter that starts from the quantization error repairs it, and can be taken off its start again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from drawplate.data.batches import cut_packed, cut_padded
from drawplate.model.base.precision import Storage
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import save_adapter
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.lora_init import Start, leading_factors, quantization_error_start, without_start
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from drawplate.records import Sequence
from tests.model.conftest import random_sequences
from tests.tiny import open_base, tiny_model, write_base

NF4 = Storage("nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts() -> list[Sequence]:
    return random_sequences([17, 5, 30, 9, 2, 23])


def section(rank: int, **changes: object) -> LoraSection:
    return LoraSection(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **changes)


def start_of(folder: Path, batches: list, lora: LoraSection) -> tuple[LoraConfig, Start]:
    idle = tiny_model(folder, section(1))
    config = lora_config(lora, build_anatomy(open_base(folder).config), str(folder), None)
    return config, quantization_error_start(idle, NF4, batches, config, seed=0)


def nats(model: CausalLM, texts: list[Sequence]) -> float:
    with torch.no_grad():
        return float(model.sum_nats(cut_padded(texts, 8, 1, 0)[0])[0])


def started(folder: Path, texts: list[Sequence], rank: int) -> float:
    lora = section(rank)
    model = tiny_model(folder, lora, storage=NF4)
    model.adapter.load_state(start_of(folder, cut_packed(texts, 256, 1, 0), lora)[1], "the start")
    return nats(model, texts)


def test_a_start_of_full_rank_gives_the_unquantized_model_and_one_of_less_comes_nearer_to_it(
    folder: Path, texts: list[Sequence]
) -> None:
    plain, four_bits = nats(tiny_model(folder), texts), nats(tiny_model(folder, storage=NF4), texts)
    assert abs(four_bits / plain - 1) > 1e-4, "4 bits cost something here"
    assert started(folder, texts, 64) == pytest.approx(plain, rel=1e-6)
    assert abs(started(folder, texts, 16) - plain) < abs(four_bits - plain)


def test_padding_does_not_weigh(folder: Path, texts: list[Sequence]) -> None:
    _, packed = start_of(folder, cut_packed(texts, 256, 1, 0), section(4))
    _, padded = start_of(folder, cut_padded(texts, 2, 64, 0), section(4))
    for a_name in (name for name in packed if name.endswith("lora_A.weight")):
        b_name = a_name.replace("lora_A", "lora_B")
        one, other = (start[b_name] @ start[a_name] for start in (packed, padded))
        assert torch.allclose(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))


def test_the_factors_are_the_best_of_their_rank_and_alike_in_size() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 24, generator=generator) @ torch.diag(torch.logspace(0, -3, 24))
    left, right = leading_factors(matrix, 6, generator)
    singular = torch.linalg.svdvals(matrix)
    assert float((matrix - left @ right).norm()) == pytest.approx(float(singular[6:].norm()), rel=1e-3)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)
    wide, tall = leading_factors(matrix[:3], 6, generator)
    assert wide.shape == (3, 3)
    assert torch.allclose(wide @ tall, matrix[:3], atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_without_its_start_peft_adds_to_unquantized_weights_what_was_learnt(
    folder: Path, texts: list[Sequence], tmp_path: Path, rslora: bool
) -> None:
    lora = section(4, use_rslora=rslora)
    config, start = start_of(folder, cut_packed(texts, 256, 1, 0), lora)
    torch.manual_seed(2)
    learnt = {name: 0.1 * torch.randn_like(tensor) for name, tensor in start.items()}
    doubled, joined = without_start(config, {name: start[name] + learnt[name] for name in start}, start)
    save_adapter(tmp_path / "adapter", doubled, joined, start)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    scaling = 8 / 2 if rslora else 2
    for name in (n.removesuffix(".lora_A.weight") for n in start if n.endswith("lora_A.weight")):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        expected = (start[b] + learnt[b]) @ (start[a] + learnt[a]) - start[b] @ start[a]
        plain = name.removeprefix("base_model.model.") + ".weight"
        assert torch.allclose(merged.state_dict()[plain] - untouched[plain], scaling * expected, atol=1e-4)
    assert doubled.r == 8
    assert config.r == 4
