"""When checkpoints are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import drawplate.run.tune as story
from tests.tiny import read_lines, tiny_recipe

TRAIN = {"effective_batch_size": 6, "per_device_train_batch_size": 2, "max_steps": 3}


def written(base: Path, corpus: Path, run: Path, **train: Any) -> list[str]:
    record = story.tune(tiny_recipe(base, corpus, run, train={**TRAIN, **train}))
    assert record.training.checkpoint_seconds > 0
    return [line["name"] for line in read_lines(run / "metrics.jsonl") if line["event"] == "checkpoint"]


def test_by_steps_and_at_both_ends(base: Path, corpus: Path, tmp_path: Path) -> None:
    assert written(base, corpus, tmp_path / "run", save_steps=2) == ["step-000000", "step-000002", "step-000003"]


def test_by_minutes_within_a_long_step_too(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"save_steps": 100, "save_minutes": 1e-9}
    assert written(base, corpus, tmp_path / "short", **often) == [f"step-{step:06d}" for step in range(4)]
    monkeypatch.setattr("drawplate.train.step.FINISH_SECONDS", -1.0)
    names = written(base, corpus, tmp_path / "long", **often)
    assert names[:4] == ["step-000000", "step-000000+000001", "step-000000+000002", "step-000001"]


def test_how_a_run_is_saved_changes_nothing(base: Path, corpus: Path, tmp_path: Path) -> None:
    adapters = []
    for name, steps in (("a", 1), ("b", 100)):
        written(base, corpus, tmp_path / name, save_steps=steps)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
