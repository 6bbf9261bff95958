"""What watches over a run from outside of its loop: signals, suspension, hangs, losses that jump.

    SIGTERM, SIGINT once    the loop ends where nothing is lost, saves, and the command exits 75
    SIGINT a second time    KeyboardInterrupt, at once; before training already the first
    SIGHUP                  nothing: a closed terminal does not end a run
    SIGSTOP, SIGCONT        the run goes on; the time between is not counted as time that it took

Left out: a hang inside the first micro-batches, of which nobody can say how long they should take.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

TICK_SECONDS = 0.5
LONGEST_TICK_SECONDS = 1.5
HANG_FACTOR = 20
LEAST_HANG_SECONDS = 60.0
BEATS_BEFORE_WATCHING = 5
BEATS_KEPT = 100
SPIKE_STEPS = 20
SPIKE_DEVIATIONS = 8.0
SPIKE_LEAST_NATS = 0.5


class StopRequested(Exception):
    """Somebody asked the run to stop while the held-out documents were measured."""


class Clock:
    """Monotonic seconds, less those in which this process was suspended; no change of the date moves it.

    A suspension is a gap between ticks of another thread that a SIGCONT ended. Without ticks or the signal (in a
    thread that is not the main one) it is plain monotonic time.
    """

    def __init__(self) -> None:
        self.suspended_seconds = 0.0
        self._ticked: float | None = None
        self._gap = 0.0
        self._continued = False

    def now(self) -> float:
        """Seconds since some moment."""
        now = time.monotonic()
        if self._continued:
            self._continued = False
            late = now - self._ticked if self._ticked is not None else 0.0
            self.suspended_seconds += late if late > LONGEST_TICK_SECONDS else self._gap
            self._gap, self._ticked = 0.0, now
        return now - self.suspended_seconds

    def tick(self) -> None:
        """Called every TICK_SECONDS by a thread of its own."""
        now = time.monotonic()
        if self._ticked is not None and now - self._ticked > LONGEST_TICK_SECONDS:
            self._gap = now - self._ticked
        self._ticked = now

    def on_continue(self, *_: Any) -> None:
        """SIGCONT came."""
        self._continued = True


class StopSignals:
    """Turns signals into a wish that the loop looks at.

    Attributes:
        requested: the signal's name, empty for none.
        graceful: training has begun, so the first signal is only noted; before, there is nothing to save.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.requested = ""
        self.graceful = False
        self._clock = clock
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {signal.SIGINT: self._on_stop, signal.SIGTERM: self._on_stop}
            handlers[signal.SIGHUP] = signal.SIG_IGN
            if self._clock:
                handlers[signal.SIGCONT] = self._clock.on_continue
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        if not self.graceful or (self.requested and number == signal.SIGINT):
            self.requested = self.requested or signal.Signals(number).name
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name

    def raise_if_requested(self) -> None:
        """Leave a measurement that can be made again.

        Raises:
            StopRequested: a signal came.
        """
        if self.requested:
            raise StopRequested(self.requested)


class Watchdog:
    """Notices that a micro-batch, or the optimizer's step after it, takes HANG_FACTOR times as long as the median.

    It counts ticks of its own thread and not the clock, so that a suspended process is not called hung.

    Args:
        clock: told every tick.
        on_hang: called in the watchdog's thread with the seconds waited and the median; it should not return.
    """

    def __init__(self, clock: Clock, on_hang: Callable[[float, float], None]) -> None:
        self._clock, self._on_hang = clock, on_hang
        self._beats: deque[float] = deque(maxlen=BEATS_KEPT)
        self._armed = False
        self._waited_ticks = 0
        self._began = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="drawplate-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._clock.tick()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self) -> None:
        """A piece of work begins that should not take long."""
        self._began, self._waited_ticks, self._armed = self._clock.now(), 0, True

    def beat(self) -> None:
        """It is done, and the next begins."""
        self._beats.append(self._clock.now() - self._began)
        self.begin()

    def rest(self) -> None:
        """It is done, and what follows may take as long as it likes."""
        self._armed = False

    def _watch(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._clock.tick()
            if not self._armed or len(self._beats) < BEATS_BEFORE_WATCHING:
                continue
            self._waited_ticks += 1
            median = statistics.median(tuple(self._beats))
            if self._waited_ticks * TICK_SECONDS > max(LEAST_HANG_SECONDS, HANG_FACTOR * median):
                self._on_hang(self._waited_ticks * TICK_SECONDS, median)
                return


def write_stacks(path: Path) -> None:
    """What every thread is doing, into a file."""
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def leave_at_once(code: int) -> None:
    """End the process without asking threads that may never answer."""
    os._exit(code)


def is_spike(losses: Sequence[float], loss: float) -> bool:
    """Whether a loss lies far above those before it: SPIKE_DEVIATIONS of their median absolute deviation.

    The median and not the mean, so that one spike does not hide the next. False for fewer than SPIKE_STEPS losses.
    """
    if len(losses) < SPIKE_STEPS:
        return False
    middle = statistics.median(losses)
    deviation = statistics.median(abs(x - middle) for x in losses)
    return loss > middle + max(SPIKE_LEAST_NATS, SPIKE_DEVIATIONS * deviation)
