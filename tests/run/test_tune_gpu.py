"""Whole jobs on a real GPU: runs, other people's trainers, generation, on a tiny model in every placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import drawplate
from drawplate.recipe import MemorySection, ModelSection
from drawplate.records import RunRecord
from tests.tiny import tiny_recipe, write_base

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]
PLACEMENTS = {
    "resident": {"weights": "device", "activations": "keep"},
    "streamed": {"weights": "host", "activations": "offload"},
}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that every kernel of a GPU takes."""
    return write_base(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512, num_attention_heads=4)


@pytest.fixture(scope="module")
def capped_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2: its scores have a soft cap, which torch's kernel for packed documents does not take."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    return write_base(tmp_path_factory.mktemp("capped"), architecture="gemma2", query_pre_attn_scalar=64, **wide)


@pytest.mark.parametrize("memory", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_a_whole_run_ends_with_an_adapter_that_peft_loads(memory, precision, wide_base, corpus, tmp_path):
    record = a_whole_run(wide_base, corpus, tmp_path / "run", memory=memory, quantization={"precision": precision})
    assert record.plan.packing


def test_where_packed_documents_would_be_attended_to_one_by_one_they_are_padded(capped_base, corpus, tmp_path):
    assert not a_whole_run(capped_base, corpus, tmp_path / "run").plan.packing


def a_whole_run(base: Path, corpus: Path, folder: Path, quantization=None, **sections) -> RunRecord:
    """Compiled, in the GPU's own arithmetic, as a user's is."""
    quantization = {"bnb_4bit_compute_dtype": "auto", "precision": "auto", **(quantization or {})}
    recipe = tiny_recipe(base, corpus, folder, model={"device_map": "cuda"}, quantization=quantization, **sections)
    record = drawplate.tune(recipe)
    assert record.status == "finished"
    assert record.machine.device == "cuda"
    assert record.plan.compiled
    assert record.evaluation.baseline is not None
    assert record.evaluation.final is not None
    assert record.evaluation.final.nats < record.evaluation.baseline.nats
    assert 0 < record.memory.device_peak_bytes < 2**31
    assert record.model.self_check_difference is not None
    assert record.model.self_check_difference < 2e-2
    assert record.model.self_check.gradient_difference < 0.15
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    assert sum(float(p.abs().sum()) for n, p in tuned.named_parameters() if "lora_B" in n) > 0
    return record


@pytest.mark.parametrize("memory", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_a_prepared_model_trains_in_transformers_trainer_and_generates(memory, wide_base, tmp_path):
    model = drawplate.prepare_model(
        str(wide_base),
        model=ModelSection(name_or_path=str(wide_base), device_map="cuda"),
        memory=MemorySection(**memory),
    )
    ids = torch.randint(3, 300, (16, 24), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    written = model.generate(ids[:2, :8].cuda(), max_new_tokens=6, do_sample=False)
    assert written.shape == (2, 14)
    assert torch.equal(written, model.generate(ids[:2, :8].cuda(), max_new_tokens=6, do_sample=False, use_cache=False))
