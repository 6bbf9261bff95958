"""Every way a command can end: three lines for what a person can mend, else one line and a traceback in a file.

What is printed goes through `visible`, because names of files and models are other people's. Libraries that are slow to
import are imported when something is printed, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from drawplate import __version__
from drawplate.errors import StoppedSafely, UserError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130


def console(stderr: bool = False) -> Console:
    """A console that colours nothing of its own accord."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


class Run:
    """What the end needs to know of the run: its folder, and whether this very run has written there."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._there_before: frozenset[str] = frozenset()

    def begins_in(self, folder: Path) -> None:
        """A new run: what lies in its folder already is not its own."""
        self.folder = folder
        self._there_before = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()

    def goes_on_in(self, folder: Path) -> None:
        """A run that was begun before: what is there is its own."""
        self.folder, self._there_before = folder, frozenset()

    def wrote(self, name: str) -> bool:
        """Whether this run wrote that file."""
        return self.folder is not None and name not in self._there_before and (self.folder / name).is_file()


@contextmanager
def ending() -> Iterator[Run]:
    """Turn whatever a command ends with into what is printed and the exit code."""
    run = Run()
    try:
        yield run
    except (typer.Exit, BrokenPipeError):
        raise
    except UserError as error:
        _print_parts(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        stopped = _stopped(run)
        _print_parts(stopped)
        raise typer.Exit(stopped.exit_code) from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        where = _write_traceback(error, run)
        said = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
        _print_line(f"Drawplate failed unexpectedly ({said}); the traceback is in {where}, please report it.", "red")
        raise typer.Exit(UserError.exit_code) from None


def _print_parts(error: UserError) -> None:
    for label, colour, text in (
        ("what happened", "red", error.what),
        ("what is safe", "green", error.safe or "Nothing was at risk."),
        ("what to do next", "cyan", error.next_step),
    ):
        _print_line(text, colour, f"{label:>15}: ")


def _print_line(text: str, colour: str, label: str = "") -> None:
    from rich.text import Text

    from drawplate.report.visible import visible

    line = Text.assemble((label, f"bold {colour}"), visible(text) if label else (visible(text), colour))
    console(stderr=True).print(line, soft_wrap=True)


def _stopped(run: Run) -> UserError:
    if run.wrote("record.json"):
        return StoppedSafely(
            "The run was interrupted.",
            safe=f"The last good checkpoint is {_last_checkpoint(run.folder)}; adapter and report so far lie beside.",
            next_step=f"drawplate resume {run.folder}",
        )
    stopped = UserError(
        "Interrupted before there was anything to keep.",
        safe="Documents, models and earlier runs are untouched.",
        next_step="Give the same command again.",
    )
    stopped.exit_code = EXIT_INTERRUPTED
    return stopped


def _last_checkpoint(run: Path | None) -> Path:
    from drawplate.checkpoint import good

    return next(iter(good((run or Path()) / "checkpoints", 1)), run or Path())


def _write_traceback(error: BaseException, run: Run) -> str:
    """Into the run's folder where it has begun, else into a temporary file; the path, or why there is none."""
    text = "".join(traceback.format_exception(error))
    for place in (run.folder, None) if run.wrote("recipe.yaml") else (None,):
        with (
            suppress(OSError),
            tempfile.NamedTemporaryFile(
                "w", prefix="drawplate-traceback-", suffix=".txt", dir=place, delete=False, encoding="utf-8"
            ) as file,
        ):
            file.write(f"drawplate {__version__}: {' '.join(sys.argv)}\n\n{text}")
            return file.name
    sys.stderr.write(text)
    return "the lines above, because no file could be written"
