"""What a run notes while it goes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import drawplate.run.journal as module
from drawplate.records import Evaluation, EvaluationPoint, MemoryPoint, Progress, StepRecord
from drawplate.run.journal import Curve, Journal
from tests.tiny import read_lines


def a_step(step: int, **changes: object) -> StepRecord:
    values = {
        "step": step,
        "epoch": 0.1,
        "loss": 2.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100,
        "counted_tokens": 90,
        "seconds": 0.5,
    }
    return StepRecord(**{**values, **changes})


EVALUATION = Evaluation(nats=20.0, tokens=10, bytes=40)


def test_every_event_is_a_line_of_strict_json(tmp_path: Path) -> None:
    journal = Journal(log_frequency=2)
    journal.open(tmp_path)
    with journal.in_phase("train"):
        for step in range(1, 5):
            journal.on_step(a_step(step, grad_norm=float("nan")), step / 4)
        journal.on_evaluation(4, EVALUATION)
        journal.on_warning("mind the gap")
    journal.close()
    journal.on_warning("after the end")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert " ".join(line["event"] for line in lines) == (
        "step memory step memory step step memory evaluation warning memory phase"
    )
    assert [line["step"] for line in lines if line["event"] == "memory"] == [1, 2, 4, 4]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert next(line for line in lines if line["event"] == "evaluation")["perplexity"] == pytest.approx(7.389, rel=1e-3)
    assert journal.warnings == ["mind the gap", "after the end"]


def test_lines_are_there_before_the_run_ends(tmp_path: Path) -> None:
    journal = Journal()
    journal.open(tmp_path)
    journal.on_step(a_step(1), 0.5)
    assert {line["event"] for line in read_lines(tmp_path / "metrics.jsonl")} == {"step", "memory"}
    journal.close()


def test_memory_is_sampled_at_the_frequency_asked_for() -> None:
    journal = Journal(log_frequency=5)
    with journal.in_phase("train"):
        for step in range(1, 12):
            journal.on_step(a_step(step), 0.0)
    assert [point.step for point in journal.memory] == [1, 5, 10, 11]
    assert all(point.sample.process_bytes > 2**20 for point in journal.memory)


def test_the_observer_sees_phase_progress_and_figures() -> None:
    seen: list[Progress] = []
    journal = Journal(seen.append)
    with journal.in_phase("train"):
        journal.on_step(a_step(1), 0.25)
        journal.on_step(a_step(2), 0.5)
        journal.on_micro_batch(3, 1, 4, None)
        journal.on_micro_batch(3, 4, 4, None)
    journal.on_evaluation(0, EVALUATION)
    shown = [p for p in seen if p.figures]
    assert [p.done for p in shown] == [25, 50, 50]
    assert shown[1].figures["tokens/s"] == "200"
    assert shown[1].figures["loss"] == "2.500"
    assert shown[2].figures["micro-batch"] == "1/4"
    assert seen[-1].message == "Held-out perplexity 7.39 before training"
    assert {p.phase for p in seen[:-1]} == {"train"}


def test_trackers_get_steps_evaluations_and_memory() -> None:
    told: list[object] = []
    journal = Journal()
    journal.trackers = told.append
    journal.on_step(a_step(1), 0.1)
    journal.on_evaluation(1, EVALUATION)
    assert [type(event) for event in told] == [StepRecord, MemoryPoint, EvaluationPoint]


def test_a_phase_that_fails_is_timed_and_the_one_around_it_goes_on() -> None:
    journal = Journal()
    with journal.in_phase("train"):
        with pytest.raises(ValueError, match="x"), journal.in_phase("evaluate"):
            raise ValueError("x")
        assert journal.phase == "train"
    assert list(journal.phase_seconds) == ["evaluate", "train"]
    assert journal.phase_seconds["train"] >= journal.phase_seconds["evaluate"] >= 0


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 1000, 12345])
def test_a_curve_stays_even_and_keeps_its_ends(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CURVE_POINTS", 20)
    curve: Curve[int] = Curve()
    for point in range(count):
        curve.add(point)
    kept = list(curve)
    assert len(kept) <= 21
    assert len(kept) >= min(count, 10)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert len(set(gaps[:-1])) <= 1, "all gaps are equal but the last"
    assert all(gap <= max(gaps[:1]) for gap in gaps)


def test_metrics_are_appended_to_and_never_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "step"}) + "\n")
    journal = Journal()
    journal.open(tmp_path)
    journal.write("warning", {"message": "ü"})
    journal.close()
    assert [line["event"] for line in read_lines(tmp_path / "metrics.jsonl")] == ["step", "warning"]
    assert "ü" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_later_process_takes_up_the_curves_and_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CURVE_POINTS", 8)
    first, whole = Journal(), Journal()
    first.open(tmp_path)
    for step in range(1, 12):
        first.on_step(a_step(step), 0.1)
        whole.on_step(a_step(step), 0.1)
    first.on_evaluation(11, EVALUATION)
    first.on_warning("mind the gap")
    kept = json.loads(json.dumps(first.kept()))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')  # killed in the middle of a line
    second = Journal()
    second.open(tmp_path)
    second.take_up(kept)
    for step in range(12, 30):
        second.on_step(a_step(step), 0.1)
        whole.on_step(a_step(step), 0.1)
    second.close()
    assert list(second.steps) == list(whole.steps)
    assert second.evaluations == first.evaluations
    assert second.warnings == ["mind the gap"]
    assert second.seconds >= first.seconds - 1
    assert second.first_step_seconds == first.first_step_seconds > 0
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if line["event"] == "step"]
    assert steps == list(range(1, 30)), "the torn line is gone and nothing else"
