"""TensorBoard, trackio, W&B and MLflow beside metrics.jsonl, through Accelerate's tracker classes.

A tracker may be slow, hang or die, and training must not notice. So each lives in a thread of its own behind a bounded
queue: an event that finds the queue full is dropped and counted, a tracker that raises is taken out, and either is one
warning. What that costs: a tracker lags behind the run by what is in its queue, and one that hangs at the end is left
after `FINISH_SECONDS`. Left out: images, artifacts and the model itself; nothing but figures leaves the machine, and
only to the trackers that the recipe names.
"""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from drawplate.errors import UsageError
from drawplate.recipe import Recipe, expand
from drawplate.records import EvaluationPoint, MemoryPoint, StepRecord

EVENTS_WAITING = 1000
FINISH_SECONDS = 20.0

Event = StepRecord | EvaluationPoint | MemoryPoint


class Tracker(Protocol):
    """What Accelerate's trackers offer, as far as it is used here."""

    def start(self) -> None:
        """Connect, or open the files."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the recipe."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Keep the figures of one step."""

    def finish(self) -> None:
        """Flush and disconnect."""


class Trackers:
    """An observer of step, evaluation and memory records: `with Trackers(...) as observe: observe(record)`.

    Args:
        trackers: name -> a function that makes the tracker; it is called in the tracker's own thread at the first
            step or evaluation (memory waits in the queue till then): before, the run may not have claimed its folder,
            and would refuse one that is not empty.
        configuration: what each tracker stores first, flat, with plain values.
        warn: called in the observing thread with one line for each tracker that failed.
    """

    def __init__(
        self, trackers: dict[str, Callable[[], Tracker]], configuration: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._workers = [_Worker(name, make, configuration) for name, make in trackers.items()]
        self._warn = warn

    def __enter__(self) -> Trackers:
        return self

    def __call__(self, event: Event) -> None:
        """Hand one record to every tracker that still works; never blocks, never raises."""
        values = figures(event)
        for worker in self._workers:
            worker.offer(values, event.step, may_begin=not isinstance(event, MemoryPoint))
        self._report_failures()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close(FINISH_SECONDS)
        self._report_failures()

    def _report_failures(self) -> None:
        for worker in self._workers:
            for line in worker.take_warnings():
                self._warn(line)


def open_trackers(recipe: Recipe, warn: Callable[[str], None]) -> Trackers:
    """The trackers that `tracking.report_to` names; those that write files write them in the run's folder.

    Raises:
        UsageError: a tracker is named whose package is not installed, or W&B without a login.
    """
    folder = expand(recipe.output_dir)
    require_installed(recipe.tracking.report_to)
    if "wandb" in recipe.tracking.report_to:
        _require_wandb_login()
    return Trackers(
        {name: _maker(name, recipe.tracking.project_name, folder) for name in recipe.tracking.report_to},
        _flat(recipe.model_dump(mode="json")),
        warn,
    )


def require_installed(names: Iterable[str]) -> None:
    """Raise before a run begins, not in the middle, where a named tracker's package is missing.

    Raises:
        UsageError: naming the package and the line that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"tracking.report_to names {name}, which is not installed.",
                safe="Nothing was loaded or written.",
                next_step=f'pip install "drawplate[{name}]", or leave {name} out: metrics.jsonl is always written.',
            )


def _require_wandb_login() -> None:
    """Without a login W&B asks for one on the terminal, in the middle of a run, where nobody sees the question.

    Raises:
        UsageError: naming the command and the setting that make it go on without a question.
    """
    if os.environ.get("WANDB_MODE", "online") != "online" or _has_wandb_login():
        return
    raise UsageError(
        "tracking.report_to names wandb, and this machine is not logged in to W&B.",
        safe="Nothing was loaded or written.",
        next_step="Run `wandb login`, or set WANDB_MODE=offline to keep the figures in files, or leave wandb out: "
        "metrics.jsonl is always written.",
    )


def _has_wandb_login() -> bool:
    """Whether one of the places where W&B looks for a login has an entry; whether it is valid only the server knows."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, ValueError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def figures(event: Event) -> dict[str, float]:
    """The numbers of a record that a tracker draws; what is not finite is left out, as trackers refuse it."""
    if isinstance(event, StepRecord):
        values = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/epoch": event.epoch,
        }
    elif isinstance(event, EvaluationPoint):
        values = {
            "heldout/loss": event.result.loss,
            "heldout/perplexity": event.result.perplexity,
            "heldout/bits_per_byte": event.result.bits_per_byte,
        }
    else:
        sample = event.sample
        values = {
            "memory/process_bytes": sample.process_bytes,
            "memory/device_allocated_bytes": sample.device_allocated_bytes,
            "memory/device_reserved_bytes": sample.device_reserved_bytes,
            "memory/device_free_bytes": sample.device_free_bytes,
        }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _maker(name: str, project: str, folder: Path) -> Callable[[], Tracker]:
    def make() -> Tracker:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # Accelerate's trackers ask it whether this is the main process
        if name == "mlflow":
            _keep_mlflow_in(folder)
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker: Tracker = kind("tensorboard" if name == "tensorboard" else project, **place)
        return tracker

    return make


def _keep_mlflow_in(folder: Path) -> None:
    """Without a server named, MLflow writes files in the run's folder: its slim package has no database backend."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlruns").absolute().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


class _Worker:
    """One tracker in its thread. `None` in the queue ends it."""

    def __init__(self, name: str, make: Callable[[], Tracker], configuration: dict[str, Any]) -> None:
        self._name = name
        self._make = make
        self._configuration = configuration
        self._events: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(EVENTS_WAITING)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"drawplate-{name}", daemon=True)
        self._started = False

    def offer(self, values: dict[str, float], step: int, *, may_begin: bool) -> None:
        if may_begin and not self._started:
            self._started = True
            self._thread.start()
        if self._started and not self._thread.is_alive():
            return
        try:
            self._events.put_nowait((values, step))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._warnings.put(f"{self._name} does not keep up; records are dropped for it, not for metrics.jsonl.")

    def close(self, timeout_seconds: float) -> None:
        if self._thread.is_alive():
            with suppress(queue.Full):  # said below: the thread is then still alive
                self._events.put(None, timeout=timeout_seconds)
            self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._warnings.put(f"{self._name} did not finish within {timeout_seconds:.0f} s and was left behind.")
        if self._dropped:
            self._warnings.put(f"{self._name} missed {self._dropped} records; metrics.jsonl has them all.")

    def take_warnings(self) -> Iterable[str]:
        while not self._warnings.empty():
            yield self._warnings.get()

    def _work(self) -> None:
        try:
            tracker = self._make()
            tracker.start()
            tracker.store_init_configuration(self._configuration)
            while (event := self._events.get()) is not None:
                tracker.log(event[0], step=event[1])
            tracker.finish()
        except Exception as error:  # whatever a tracker raises, training goes on
            said = (str(error).strip().splitlines() or [""])[0]
            self._warnings.put(
                f"{self._name} failed and gets no more records ({type(error).__name__}: {said}); training goes on."
            )
