"""What a run leaves behind while it goes: metrics.jsonl, the curves of the record, and words for whoever watches.

Times are monotonic seconds since the run began. A curve that reaches its bound keeps every second point, and from then
on takes every second one, so a run of any length keeps an even picture of itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from drawplate.data.batches import Batch
from drawplate.errors import FULL
from drawplate.machine.memory import memory_sample
from drawplate.records import (
    Evaluation,
    EvaluationPoint,
    MemoryPoint,
    Progress,
    StepRecord,
    from_json,
    json_text,
    to_json,
)
from drawplate.units import format_bytes

CURVE_POINTS = 2000
LONGEST_LINE_BYTES = 2**16
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

    def kept(self) -> dict[str, Any]:
        """The curve as plain JSON values."""
        return {
            "points": to_json(self._points),
            "newest": to_json(self.newest),
            "added": self._added,
            "stride": self._stride,
        }

    def take_up(self, kind: type[Point], values: dict[str, Any]) -> None:
        """Become the curve that `kept` described."""
        self._points = [from_json(kind, point) for point in values["points"]]
        self._added, self._stride, self.newest = values["added"], values["stride"], None
        if values["newest"] is not None:
            self.newest = from_json(kind, values["newest"])
        if self._points and self.newest == self._points[-1]:
            self.newest = self._points[-1]


class _LineFile:
    """Appends whole lines: what a killed process left of a line is cut off, and so is a line that the disk refuses."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, LONGEST_LINE_BYTES, max(0, size - LONGEST_LINE_BYTES))
        os.ftruncate(self._descriptor, size - len(tail) + tail.rfind(b"\n") + 1)

    def write(self, line: str) -> None:
        size = os.fstat(self._descriptor).st_size
        left = memoryview(line.encode() + b"\n")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


class Journal:
    """The listener of a run; also usable without a folder, to show progress alone.

    Args:
        observer: shown each `Progress`.
        log_frequency: optimizer steps between memory samples.

    Attributes:
        trackers: told each step, evaluation and memory record.
        first_step_seconds: from the start of the run to the end of its first optimizer step.
    """

    def __init__(self, observer: Observer | None = None, *, log_frequency: int = 10) -> None:
        self._observer = observer or (lambda _: None)
        self.trackers: Callable[[Event], None] = lambda _: None
        self._log_frequency = log_frequency
        self._started = time.monotonic()
        self._file: _LineFile | None = None
        self._make_room: Callable[[], bool] = lambda: False
        self._lines_lost = 0
        self.phase = ""
        self.phase_seconds: dict[str, float] = {}
        self.steps: Curve[StepRecord] = Curve()
        self.evaluations: list[EvaluationPoint] = []
        self.memory: Curve[MemoryPoint] = Curve()
        self.warnings: list[str] = []
        self._tokens = 0
        self._training_seconds = 0.0
        self.first_step_seconds = 0.0
        self._figures: dict[str, str] = {}
        self._share = 0.0

    def open(self, folder: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        """Begin metrics.jsonl in the run's folder, or go on with it.

        `make_room` is called when the disk is full, and says whether it could free something.
        """
        self._file, self._make_room = _LineFile(folder / METRICS_NAME), make_room

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
            self._write_line(json_text(line))

    def _write_line(self, line: str) -> None:
        """Training matters more than its log: a line that the disk refuses is lost, and the first is said."""
        assert self._file is not None
        try:
            self._file.write(line)
            return
        except OSError as error:
            reason = error
        if reason.errno in FULL and self._make_room():
            self._write_line(line)
            return
        self._lines_lost += 1
        if self._lines_lost == 1:
            said = f"{METRICS_NAME} could not be written ({reason.strerror}) and misses lines; training goes on."
            self.warnings.append(said)
            self.message(said)

    def kept(self) -> dict[str, Any]:
        """What a later process needs so that its record is that of one run, as plain JSON values."""
        return {
            "seconds": self.seconds,
            "phase_seconds": dict(self.phase_seconds),
            "steps": self.steps.kept(),
            "evaluations": to_json(self.evaluations),
            "memory": self.memory.kept(),
            "warnings": list(self.warnings),
            "first_step_seconds": self.first_step_seconds,
        }

    def take_up(self, values: dict[str, Any]) -> None:
        """Go on where `kept` left off; the time since this process began is added."""
        self._started -= values["seconds"]
        for name, seconds in values["phase_seconds"].items():
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        self.take_up_curves(values)
        self.first_step_seconds = values.get("first_step_seconds", 0.0)
        self.warnings = [*values["warnings"], *self.warnings]

    def take_up_curves(self, values: dict[str, Any]) -> None:
        """Only the curves: what was measured after that moment is done again."""
        self.steps.take_up(StepRecord, values["steps"])
        self.evaluations = [from_json(EvaluationPoint, point) for point in values["evaluations"]]
        self.memory.take_up(MemoryPoint, values["memory"])

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
        self._observe(Progress(phase=self.phase, done=done, total=total, unit=unit, figures=figures or {}))

    def _observe(self, progress: Progress) -> None:
        """Whoever watches may die; the run does not."""
        try:
            self._observer(progress)
        except Exception as error:
            self._observer = lambda _: None
            said = f"The display failed ({type(error).__name__}: {error}) and shows nothing more; training goes on."
            self.warnings.append(said)
            self.write("warning", {"message": said})

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
        self.first_step_seconds = self.first_step_seconds or self.seconds
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
        return sample.device_bytes or sample.process_bytes

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
        self._observe(Progress(phase=self.phase, message=text))
