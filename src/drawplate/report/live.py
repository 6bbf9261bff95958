"""The run as it happens: a progress bar on a terminal, sparse plain lines anywhere else.

    with LiveDisplay() as observe:
        tune(recipe, observer=observe)

The display is never the reason that a run ends: when its output goes away (a closed terminal, `| head`) it is silent.
Time left is the phase's own pace so far, counted only while the phase is the current one, so that an evaluation in the
middle of training does not spoil the estimate.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from drawplate.records import Progress
from drawplate.report.visible import shorten, visible
from drawplate.screen import screen
from drawplate.units import format_count, format_seconds

PLAIN_SECONDS = 5.0
_NAMES = {
    "read": "Reading documents",
    "unquantized": "Measuring unquantized",
    "load": "Loading the model",
    "rehearse": "Rehearsing",
    "baseline": "Measuring before",
    "train": "Training",
    "evaluate": "Evaluating",
    "final": "Measuring after",
    "save": "Saving",
    "deployed": "Measuring as released",
}


@dataclass
class Pace:
    """How fast one phase goes: progress made and seconds spent while it was the current phase."""

    first_done: float
    done: float
    total: float
    seconds: float = 0.0

    def seconds_left(self) -> float | None:
        """At the pace so far; None before there is one or where the total is not known."""
        made = self.done - self.first_done
        if made <= 0 or self.total <= 0 or self.seconds <= 0:
            return None
        return max(0.0, self.total - self.done) * self.seconds / made


class LiveDisplay:
    """Shows `Progress` records; use as a context manager and call it with each.

    Args:
        console: where to show; default standard error's console, so that standard output stays for results.
        clock: monotonic seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(file=screen(), force_interactive=screen().isatty())
        self._clock = clock
        self._view: _TerminalView | _PlainView = (
            _TerminalView(self._console) if self._console.is_interactive else _PlainView(self._console)
        )
        self._paces: dict[str, Pace] = {}
        self._phase = ""
        self._changed_at = 0.0
        self._silent = False

    def __enter__(self) -> LiveDisplay:
        self._show(self._view.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError, SystemExit):
            self._view.stop(finished=kind is None)

    def __call__(self, progress: Progress) -> None:
        """Shows where the run is; keeps `progress.message`, if any, on the screen."""
        now = self._clock()
        if progress.message:
            self._show(lambda: self._view.keep(progress.message))
            if not (progress.done or progress.total or progress.figures):
                return  # said in passing: the phase has not started over
        pace = self._advance(progress, now)
        self._show(lambda: self._view.update(progress, pace, now))

    def _advance(self, progress: Progress, now: float) -> Pace:
        pace = self._paces.get(progress.phase)
        if pace is None or progress.done < pace.done:  # a phase that starts over, as each evaluation does
            pace = self._paces[progress.phase] = Pace(progress.done, progress.done, progress.total)
        elif progress.phase == self._phase:
            pace.seconds += now - self._changed_at
        pace.done, pace.total = progress.done, progress.total
        self._phase, self._changed_at = progress.phase, now
        return pace

    def _show(self, action: Callable[[], None]) -> None:
        if self._silent:
            return
        try:
            action()
        except (OSError, SystemExit):  # rich turns a broken pipe into SystemExit; training goes on
            self._silent = True


class _TerminalView:
    """One bar for the current phase; a finished phase leaves a line above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=20),
            _Figures(),
            console=console,
            expand=False,
            transient=True,
            redirect_stderr=screen() is sys.stderr,
        )
        self._task: TaskID | None = None
        self._last: tuple[Progress, Pace] | None = None

    def start(self) -> None:
        self._bars.start()

    def stop(self, finished: bool) -> None:
        if finished:
            self._leave_line()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._bars.stop()

    def keep(self, message: str) -> None:
        text = visible(message, keep="\n", encoding=self._console.encoding)
        self._bars.console.print(Text(text, overflow="fold"))

    def update(self, progress: Progress, pace: Pace, now: float) -> None:
        if self._last is None or self._last[0].phase != progress.phase:
            self._change_phase(progress)
        self._last = progress, pace
        assert self._task is not None
        total = progress.total if progress.total > 0 else None
        figures = describe(progress, pace, self._console.encoding)
        self._bars.update(self._task, completed=progress.done, total=total, figures=figures)

    def _change_phase(self, progress: Progress) -> None:
        self._leave_line()
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(phase_name(progress.phase), total=None, figures="")

    def _leave_line(self) -> None:
        if self._last is None:
            return
        progress, pace = self._last
        if progress.total > 0 and progress.done < progress.total:
            return  # interrupted by another phase, to be taken up again
        words = [phase_name(progress.phase), _amount(progress), *_figure_words(progress.figures)]
        if pace.seconds:
            words.append(format_seconds(pace.seconds))
        line = visible("  ".join(word for word in words if word), encoding=self._console.encoding)
        self._bars.console.print(Text(line, style="dim"))


class _Figures(ProgressColumn):
    """The text beside the bar; on a narrow terminal it goes on below instead of being cut."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")))


class _PlainView:
    """A line when the phase changes, one every PLAIN_SECONDS in a phase, and each phase's last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waiting: tuple[Progress, Pace] | None = None
        self._phase = ""
        self._printed_at = 0.0

    def start(self) -> None:
        pass

    def stop(self, finished: bool) -> None:
        self._flush()

    def keep(self, message: str) -> None:
        for line in message.splitlines():
            self._print(line)

    def update(self, progress: Progress, pace: Pace, now: float) -> None:
        if progress.phase != self._phase:
            self._flush()
        elif now - self._printed_at < PLAIN_SECONDS:
            self._waiting = progress, pace
            return
        self._phase, self._printed_at, self._waiting = progress.phase, now, None
        self._write(progress, pace)

    def _flush(self) -> None:
        if self._waiting is not None:
            self._write(*self._waiting)
            self._waiting = None

    def _write(self, progress: Progress, pace: Pace) -> None:
        text = describe(progress, pace, self._console.encoding)
        self._print(f"{phase_name(progress.phase)}: {text}" if text else phase_name(progress.phase))

    def _print(self, line: str) -> None:
        self._console.print(Text(visible(line, encoding=self._console.encoding)), soft_wrap=True, highlight=False)


def phase_name(phase: str) -> str:
    """What a person calls the phase."""
    return _NAMES.get(phase, visible(phase).capitalize())


def describe(progress: Progress, pace: Pace, encoding: str = "utf-8") -> str:
    """`34/171 steps  20 %  3 min 10 s left  loss 2.31  tokens/s 812`, of whatever is known."""
    words = [_amount(progress)]
    if progress.total > 0 and progress.unit != "%":
        words.append(f"{100 * min(1.0, progress.done / progress.total):.0f} %")
    if left := pace.seconds_left():
        words.append(f"{format_seconds(left)} left")
    words += _figure_words(progress.figures)
    return visible("  ".join(word for word in words if word), encoding=encoding)


def _amount(progress: Progress) -> str:
    if progress.unit == "%":
        return f"{progress.done:.0f} %"
    if progress.total > 0:
        amount = f"{format_count(progress.done)}/{format_count(progress.total)}"
    elif progress.done:
        amount = format_count(progress.done)
    else:
        return ""
    return f"{amount} {progress.unit}".rstrip()


def _figure_words(figures: Mapping[str, str]) -> list[str]:
    return [f"{visible(name)} {shorten(visible(value), 48)}" for name, value in figures.items()]
