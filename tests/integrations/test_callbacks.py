from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from drawplate.errors import UsageError
from drawplate.integrations.callbacks import MemoryUsageCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(tmp_path, callback: MemoryUsageCallback, **arguments) -> Trainer:
    arguments = {"max_steps": 7, "per_device_train_batch_size": 2, **arguments}
    trainer = Trainer(
        model=tiny_llama(),
        args=TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=5, **arguments
        ),
        train_dataset=examples(8),
        eval_dataset=examples(2),
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def memory_entries(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "memory_process" in entry]


def test_a_trainers_log_history_has_memory_every_log_frequency_steps(tmp_path):
    callback = MemoryUsageCallback(log_frequency=3)
    trainer = trained(tmp_path, callback, save_strategy="no")
    entries = memory_entries(trainer)
    assert [entry["step"] for entry in entries] == [3, 6, 7]
    assert all(entry["memory_process_peak"] >= entry["memory_process"] > 10_000_000 for entry in entries)
    assert [point.step for point in callback.samples] == [3, 6, 7]
    assert [point.phase for point in callback.samples] == ["train", "train", "end"]
    assert any("loss" in entry for entry in trainer.state.log_history), "the Trainer's own entries stay"


def test_steps_are_optimizer_steps_not_micro_batches(tmp_path):
    callback = MemoryUsageCallback(log_frequency=2)
    trained(tmp_path, callback, save_strategy="no", max_steps=4, gradient_accumulation_steps=2)
    assert [point.step for point in callback.samples if point.phase == "train"] == [2, 4]


def test_evaluation_is_sampled_too(tmp_path):
    callback = MemoryUsageCallback(log_frequency=100)
    trained(tmp_path, callback, save_strategy="no", eval_strategy="steps", eval_steps=7)
    assert [point.phase for point in callback.samples] == ["evaluate", "end"]


def test_the_entries_are_saved_with_the_trainers_checkpoint(tmp_path):
    trained(tmp_path, MemoryUsageCallback(log_frequency=3), save_strategy="steps", save_steps=7)
    state = json.loads((tmp_path / "checkpoint-7" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "memory_process" in entry] == [3, 6]


def test_a_frequency_below_one_is_refused():
    with pytest.raises(UsageError, match="log_frequency is 0"):
        MemoryUsageCallback(log_frequency=0)
