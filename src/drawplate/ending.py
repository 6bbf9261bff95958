"""Every way a command can end: three lines on the screen, whatever was raised, and a traceback only in a file.

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
from typing import TYPE_CHECKING, NoReturn

import typer

from drawplate import __version__
from drawplate.errors import StoppedSafely, StorageError, UserError
from drawplate.screen import LOG_NAME, LibraryOutput, library_output, screen
from drawplate.unexpected import raised_in, unexpected

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130
PRINTING = ("rich", "typer", "click", "drawplate.cli", "drawplate.ending", "drawplate.report")


def console(stderr: bool = False) -> Console:
    """A console that colours nothing of its own accord."""
    from rich.console import Console

    return Console(file=screen() if stderr else None, highlight=False, soft_wrap=False)


class Run:
    """What the end needs to know of the run: its folder, and whether this very run has written there."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._there_before: frozenset[str] = frozenset()

    def begins_in(self, folder: Path) -> None:
        """A new run: what lies in its folder already is not its own."""
        self.folder = folder
        with suppress(OSError):  # a folder that cannot be is refused by the run itself
            self._there_before = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()

    def goes_on_in(self, folder: Path) -> None:
        """A run that was begun before: what is there is its own."""
        self.folder, self._there_before = folder, frozenset()

    def wrote(self, name: str) -> bool:
        """Whether this run wrote that file."""
        with suppress(OSError):  # a name that no folder can have
            return self.folder is not None and name not in self._there_before and (self.folder / name).is_file()
        return False


@contextmanager
def ending() -> Iterator[Run]:
    """Turn whatever a command ends with into what is printed and the exit code."""
    run = Run()
    with library_output() as output:
        try:
            yield run
            sys.stdout.flush()  # a disk that refuses says so here, not when Python has ended
        except (typer.Exit, SystemExit, GeneratorExit):
            raise
        except UserError as error:
            _end_with(error)
        except KeyboardInterrupt:
            _end_with(_stopped(run))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, OSError) and raised_in(error).startswith(PRINTING):
                if isinstance(error, BrokenPipeError):
                    raise  # whoever read standard output has gone
                _end_with(_unprinted(error, run))
            _end_with(_unexpected(error, run, output))


def _unprinted(error: OSError, run: Run) -> UserError:
    """Standard output refuses the result, which is all that is lost of a run."""
    what = f"The result could not be printed: standard output refuses it ({error.strerror})."
    if run.folder is not None and run.wrote("report.html"):
        return StorageError(
            what,
            safe=f"The run is finished; its adapter, record and report are in {run.folder}.",
            next_step=f"Read {run.folder / 'report.html'}",
        )
    return StorageError(what, next_step="Send standard output elsewhere, then give the same command again.")


def _end_with(error: UserError) -> NoReturn:
    _print_parts(error)
    raise typer.Exit(error.exit_code) from None


def _unexpected(error: BaseException, run: Run, output: LibraryOutput) -> UserError:
    told, where = unexpected(error), _write_traceback(error, run, output)
    told.safe = "Documents, models and earlier runs are untouched."
    told.next_step += f" {where}"
    if checkpoint := _last_checkpoint(run):
        beside = "; the adapter and the report so far lie beside it" if run.wrote("record.json") else ""
        told.safe = f"The last good checkpoint is {checkpoint}{beside}."
        told.next_step += f" Go on with: drawplate resume {run.folder}"
    return told


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
            safe=f"The last good checkpoint is {_last_checkpoint(run) or run.folder}; adapter and report so far lie "
            "beside.",
            next_step=f"drawplate resume {run.folder}",
        )
    stopped = UserError(
        "Interrupted before there was anything to keep.",
        safe="Documents, models and earlier runs are untouched.",
        next_step="Give the same command again.",
    )
    stopped.exit_code = EXIT_INTERRUPTED
    return stopped


def _last_checkpoint(run: Run) -> Path | None:
    """The newest good one that this run has; none where it has none, or where they cannot be read."""
    if run.folder is None or not run.wrote("recipe.yaml"):
        return None
    try:
        from drawplate.checkpoint.write import good

        return next(iter(good(run.folder / "checkpoints", 1)), None)
    except Exception:  # it is asked on the way out of another failure, which is the one to tell of
        return None


def _write_traceback(error: BaseException, run: Run, output: LibraryOutput) -> str:
    """Into the run's log where it has begun, else into a temporary file; a sentence that names it, or says why not."""
    text = f"drawplate {__version__}: {' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    if run.folder is not None and run.wrote("recipe.yaml"):
        with suppress(OSError), (run.folder / LOG_NAME).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            return f"The log is {file.name}."
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile("wb", prefix="drawplate-traceback-", suffix=".txt", delete=False) as file,
    ):
        file.write(text.encode(errors="backslashreplace") + b"\n" + output.tail())
        return f"The log is {file.name}."
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "an unknown place"
    return f"No log could be written; it came from {place}."
