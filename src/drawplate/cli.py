"""The command line: parse, call, print, exit code. Nothing is computed here.

What a command needs is imported inside it, so that `--help` answers at once; that is the only reason for an import
inside a function. Every way a command can end is in ending.py.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drawplate import __version__
from drawplate.ending import console, ending
from drawplate.errors import EnvironmentProblem, IntegrityError
from drawplate.quiet import hush_libraries
from drawplate.screen import open_standard_streams

if TYPE_CHECKING:
    from drawplate.machine.caches import Cache
    from drawplate.machine.doctor import Check
    from drawplate.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune open language models on your own documents, on the GPU you already have.",
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in data.max_length=1024.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """The `drawplate` command. Once it has ended, another Ctrl-C changes nothing of what it says."""
    open_standard_streams()
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    with ending() as run:
        loaded = _load(recipe, set_)
        import drawplate
        from drawplate.recipe import expand
        from drawplate.report.live import LiveDisplay
        from drawplate.report.summary import summary_table

        run.begins_in(expand(loaded.output_dir))
        with LiveDisplay() as display:
            record = drawplate.tune(loaded, display)
        _print_table(summary_table(record, loaded.output_dir))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that ended early.")],
    accept: Annotated[
        list[str], typer.Option("--accept", metavar="KEY", help="Go on although this was changed; may be repeated.")
    ] = [],  # noqa: B006 - typer copies the default
    prove: Annotated[
        bool, typer.Option("--prove", help="Only replay the last stretch and compare hashes, byte for byte.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, killed or failed, from its newest good checkpoint."""
    with ending() as ended:
        import drawplate
        from drawplate.recipe import expand
        from drawplate.report.live import LiveDisplay
        from drawplate.report.summary import summary_table

        if prove:
            _print_proof(run)
            return
        ended.goes_on_in(expand(run))
        with LiveDisplay() as display:
            record = drawplate.resume(run, display, accept=accept)
        _print_table(summary_table(record, run))


def _print_proof(run: str) -> None:
    from drawplate.report.live import LiveDisplay
    from drawplate.run.tune import prove

    with LiveDisplay() as display:
        proof = prove(run, display)
    for name, (saved, replayed) in proof.hashes.items():
        sign = "=" if saved == replayed else "is not"
        print(f"{proof.end}/{name}\n  written  {saved}\n  replayed {replayed}  {sign} written")
    if not proof.equal:
        raise IntegrityError(
            f"The replay from {proof.start} to {proof.end} came to something else.",
            safe="Nothing was changed.",
            next_step="On a CPU in fp32 please report this; on a GPU some sums have no fixed order.",
        )
    print(f"Equal: from {proof.start} to {proof.end}, replayed by another process, every byte is the same.")


@app.command()
def plan(
    recipe: RecipePath,
    set_: Overrides = [],  # noqa: B006 - typer copies the default
    gpu: Annotated[str | None, typer.Option(help="Plan for a card that is not here, like 'RTX 4090'.")] = None,
    vram: Annotated[str | None, typer.Option(help="Device memory at most, like 6GiB: the same as memory.vram.")] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory at most, like 32GiB: the same as memory.ram.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what `tune` would do, need and take, and why; needs no weights and no GPU."""
    with ending():
        sizes = {"memory.vram": vram, "memory.ram": ram}
        loaded = _load(recipe, [*set_, *(f"{key}={size}" for key, size in sizes.items() if size is not None)])
        from drawplate.report.plan_view import plan_table
        from drawplate.run.tune import plan as planned

        made = planned(loaded, gpu, lambda text: print(text, file=sys.stderr, flush=True))
        _show(made, as_json, plan_table)


@app.command("eval")
def evaluate(
    model: Annotated[list[str], typer.Option(help="A folder, or a repository name on the hub; may be repeated.")],
    data: Annotated[list[str], typer.Option(help="A file or folder of documents; may be repeated.")],
    adapter: Annotated[list[str], typer.Option(help="An adapter folder in PEFT's format; may be repeated.")] = [],  # noqa: B006
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure models and adapters on the same documents, and compare each with the first."""
    with ending():
        import drawplate
        from drawplate.report.live import LiveDisplay
        from drawplate.report.summary import evaluation_table

        with LiveDisplay() as display:
            results = drawplate.evaluate(model, adapter, data, settings=set_, observer=display)
        _show(results, as_json, evaluation_table)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the hub answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what is missing, and the line that mends it."""
    with ending():
        from drawplate.machine.doctor import examine

        checks = examine(network)
        if as_json:
            _print_json(checks)
        else:
            _print_checks(checks)
        if any(check.status == "missing" for check in checks):
            raise typer.Exit(EnvironmentProblem.exit_code)


@app.command()
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove what Drawplate keeps, but what a run is using.")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that it may keep, like 20GiB, from now on; or auto.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the caches with their sizes; empty Drawplate's own, or limit them."""
    with ending():
        from drawplate.machine import caches

        if limit is not None:
            caches.set_limit(caches.parse_limit(limit, "--limit"))
        if clear:
            removed, left = caches.clear()
            if not as_json:
                print(caches.cleared_words(removed, left))
        found = [*caches.own_caches(), *caches.other_caches()]
        if as_json:
            _print_json({"caches": found, "allowed_bytes": caches.allowed_bytes()})
        else:
            _print_caches(found, caches.allowed_words())


@app.command()
def recipe() -> None:
    """Print every key of a recipe with its default and its meaning, as a recipe to start from."""
    with ending():
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


def _load(path: str, overrides: list[str]) -> Recipe:
    from drawplate.recipe import load_recipe

    return load_recipe(path, overrides)


def _show(result: Any, as_json: bool, table: Any) -> None:
    if as_json:
        _print_json(result)
    else:
        _print_table(table(result))


def _print_table(table: Any) -> None:
    from drawplate.report.summary import show

    show(table, console())


def _print_json(result: Any) -> None:
    from drawplate.records import json_text, to_json

    print(json_text(to_json(result), indent=2, encoding=sys.stdout.encoding or "ascii"))


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
    _print_table(table)


def _print_caches(found: list[Cache], allowed: str) -> None:
    """A line each, not cut to the screen's width, so that paths and commands can be copied."""
    from drawplate.report.visible import visible
    from drawplate.units import format_bytes

    for each in found:
        by = f"  (empty it: {each.cleared_by})" if each.cleared_by else ""
        print(f"{each.name:24}{format_bytes(each.bytes):>10}  {visible(each.folder + by)}")
    print(allowed)


if __name__ == "__main__":
    main()
