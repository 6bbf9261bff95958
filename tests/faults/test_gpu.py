"""Faults that need a GPU (rows 14 to 17)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drawplate.run.tune as story
from drawplate.machine.memory import PeakMeter
from drawplate.model.causal_lm import CausalLM
from drawplate.recipe import load_recipe
from drawplate.records import LedgerLine
from drawplate.train.step import _contradicted
from tests.faults.conftest import values_of
from tests.faults.rows import shows

GPU = {
    "model": {"device_map": "cuda", "compile": False},
    "quantization": {"precision": "fp32", "bnb_4bit_compute_dtype": "float32"},
    "train": {"effective_batch_size": 5, "max_steps": 4, "save_steps": 1},
    "data": {"packing": False},  # documents that share a row are computed one by one in fp32, which no graph captures
}


def tune(small: Path, run: Path, **sections: Any) -> Any:
    return story.tune(load_recipe(values_of(small, run, **{**GPU, **sections})))


@pytest.mark.gpu
def test_row_16_resuming_needs_no_more_than_running(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step = story.Journal.on_step

    def interrupt(self: Any, record: Any, progress: float) -> None:
        on_step(self, record, progress)
        if record.step == 3:
            raise KeyboardInterrupt

    torch.cuda.empty_cache()
    with monkeypatch.context() as patch, PeakMeter() as running:
        patch.setattr(story.Journal, "on_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(small, tmp_path / "run")
    torch.cuda.empty_cache()
    with PeakMeter() as resuming:
        story.resume(tmp_path / "run")
    assert 0 < resuming.device_peak_bytes <= running.device_peak_bytes


def refusing(monkeypatch: pytest.MonkeyPatch, too_large: Callable[[CausalLM, Any], bool]) -> None:
    """The allocator is asked for more than there is, at each training pass that is `too_large`."""
    total, add_gradients = torch.cuda.get_device_properties(0).total_memory, CausalLM.add_gradients

    def squeezed(self: CausalLM, batch: Any, **options: Any) -> Any:
        if too_large(self, batch):
            torch.empty(total, dtype=torch.uint8, device="cuda")  # its own refusal
        return add_gradients(self, batch, **options)

    monkeypatch.setattr(CausalLM, "add_gradients", squeezed)


@pytest.mark.gpu
def test_row_14_a_real_refusal_of_the_allocator_cuts_the_micro_batch(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(small, tmp_path / "whole")
    refused: list[int] = []

    def first(model: CausalLM, batch: Any) -> bool:
        if refused or len(batch.documents) < 2:
            return False
        refused.append(len(batch.documents))
        return True

    refusing(monkeypatch, first)
    record = tune(small, tmp_path / "run")
    assert record.training.corrections
    assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in whole.steps], rel=1e-5)


@pytest.mark.gpu
def test_row_15_at_one_sequence_the_next_rung_is_tried(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"train": {**GPU["train"], "per_device_train_batch_size": 1}}
    whole = tune(small, tmp_path / "whole", **one)
    refusing(monkeypatch, lambda model, batch: model.runner.policies[0] != "offload")
    record = tune(small, tmp_path / "run", **one)
    shows(15, " ".join(record.warnings), 0)
    shows(15, " ".join(record.warnings), 1)
    assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in whole.steps], rel=1e-5)


@pytest.mark.gpu
def test_row_17_memory_that_another_process_takes_is_named() -> None:
    """A second process takes nearly all of the device; what is free is told apart from what the plan needs."""
    code = (
        "import torch; free, _ = torch.cuda.mem_get_info(); x = torch.empty(max(0, free - 2**28), dtype=torch.uint8, "
        "device='cuda'); print('held', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**29, dtype=torch.uint8, device="cuda")
        said = _contradicted((LedgerLine(name="x", where="device", bytes=2**40, formula=""),))
        assert "another process may hold the rest" in said
    finally:
        other.communicate("\n")
