"""Faults that need a GPU (rows 14, 16 and 17)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import drawplate.run as story
from drawplate.accumulate import _contradicted
from drawplate.device import PeakMeter
from drawplate.recipe import load_recipe
from drawplate.records import LedgerLine
from tests.faults.conftest import values_of

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


@pytest.mark.gpu
def test_row_14_a_real_refusal_of_the_allocator_cuts_the_micro_batch(small: Path, tmp_path: Path) -> None:
    """The allocator may hold only what is held now and some MiB, once training begins."""
    whole = tune(small, tmp_path / "whole")
    begin, total = story.train, torch.cuda.get_device_properties(0).total_memory
    limited: list[float] = []

    def squeezed(task: Any, journal: Any, state: Any) -> Any:
        torch.cuda.empty_cache()
        add_gradients = task.model.add_gradients

        def once(batch: Any, **options: Any) -> Any:
            if len(batch.documents) > 1 and not limited:
                limited.append(1.0)
                torch.empty(total, dtype=torch.uint8, device="cuda")  # the allocator's own refusal
            return add_gradients(batch, **options)

        task.model.add_gradients = once
        return begin(task, journal, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "train", squeezed)
        record = tune(small, tmp_path / "run")
    assert record.training.corrections
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
