"""What the plan says of the disk, against what a run has there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import drawplate.run.saving as saving
import drawplate.run.tune as story
from drawplate.planner.bytes.ledger import PHASES
from drawplate.planner.disk import RunFiles, disk_warning, with_disk_lines
from drawplate.records import PhaseLedger, Plan
from drawplate.run.folder import RunFolder
from drawplate.units import MIB
from tests.tiny import tiny_recipe, write_base

ADAPTER = 4 * 10**6
SAVING, LAST = PHASES.index("checkpoint"), PHASES.index("final evaluation")


@pytest.fixture(scope="module")
def bare(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of 90 steps whose phases have no lines yet."""
    plan = story.plan(tiny_recipe(base, corpus, tmp_path_factory.mktemp("bare") / "run"))
    phases = tuple(PhaseLedger(phase=name, lines=()) for name in PHASES)
    return replace(plan, optimizer_steps=90, phases=phases, ledger=(), times=None)


def disk_of(plan: Plan, phase: int, *, eval_steps: int | None = None, **train: Any) -> dict[str, int]:
    """Name -> bytes of the lines of a phase, for an adapter of 4 MB and a tokenizer of 100 bytes."""
    recipe = tiny_recipe(Path("x"), Path("x"), Path("x"), train=train, evaluation={"eval_steps": eval_steps})
    counted = with_disk_lines(plan, recipe, RunFiles(trained_parameters=10**6, tokenizer_bytes=100))
    assert sum(line.bytes for line in counted.ledger) == max(each.bytes("disk") for each in counted.phases)
    return {line.name: line.bytes for line in counted.phases[phase].lines}


@pytest.mark.parametrize(
    ("settings", "adapters"),
    [
        ({}, 3 * 3),  # two are kept while the third is written
        ({"eval_steps": 9}, 3 * 4),  # with the best adapter in each
        ({"save_steps": 45}, 2 * 3 + 1),  # the first has no moments
        ({"save_steps": 90}, 1 * 3 + 1),
    ],
)
def test_checkpoints_are_counted_with_their_moments_as_many_as_are_there(
    bare: Plan, settings: dict[str, Any], adapters: int
) -> None:
    assert disk_of(bare, SAVING, **settings)["checkpoints"] == adapters * ADAPTER


def test_both_adapters_and_the_start_are_counted_at_the_end(bare: Plan) -> None:
    last = disk_of(replace(bare, starts_from_error=True), LAST, save_steps=90)
    assert last["adapter"] == ADAPTER + 100
    assert last["adapter for the unquantized base"] == 2 * ADAPTER + 100, "its rank is doubled"
    assert last["adapter's start"] == ADAPTER


def test_moments_in_eight_bits_are_smaller(bare: Plan) -> None:
    assert disk_of(bare, SAVING, optim="adamw_8bit")["checkpoints"] == pytest.approx(3 * 1.508 * ADAPTER, rel=0.01)


def test_a_disk_that_is_too_small_is_warned_of(bare: Plan) -> None:
    plan = with_disk_lines(bare, tiny_recipe(Path("x"), Path("x"), Path("x")), RunFiles(trained_parameters=10**6))
    needed = plan.predicted_bytes("disk")
    assert disk_warning(plan, needed, "run") == ""
    assert "43 MiB of the disk of run, and 40 MiB are free" in disk_warning(plan, 40 * MIB, "run")


@pytest.fixture
def fullest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The bytes in the run's folder whenever something is about to be removed from it."""
    seen: list[int] = []

    def look() -> None:
        seen.append(sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()))

    keep_only, remove = saving.keep_only, RunFolder.remove_checkpoints
    monkeypatch.setattr(saving, "keep_only", lambda *arguments: (look(), keep_only(*arguments)))
    monkeypatch.setattr(RunFolder, "remove_checkpoints", lambda self: (look(), remove(self)))
    return seen


def test_a_run_has_within_a_tenth_of_what_was_said(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fullest: list[int]
) -> None:
    """Without the reserve, which would hide an error."""
    for module in ("drawplate.planner.disk", "drawplate.run.folder"):
        monkeypatch.setattr(sys.modules[module], "RESERVE_BYTES", 4096)
    wide = {"r": 64, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": "quantization_error"}
    recipe = tiny_recipe(
        write_base(tmp_path / "base", hidden_size=128, intermediate_size=256),
        corpus,
        tmp_path / "run",
        lora=wide,
        quantization={"precision": "nf4", "bnb_4bit_compute_dtype": "float32"},
        train={"effective_batch_size": 6, "max_steps": 6, "save_steps": 2},
        memory={"rehearsal": "off"},
    )
    plan = story.tune(recipe).plan
    assert plan is not None
    assert plan.starts_from_error
    assert max(fullest) == pytest.approx(plan.predicted_bytes("disk"), rel=0.1)
    assert plan.predicted_bytes("disk") > 7 * MIB, "the adapter is most of it"
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert names == {"adapter", "adapter_unquantized"}, "what only a run under way needs is gone"
