"""Drawplate fine-tunes open language models on a person's own documents, on the GPU they have.

`tune`, `resume`, `plan`, `evaluate` and `prepare_model` are the public door. What is behind them is imported on first
use, because it imports torch and this module must not: `drawplate --help` reads it too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drawplate.quiet import forbid_hub_code, hush_libraries

if TYPE_CHECKING:
    from drawplate.integrations.prepare_model import prepare_model
    from drawplate.recipe import Recipe
    from drawplate.records import Plan, Progress, RunRecord
    from drawplate.run.tune import evaluate

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "plan", "prepare_model", "resume", "tune"]

# Here and nowhere later: telemetry and hub kernels are decided when the libraries are imported.
forbid_hub_code()


def tune(recipe: str | Path | dict[str, Any] | Recipe, observer: Callable[[Progress], None] | None = None) -> RunRecord:
    """Measure, fine-tune, measure again; leaves the run folder `recipe.output_dir` and returns its record.

    Args:
        recipe: a YAML file, the same as a dict, or a `Recipe`.
        observer: called often with a `Progress`; None shows nothing.

    Raises:
        UserError: bad input, no room, no device and the like; its three parts say what to do.
    """
    record: RunRecord = _behind_the_door("tune")(_as_recipe(recipe), observer)
    return record


def resume(
    path: str | Path, observer: Callable[[Progress], None] | None = None, *, accept: Collection[str] = ()
) -> RunRecord:
    """Go on with a run that ended early, from its newest good checkpoint, as if it had never stopped.

    Args:
        path: the run's folder.
        observer: as for `tune`.
        accept: keys of what was changed since and is accepted: recipe keys, `model`, `data`.

    Raises:
        UserError: no good checkpoint, something changed, and whatever `tune` raises.
    """
    record: RunRecord = _behind_the_door("resume")(path, observer, accept=accept)
    return record


def plan(recipe: str | Path | dict[str, Any] | Recipe, gpu: str | None = None) -> Plan:
    """What `tune` would do, need and take, without doing it; needs only the model's configuration.

    Args:
        recipe: as for `tune`.
        gpu: name of a card to plan for that is not in this machine, like "RTX 4090".
    """
    made: Plan = _behind_the_door("plan")(_as_recipe(recipe), gpu)
    return made


def _as_recipe(source: str | Path | dict[str, Any] | Recipe) -> Recipe:
    from drawplate.recipe import Recipe, load_recipe

    return source if isinstance(source, Recipe) else load_recipe(source)


def _behind_the_door(name: str, module: str = "drawplate.run.tune") -> Any:
    hush_libraries()
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return _behind_the_door(name)
    if name == "prepare_model":
        return _behind_the_door(name, "drawplate.integrations.prepare_model")
    raise AttributeError(f"module 'drawplate' has no attribute {name!r}")
