"""What a run leaves behind while it goes: metrics.jsonl, the curves of the record, and words for whoever watches.

Times are monotonic seconds since the run began. A curve that reaches its bound keeps every second point, and from then
on takes every second one, so a run of any length keeps an even picture of itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from drawplate.data.batches import Batch
from drawplate.device import memory_sample
from drawplate.records import Evaluation, EvaluationPoint, MemoryPoint, Progress, StepRecord, to_json
from drawplate.units import format_bytes

CURVE_POINTS = 2000
METRICS_NAME = "metrics.jsonl"
Observer = Callable[[Progress], None]
Event = StepRecord | EvaluationPoint | MemoryPoint


Point = TypeVar("Point")


class Curve(Generic[Point]):
    """At most `CURVE_POINTS` evenly spaced points of a series of any length, its first and its newest among them."""

    def __init__(self) -> None:
        self.newest: Point | None = None
        self._points: list[Point] = []
        self._stride = 1
        self._added = 0

    def add(self, point: Point) -> None:
        """The next point of the series."""
        self.newest = point
        if self._added % self._stride == 0:
            self._points.append(point)
        self._added += 1
        if len(self._points) == CURVE_POINTS:
            del self._points[1::2]
            self._stride *= 2

    def __iter__(self) -> Iterator[Point]:
        """The points that are kept, in order."""
        yield from self._points
        if self._points and self._points[-1] is not self.newest:
            yield self.newest  # type: ignore[misc]


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
        self.steps: Curve[StepRecord] = Curve()
        self.evaluations: list[EvaluationPoint] = []
        self.memory: Curve[MemoryPoint] = Curve()
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
        step = step if step is not None else (self.steps.newest.step if self.steps.newest else 0)
        point = MemoryPoint(step=step, phase=self.phase, seconds=round(self.seconds, 3), sample=memory_sample())
        self.memory.add(point)
        self.write("memory", {"step": step, "phase": self.phase, **to_json(point.sample)})
        self.trackers(point)

    def on_micro_batch(self, step: int, done: int, total: int, batch: Batch) -> None:
        """Progress within a long accumulation."""
        if done < total:
            self.show(self._share * 100, 100, "%", {**self._figures, "micro-batch": f"{done}/{total}"})

    def on_step(self, record: StepRecord, progress: float) -> None:
        """An optimizer step is done."""
        self.steps.add(record)
        self.write("step", record)
        self.trackers(record)
        self._tokens += record.tokens
        self._training_seconds += record.seconds
        self._share = progress
        if record.step % self._log_frequency == 0 or record.step == 1:
            self.sample_memory(record.step)
        self._figures = {
            "step": str(record.step),
            "loss": f"{record.loss:.3f}",
            "tokens/s": f"{self._tokens / max(self._training_seconds, 1e-9):,.0f}",
            "memory": format_bytes(self._bytes_in_use()),
        }
        self.show(progress * 100, 100, "%", self._figures)

    def _bytes_in_use(self) -> int:
        if self.memory.newest is None:
            return 0
        sample = self.memory.newest.sample
        return sample.device_reserved_bytes or sample.process_bytes

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
