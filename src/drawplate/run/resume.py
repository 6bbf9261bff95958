"""A run that ended early, opened again: which checkpoint is good, and whether the run is still the same.

    checkpoints -> newest whose every byte is right -> its recipe, model and data against those of now -> Reopened

What changed is shown key by key, and refused unless it is accepted by name: going on with other data or another rate
is another run. Another GPU or torch is allowed and said, because it changes bits and no meaning. Where the base model
or the data were changed and that was accepted, what was measured before training is measured again.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drawplate.checkpoint.snapshot import read_about
from drawplate.checkpoint.write import finished, require_good, unfinished
from drawplate.errors import IntegrityError, UsageError
from drawplate.machine.device import machine, pick_device
from drawplate.recipe import Recipe, known_keys, load_recipe
from drawplate.records import Plan, from_json
from drawplate.run.folder import RECIPE_NAME, RunFolder
from drawplate.run.outcome import fingerprints
from drawplate.run.prepare import Prepared, prepare

MEASURED_ON = ("model", "data")
LEARNING = (
    *("precision", "double_quant", "compute_dtype", "packing", "max_length", "effective_batch_size"),
    *("optimizer_steps", "epochs", "learning_rate"),
)


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A run to go on with.

    Attributes:
        checkpoint: verified.
        about: its state.json.
        prepared: as for a new run, with the plan that the run has.
        notes: what a person should know, such as another GPU.
        measured: what was measured before training still holds.
        same: the plan and the data are those of the checkpoint, so a step that was under way can go on.
    """

    checkpoint: Path
    about: dict[str, Any]
    prepared: Prepared
    notes: tuple[str, ...]
    measured: bool
    same: bool


def recipe_of(folder: RunFolder) -> Recipe:
    """The recipe in a run's folder, with that folder as its own wherever it was moved to."""
    recipe = load_recipe(folder.path / RECIPE_NAME)
    return recipe.model_copy(update={"output_dir": str(folder.path)})


def refuse_finished(folder: RunFolder) -> None:
    """Refuse a run that has nothing left to do.

    Raises:
        UsageError: its record says that it is finished.
    """
    if folder.finished:
        raise UsageError(
            f"The run in {folder.path} is finished.",
            safe="Nothing in it was touched.",
            next_step=f"Read {folder.path}/report.html."
            + (f" To replay its end: drawplate resume {folder.path} --prove" if finished(folder.checkpoints) else ""),
        )


def reopen(folder: RunFolder, recipe: Recipe, accept: Collection[str]) -> Reopened | None:
    """The run as its newest good checkpoint has it; None where no checkpoint was ever finished.

    Args:
        folder: claimed by this process.
        recipe: from `recipe_of`.
        accept: keys whose change is accepted, like `train.learning_rate`, `model`, `data`.

    Raises:
        IntegrityError: no checkpoint is good, or the base model or the data changed.
        UsageError: the recipe changed, or a key to accept does not exist.
    """
    unknown = sorted(set(accept) - known_keys().keys() - set(MEASURED_ON))
    if unknown:
        raise UsageError(f"--accept {unknown[0]}: there is no such key.", next_step="Name a key that was shown.")
    notes = [
        f"The checkpoint {path.name} was never finished and is not used." for path in unfinished(folder.checkpoints)
    ]
    over_again = f"Start over on request: drawplate tune {folder.path}/{RECIPE_NAME} --set output_dir=ANOTHER_FOLDER"
    damaged: list[str] = []
    found = require_good(folder.checkpoints, 1, damaged.append, over_again)
    if not found:
        return None
    notes += [f"A checkpoint is damaged: {problem} The one before it is used." for problem in damaged]
    about = read_about(found[0])
    changed_keys = recipe_changes(about["recipe"], recipe)
    _refuse(folder, changed_keys, accept, UsageError)
    prepared = prepare(recipe)
    changed = _changed_inputs(about["fingerprints"], fingerprints(prepared))
    _refuse(folder, changed, accept, IntegrityError)
    notes += [f"A change was accepted when the run was resumed: {said}." for said in (changed_keys | changed).values()]
    plan, plan_notes = _plan(about, prepared)
    notes += plan_notes
    return Reopened(
        checkpoint=found[0],
        about=about,
        prepared=replace(prepared, plan=plan),
        notes=tuple(notes),
        measured=not changed,
        same=not changed and plan == from_json(Plan, about["plan"]),
    )


def recipe_changes(before: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Keys whose values differ, each with both in words, but for those that say only what is left in which folder."""
    old, new = _flat(before), _flat(recipe.model_dump(mode="json"))
    return {
        key: f"{key} is {new.get(key)!r} and was {old.get(key, new.get(key))!r}"
        for key in new
        if key not in ("output_dir", "train.keep_checkpoints") and new.get(key) != old.get(key, new.get(key))
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _changed_inputs(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    what = {
        "model": ("model", "the base model's weights"),
        "data.train": ("data", "the training documents"),
        "data.heldout": ("data", "the held-out documents"),
    }
    changes: dict[str, str] = {}
    for part, (key, name) in what.items():
        if before[part] != now[part]:
            said = f"{name} are others (sha256 {now[part][:12]} and was {before[part][:12]})"
            changes[key] = f"{changes[key]}; {said}" if key in changes else f"{key}: {said}"
    return changes


def _refuse(
    folder: RunFolder, changes: dict[str, str], accept: Collection[str], kind: type[UsageError | IntegrityError]
) -> None:
    left = {key: said for key, said in changes.items() if key not in accept}
    if left:
        raise kind(
            f"The run is not the one that was saved: {'; '.join(left.values())}.",
            safe="Nothing was changed; the checkpoints are whole.",
            next_step="Undo the change, or accept it by name: drawplate resume "
            f"{folder.path} {' '.join(f'--accept {key}' for key in [*accept, *left])}",
        )


def _plan(about: dict[str, Any], prepared: Prepared) -> tuple[Plan, list[str]]:
    """The run's own plan; on another device a new one, but for what decides what is learnt."""
    before, fresh = from_json(Plan, about["plan"]), prepared.plan
    here, notes = machine(pick_device(prepared.recipe.model.device_map)), []
    there = about["machine"]
    changed_recipe = bool(recipe_changes(about["recipe"], prepared.recipe))
    another_torch = importlib.metadata.version("torch") != about["versions"]["torch"]
    name, other = here.device_name or here.device, there["device_name"] or there["device"]
    another_device = (here.device, name, here.device_bytes) != (there["device"], other, there["device_bytes"])
    if another_device or another_torch:
        now = f"{name} with torch {torch.__version__}"
        notes.append(
            f"The run goes on on {now}, and began on {other} with torch {about['versions']['torch']}: "
            "it is no longer promised to be equal bit for bit."
        )
    if changed_recipe:
        return fresh, notes
    if another_device:
        return replace(fresh, **{name: getattr(before, name) for name in LEARNING}), notes
    return before, notes
