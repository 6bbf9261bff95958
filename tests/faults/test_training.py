"""What goes wrong inside training: memory, numbers, spikes, watchers, clocks (rows 14 to 23, 100)."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import drawplate.run.heldout as measure
import drawplate.run.tune as story
import drawplate.train.guards as guards
import drawplate.train.step as accumulate
from drawplate.data.batches import cut_padded
from drawplate.errors import DoesNotFit, IntegrityError, NumericError, StoppedSafely
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.recipe import load_recipe
from drawplate.records import LedgerLine, MemorySample, Progress, RunRecord
from drawplate.report.wording import verdict
from drawplate.run.trackers import Trackers
from tests.faults.conftest import same_adapter, values_of
from tests.faults.inject import nan_at
from tests.faults.rows import shows
from tests.model.conftest import random_sequences

DROPPING = {"lora": {"lora_dropout": 0.3}}
FIVE = {"effective_batch_size": 5, "max_steps": 4, "save_steps": 1}


def tune(small: Path, run: Path, observer: Any = None, **sections: Any) -> RunRecord:
    return story.tune(load_recipe(values_of(small, run, **sections)), observer)


def losses(record: RunRecord) -> list[float]:
    return [step.loss for step in record.steps]


def no_memory_above(monkeypatch: pytest.MonkeyPatch, tokens: int, *, backward: bool = False) -> None:
    """Micro-batches of more positions than this run out of memory, in training only."""
    forward, calls = FrozenLinear.forward, itertools.count(1)

    def fail(grad: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def spoiled(self: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        real = type(x) is torch.Tensor and not x.is_meta  # a plan runs layers without data
        if real and torch.is_grad_enabled() and x.shape[:-1].numel() > tokens and next(calls) % 5 == 0:
            if not backward:
                fail()
            out.register_hook(fail)
        return out

    monkeypatch.setattr(FrozenLinear, "forward", spoiled)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_row_14_out_of_memory_cuts_the_micro_batch_in_two_and_the_loss_is_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    whole = tune(small, tmp_path / "whole", train=FIVE, **DROPPING)
    no_memory_above(monkeypatch, 130, backward=backward)
    cut = tune(small, tmp_path / "cut", train=FIVE, **DROPPING)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    shows(14, " ".join(cut.warnings), 0)
    assert cut.training.corrections
    assert cut.training.corrections[-1].endswith("tokens")


def test_row_14_the_correction_stays_and_is_in_the_checkpoint(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory_above(monkeypatch, 130)
    on_step = story.Journal.on_step

    def interrupt(self: Any, record: Any, progress: float) -> None:
        on_step(self, record, progress)
        if record.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(story.Journal, "on_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(small, tmp_path / "run", train=FIVE)
    monkeypatch.setattr(story.Journal, "on_step", on_step)
    record = story.resume(tmp_path / "run")
    assert sum("Out of memory in step 1" in warning for warning in record.warnings) >= 1
    assert not any("Out of memory in step 4" in warning for warning in record.warnings), "it is not tried again"


def test_row_14_the_ledger_line_that_was_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tuple(
        LedgerLine(name=name, where="device", bytes=size, formula="")
        for name, size in (("adapter", 10), ("activations kept", 90))
    )
    used = MemorySample(process_bytes=0, process_peak_bytes=0, device_peak_bytes=200)
    monkeypatch.setattr(accumulate, "memory_sample", lambda: used)
    said = accumulate._contradicted(lines)
    shows(14, said, 1)
    assert "activations kept" in said


def test_row_17_memory_that_another_process_took_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (LedgerLine(name="activations kept", where="device", bytes=90, formula=""),)
    used = MemorySample(process_bytes=0, process_peak_bytes=0, device_peak_bytes=50, device_free_bytes=7)
    monkeypatch.setattr(accumulate, "memory_sample", lambda: used)
    shows(17, accumulate._contradicted(lines))


def test_row_14_control_without_the_guard_the_run_ends(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory_above(monkeypatch, 130)
    monkeypatch.setattr(accumulate, "is_out_of_memory", lambda error: False)
    with pytest.raises(torch.OutOfMemoryError):
        tune(small, tmp_path / "run", train=FIVE)


def only_when(monkeypatch: pytest.MonkeyPatch, fits: Any) -> None:
    """Every training pass runs out of memory unless `fits(policy of the layer)`."""
    sum_nats = CausalLM.sum_nats

    def spoiled(self: CausalLM, batch: Any, **options: Any) -> Any:
        if options and not fits(self.runner.policies[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sum_nats(self, batch, **options)

    monkeypatch.setattr(CausalLM, "sum_nats", spoiled)


def test_row_15_at_one_sequence_the_next_rung_is_tried(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {**FIVE, "per_device_train_batch_size": 1}
    whole = tune(small, tmp_path / "whole", train=one, **DROPPING)
    only_when(monkeypatch, lambda policy: policy == "offload")
    record = tune(small, tmp_path / "run", train=one, **DROPPING)
    shows(15, " ".join(record.warnings), 0)
    shows(15, " ".join(record.warnings), 1)
    assert losses(record) == pytest.approx(losses(whole), rel=1e-5)
    assert len(record.training.corrections) == 2


def test_row_15_layers_in_host_memory_stand_on_the_first_rung() -> None:
    runner = SimpleNamespace(policies=["host", "recompute", "keep"])
    model = SimpleNamespace(runner=runner, set_policies=lambda policies: setattr(runner, "policies", policies))
    task = cast(Any, SimpleNamespace(model=model, cutting=None))
    state, one = cast(Any, SimpleNamespace(cutting=None, policies=None)), cut_padded(random_sequences([9]), 1, 1, 0)[0]
    assert accumulate._something_smaller(task, state, one) == "memory.activations: recompute"
    assert list(runner.policies) == state.policies == ["recompute"] * 3
    assert accumulate._something_smaller(task, state, one) == "memory.activations: offload"
    assert accumulate._something_smaller(task, state, one) is None


def test_row_15_with_no_rung_left_it_ends_with_a_saved_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_when(monkeypatch, lambda policy: len(seen) < 5)
    seen: list[int] = []
    on_step = story.Journal.on_step
    monkeypatch.setattr(story.Journal, "on_step", lambda self, r, p: (seen.append(1), on_step(self, r, p)))
    with pytest.raises(DoesNotFit) as error:
        tune(small, tmp_path / "run")
    assert error.value.exit_code == 5
    shows(15, str(error.value), 2)
    assert "Step 5 is saved" in error.value.safe
    monkeypatch.undo()
    assert story.resume(tmp_path / "run").training.optimizer_steps == 9, "with more memory it goes on"


def test_row_18_a_step_that_is_not_a_number_is_skipped_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, lambda step: step == 5)
    record = tune(small, tmp_path / "run")
    shows(18, " ".join(record.warnings), 0)
    assert [step.step for step in record.steps if step.skipped] == [5]
    assert math.isnan(record.steps[4].loss), "never smoothed"
    assert record.training.optimizer_steps == 8


def test_row_18_gradients_alone_count_too(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_at(monkeypatch, lambda step: step == 5, where="gradient")
    record = tune(small, tmp_path / "run")
    assert any(warning.startswith("The gradient of step 5 is not a number.") for warning in record.warnings)
    assert math.isfinite(record.steps[4].loss)
    assert record.steps[4].skipped


def test_row_18_the_second_goes_back_and_a_passing_fault_leaves_no_trace(
    small: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 5 fail once: 4 is skipped, 5 goes back to the checkpoint of step 3, and both are taken."""
    failing = iter([4, 5])
    waiting = [next(failing)]

    def fails(step: int) -> bool:
        if waiting[0] == step:
            waiting[0] = next(failing, 0)
            return True
        return False

    nan_at(monkeypatch, fails)
    record = tune(small, tmp_path / "run")
    shows(18, " ".join(record.warnings), 1)
    assert [step.step for step in record.steps] == list(range(1, 10)), "the curve is that of one run"
    assert record.training.skipped_steps == 0
    assert same_adapter(tmp_path / "run", clean)


def test_row_18_a_lasting_fault_ends_the_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_at(monkeypatch, lambda step: step >= 5)
    with pytest.raises(NumericError) as error:
        tune(small, tmp_path / "run")
    assert error.value.exit_code == 6
    shows(18, str(error.value), 2)


def test_row_18_control_without_the_guard_the_adapter_is_ruined(
    small: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, lambda step: step == 5, where="gradient")
    monkeypatch.setattr("drawplate.train.loop.math", SimpleNamespace(isfinite=lambda _: True))
    with pytest.raises(NumericError, match=r"finite|not a number"):
        tune(small, tmp_path / "run")


def test_row_19_a_spike_is_named_and_nothing_else_happens() -> None:
    steady = [2.0 + 0.01 * (i % 3) for i in range(30)]
    assert guards.is_spike(steady, 4.0)
    assert not guards.is_spike(steady, 2.05)
    assert not guards.is_spike(steady[:5], 4.0), "too few to tell"
    falling = [5.0 - 0.1 * i for i in range(30)]
    assert not guards.is_spike(falling, 5.0)


def test_row_19_a_spike_warns_with_the_documents(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SPIKE_STEPS", 4)
    sum_nats, calls = CausalLM.sum_nats, itertools.count(1)

    def spoiled(self: CausalLM, batch: Any, **options: Any) -> Any:
        loss, nats = sum_nats(self, batch, **options)
        return (loss, nats * 10) if options and next(calls) == 7 else (loss, nats)

    monkeypatch.setattr(CausalLM, "sum_nats", spoiled)
    record = tune(small, tmp_path / "run")
    [warning] = [w for w in record.warnings if "jumped" in w]
    shows(19, warning)
    assert ".txt" in warning
    assert record.training.skipped_steps == 0


def test_row_19_control_a_run_without_a_spike_is_not_warned_of(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SPIKE_STEPS", 4)
    assert not [w for w in tune(small, tmp_path / "run").warnings if "jumped" in w]


def lose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth pass fails as a GPU does that is gone."""
    sum_nats, calls, failure = CausalLM.sum_nats, itertools.count(1), torch.AcceleratorError

    def spoiled(self: CausalLM, batch: Any, **options: Any) -> Any:
        if options and next(calls) == 5:
            raise failure("CUDA error: unspecified launch failure")
        return sum_nats(self, batch, **options)

    monkeypatch.setattr(CausalLM, "sum_nats", spoiled)


def test_row_20_a_lost_device_is_asked_nothing_more(
    small: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[bool] = []
    monkeypatch.setattr("drawplate.machine.device._LOST", lost)
    lose_device(monkeypatch)
    asked = [False]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: asked.__setitem__(0, asked[0] or bool(lost)))
    with pytest.raises(StoppedSafely) as error:
        tune(small, tmp_path / "run")
    assert error.value.exit_code == 75
    shows(20, str(error.value), 0)
    shows(20, str(error.value), 1)
    assert lost
    assert not asked[0]
    lost.clear()
    monkeypatch.undo()
    story.resume(tmp_path / "run")
    assert same_adapter(tmp_path / "run", clean)


def test_row_20_control_without_the_guard_it_is_an_unexpected_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_device(monkeypatch)
    monkeypatch.setattr(torch, "AcceleratorError", ZeroDivisionError)
    with pytest.raises(RuntimeError, match="unspecified launch failure") as error:
        tune(small, tmp_path / "run")
    assert not isinstance(error.value, StoppedSafely)


class _DeadTracker:
    def start(self) -> None:
        raise ConnectionError("network is unreachable")


def test_row_22_a_dead_tracker_and_a_dead_display_change_nothing(
    small: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(recipe: Any, warn: Any) -> Trackers:
        return Trackers({"wandb": _DeadTracker}, {}, warn)  # type: ignore[dict-item]

    monkeypatch.setattr(story, "open_trackers", dead)
    calls = itertools.count()

    def watching(progress: Progress) -> None:
        if next(calls) == 10:
            raise BrokenPipeError("the terminal is gone")

    record = tune(small, tmp_path / "run", watching)
    assert same_adapter(tmp_path / "run", clean)
    said = " ".join(record.warnings)
    shows(22, said, 0)
    shows(22, said, 1)


def test_row_22_control_without_the_guard_the_display_ends_the_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story.Journal, "_observe", lambda self, progress: self._observer(progress))
    calls = itertools.count()

    def watching(progress: Progress) -> None:
        if next(calls) == 10:
            raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError):
        tune(small, tmp_path / "run", watching)


def test_row_23_a_clock_that_jumps_moves_no_duration(
    small: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.count(step=-86_400.0, start=time.time())
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    record = tune(small, tmp_path / "run")
    assert all(0 <= step.seconds < 60 for step in record.steps)
    assert 0 < record.total_seconds < 120
    assert same_adapter(tmp_path / "run", clean)


def test_row_23_control_durations_by_the_date_would_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.count(step=-86_400.0, start=time.time())
    monkeypatch.setattr(guards.time, "monotonic", lambda: next(jumps))
    clock = guards.Clock()
    assert clock.now() - clock.now() > 0, "time runs backwards"


def test_row_100_a_measurement_at_the_end_costs_a_warning_and_the_verdict_names_its_baseline(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> None:
        raise IntegrityError(f"{folder.name} was changed.", next_step="")

    monkeypatch.setattr(measure, "read_adapter", damaged)
    nf4 = {"precision": "nf4", "bnb_4bit_compute_dtype": "float32"}
    record = tune(small, tmp_path / "run", quantization=nf4, train={"max_steps": 1})
    assert record.status == "finished"
    shows(100, " ".join(record.warnings), 0)
    shows(100, verdict(record).detail, 1)
    shows(100, verdict(record).scores, 2)
