"""The command line: parse, call, print, exit code. Nothing is computed here.

What a command needs is imported inside it, so that `--help` answers at once; that is the only reason for an import
inside a function. Every way a command can end is in `_ending`: three lines for what a person can mend, one line and a
traceback file for what only a programmer can.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drawplate import __version__
from drawplate.errors import EnvironmentProblem, StoppedSafely, UserError
from drawplate.quiet import hush_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from drawplate.doctor import Check
    from drawplate.recipe import Recipe

EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune open language models on your own documents, on the GPU you already have.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in train.num_train_epochs=1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """The `drawplate` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"drawplate {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    hush_libraries()


@app.command()
def tune(recipe: RecipePath, set_: Overrides = []) -> None:  # noqa: B006 - typer copies the default
    """Measure the base model, fine-tune it, measure again; leaves a run folder with adapter and report."""
    with _ending() as run:
        loaded = _load(recipe, set_)
        import drawplate
        from drawplate.recipe import expand
        from drawplate.report.live import LiveDisplay
        from drawplate.report.summary import summary_table

        run.folder = expand(loaded.output_dir)
        with LiveDisplay() as display:
            record = drawplate.tune(loaded, display)
        _console().print(summary_table(record, run.folder))
        if record.status == "stopped":
            raise typer.Exit(StoppedSafely.exit_code)
        if record.status == "failed":
            raise typer.Exit(UserError.exit_code)


@app.command()
def plan(recipe: RecipePath, set_: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Say what `tune` would do and need, and why, without doing it."""
    with _ending():
        loaded = _load(recipe, set_)
        import drawplate
        from drawplate.report.summary import plan_table

        made = drawplate.plan(loaded)
        _show(made, as_json, plan_table)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A folder, or a repository name on the hub.")],
    data: Annotated[list[str], typer.Option(help="A file or folder of documents; may be repeated.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter folder in PEFT's format.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's perplexity, with or without an adapter, on any documents."""
    with _ending():
        import drawplate
        from drawplate.report.summary import evaluation_table

        report = drawplate.evaluate(model, adapter, data)
        _show(report, as_json, evaluation_table)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the hub answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what is missing, and the line that mends it."""
    with _ending():
        from drawplate.doctor import examine

        checks = examine(network)
        if as_json:
            _print_json(checks)
        else:
            _print_checks(checks)
        if any(check.status == "missing" for check in checks):
            raise typer.Exit(EnvironmentProblem.exit_code)


@app.command()
def recipe() -> None:
    """Print every key of a recipe with its default and its meaning, as a recipe to start from."""
    with _ending():
        print(_described_recipe(), end="")


def _described_recipe() -> str:
    """Every key with its default and its meaning, as YAML; a required key is null, which `load_recipe` refuses."""
    import yaml
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined

    from drawplate.recipe import Recipe, known_keys

    meanings, lines = known_keys(), []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, BaseModel)
        inner = section.model_fields if is_section else {name: field}  # type: ignore[union-attr]
        if is_section:
            lines += ["", f"# {(section.__doc__ or '').splitlines()[0]}", f"{name}:"]
        for key, inner_field in inner.items():
            path, indent = (f"{name}.{key}", "  ") if is_section else (name, "")
            default = inner_field.get_default(call_default_factory=True)
            required = default is PydanticUndefined
            value = "null" if required else json.dumps(yaml.safe_load(yaml.safe_dump(default)))
            note = f"  # {'required. ' if required else ''}{meanings[path]}".rstrip(" #")
            lines.append(f"{indent}{key}: {value}{note}")
    return "\n".join(lines).strip() + "\n"


def _load(path: Path, overrides: list[str]) -> Recipe:
    from drawplate.recipe import load_recipe

    return load_recipe(path, overrides)


def _show(result: Any, as_json: bool, table: Any) -> None:
    if as_json:
        _print_json(result)
    else:
        _console().print(table(result))


def _print_json(result: Any) -> None:
    from drawplate.records import to_json

    print(json.dumps(to_json(result), indent=2, ensure_ascii=False))


def _print_checks(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from drawplate.report.visible import visible

    colours = {"ok": "green", "absent": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "What", "Found"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        found = Text(visible(check.found))
        if check.mend:
            found.append(f"\n{visible(check.mend)}", style="bold")
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), found)
    _console().print(table)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


class _Run:
    """What is known of the run when it ends badly: the folder that a traceback may be written to."""

    folder: Path | None = None


@contextmanager
def _ending() -> Iterator[_Run]:
    """Turn whatever a command ends with into what is printed and the exit code."""
    run = _Run()
    try:
        yield run
    except (typer.Exit, BrokenPipeError):
        raise
    except UserError as error:
        _print_parts(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        begun = run.folder is not None and run.folder.is_dir()
        safe = f"What was saved in {run.folder} stays." if begun else "Nothing was written."
        next_step = "Start over with --set output_dir=ANOTHER_FOLDER." if begun else "Give the same command again."
        _print_parts(UserError("Interrupted.", safe=safe, next_step=next_step))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        where = _write_traceback(error, run.folder)
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
    _console(stderr=True).print(line, soft_wrap=True)


def _write_traceback(error: BaseException, folder: Path | None) -> str:
    """Into the run's folder where it has begun, else into a temporary file; the path, or why there is none."""
    text = "".join(traceback.format_exception(error))
    begun = folder is not None and (folder / "recipe.yaml").is_file()
    for place in (folder, None) if begun else (None,):
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


if __name__ == "__main__":
    main()
