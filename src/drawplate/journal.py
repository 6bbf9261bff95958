"""What a run leaves behind while it goes: metrics.jsonl, the curves of the record, and words for whoever watches.

Times are monotonic seconds since the run began. Curves are thinned by halving when they reach their bound, so a run of
any length keeps an even picture of itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drawplate.data.batches import Batch
from drawplate.device import memory_sample
from drawplate.records import Evaluation, EvaluationPoint, MemoryPoint, Progress, StepRecord, to_json
from drawplate.units import format_bytes

CURVE_POINTS = 2000
METRICS_NAME = "metrics.jsonl"
Observer = Callable[[Progress], None]
Event = StepRecord | EvaluationPoint | MemoryPoint


class Journal:
    """The listener of a run; also usable without a folder, to show progress alone.

    Args:
        observer: shown each `Progress`.
        log_frequency: optimizer steps between memory samples.

    Attributes:
        trackers: told each step, evaluation and memory record.
    """

    def __init__(self, observer: Observer | None = None, *, log_frequency: int = 10) -> None:
        self._observer = observer or (lambda _: None)
        self.trackers: Callable[[Event], None] = lambda _: None
        self._log_frequency = log_frequency
        self._started = time.monotonic()
        self._file: Any = None
        self.phase = ""
        self.phase_seconds: dict[str, float] = {}
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationPoint] = []
        self.memory: list[MemoryPoint] = []
        self.warnings: list[str] = []
        self._tokens = 0
        self._training_seconds = 0.0
        self._figures: dict[str, str] = {}
        self._share = 0.0

    def open(self, folder: Path) -> None:
        """Begin metrics.jsonl in the run's folder."""
        self._file = (folder / METRICS_NAME).open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """Flush and close metrics.jsonl."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    def write(self, event: str, record: Any) -> None:
        """One line of metrics.jsonl."""
        if self._file is not None:
            line = {"event": event, "time": round(self.seconds, 3), **to_json(record)}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """A named part of the run: its seconds and its memory are kept."""
        before, began, self.phase = self.phase, time.monotonic(), name
        self.show(0, 0)
        try:
            yield
        finally:
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.monotonic() - began
            self.sample_memory()
            self.write("phase", {"name": name, "seconds": round(time.monotonic() - began, 3)})
            self.phase = before

    def show(self, done: float, total: float, unit: str = "", figures: dict[str, str] | None = None) -> None:
        """Tell the observer how far the present phase is."""
        self._observer(Progress(phase=self.phase, done=done, total=total, unit=unit, figures=figures or {}))

    def sample_memory(self, step: int | None = None) -> None:
        """Note memory in use now."""
        step = step if step is not None else (self.steps[-1].step if self.steps else 0)
        point = MemoryPoint(step=step, phase=self.phase, seconds=round(self.seconds, 3), sample=memory_sample())
        _append(self.memory, point)
        self.write("memory", {"step": step, "phase": self.phase, **to_json(point.sample)})
        self.trackers(point)

    def on_micro_batch(self, step: int, done: int, total: int, batch: Batch) -> None:
        """Progress within a long accumulation."""
        if done < total:
            self.show(self._share * 100, 100, "%", {**self._figures, "micro-batch": f"{done}/{total}"})

    def on_step(self, record: StepRecord, progress: float) -> None:
        """An optimizer step is done."""
        _append(self.steps, record)
        self.write("step", record)
        self.trackers(record)
        self._tokens += record.tokens
        self._training_seconds += record.seconds
        self._share = progress
        if record.step % self._log_frequency == 0 or record.step == 1:
            self.sample_memory(record.step)
        sample = self.memory[-1].sample
        in_use = sample.device_reserved_bytes or sample.process_bytes
        self._figures = {
            "step": str(record.step),
            "loss": f"{record.loss:.3f}",
            "tokens/s": f"{self._tokens / max(self._training_seconds, 1e-9):,.0f}",
            "memory": format_bytes(in_use),
        }
        self.show(progress * 100, 100, "%", self._figures)

    def on_evaluation(self, step: int, result: Evaluation) -> None:
        """The held-out documents were measured."""
        point = EvaluationPoint(step=step, result=result)
        self.evaluations.append(point)
        self.write("evaluation", {"step": step, **to_json(result)})
        self.trackers(point)
        self.message(
            f"Held-out perplexity {result.perplexity:.2f} " + (f"after step {step}" if step else "before training")
        )

    def on_warning(self, message: str) -> None:
        """Something a person should read: shown, logged and kept for the record."""
        self.warnings.append(message)
        self.write("warning", {"message": message})
        self.message(message)

    def message(self, text: str) -> None:
        """A line that stays on the screen."""
        self._observer(Progress(phase=self.phase, message=text))


def _append(curve: list[Any], point: Any) -> None:
    if len(curve) >= CURVE_POINTS:
        del curve[1::2]
    curve.append(point)
