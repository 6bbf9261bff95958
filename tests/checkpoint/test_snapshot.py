"""The training state goes into files and comes back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drawplate.checkpoint.snapshot import NOT_WRITTEN, optimizer_state, read_about, restore, snapshot_files
from drawplate.checkpoint.write import Position, write_checkpoint
from drawplate.errors import IntegrityError
from drawplate.model.layer.adapter import read_adapter
from drawplate.recipe import LoraSection, TrainSection
from drawplate.train.loop import make_optimizer, train
from drawplate.train.task import TrainState
from tests.tiny import tiny_model
from tests.train.test_loop import Notes, padded, same, task_of


def trained(base: Path, section: TrainSection, **changes: Any) -> tuple[Any, torch.optim.Optimizer, TrainState]:
    model = tiny_model(base)
    optimizer = make_optimizer(model.adapter.parameters(), section)
    task = task_of(model, section=section, optimizer=optimizer, **changes)
    return model, optimizer, train(task, Notes(), TrainState())


def saved(tmp_path: Path, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
    files = snapshot_files(model.adapter, optimizer, state, {"run": "x"})
    return write_checkpoint(tmp_path, Position(state.step, state.micro_batches), files)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_adapter_moments_and_state_come_back_equal(base: Path, tmp_path: Path, optim: str) -> None:
    section = TrainSection(optim=optim)
    model, optimizer, state = trained(base, section)
    state.best_adapter, state.cutting, state.policies = model.adapter.state(), padded(2), ["recompute", "offload"]
    folder = saved(tmp_path, model, optimizer, state)
    other = tiny_model(base, seed=5)
    fresh = make_optimizer(other.adapter.parameters(), section)
    back = restore(folder, other, fresh)
    assert same(other.adapter.state(), model.adapter.state())
    assert same(back.best_adapter, state.best_adapter)
    assert other.runner.policies == ("recompute", "offload")
    for field in dataclasses.fields(TrainState):
        if field.name not in NOT_WRITTEN:
            assert getattr(back, field.name) == getattr(state, field.name), field.name
    tensors, scalars = optimizer_state(model.adapter, optimizer)
    again, scalars_again = optimizer_state(other.adapter, fresh)
    assert same(tensors, again)
    assert len(tensors) >= 2 * len(model.adapter.parameters())
    assert scalars == scalars_again
    assert read_about(folder)["run"] == "x"
    _, adapter = read_adapter(folder)
    assert same(adapter, model.adapter.state()), "PEFT's format"


def test_a_half_done_step_comes_back_with_its_gradient(base: Path, tmp_path: Path) -> None:
    model, optimizer, state = trained(base, TrainSection(), cutting=padded(1), until=(1, 2))
    assert (state.step, state.micro_batches) == (1, 2)
    folder = saved(tmp_path, model, optimizer, state)
    other = tiny_model(base)
    back = restore(folder, other, make_optimizer(other.adapter.parameters(), TrainSection()))
    assert (back.step, back.micro_batches) == (1, 2)
    for a, b in zip(model.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.abs().sum() > 0 or b.grad.abs().sum() == 0


def test_a_state_of_another_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path, *trained(base, TrainSection()))
    other = tiny_model(base, LoraSection(r=2))
    with pytest.raises(IntegrityError):
        restore(folder, other, make_optimizer(other.adapter.parameters(), TrainSection()))


def test_only_safetensors_and_json_are_written(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path, *trained(base, TrainSection()))
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
