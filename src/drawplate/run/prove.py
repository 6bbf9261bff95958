"""Shows that going on is exact: replays from the checkpoint before the newest up to the newest, and compares hashes.

The replay is a process of its own that read the older checkpoint from the disk, as `resume` does; the newest was
written by a process that had not stopped in between. Equal files mean that the two trajectories are one, bit for bit.
Learning rates are those that were used, since a schedule by minutes depends on the clock. Left out: evaluations in
between, which change nothing that is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from drawplate.checkpoint.snapshot import GRADIENT_NAME, OPTIMIZER_NAME, read_about, restore, snapshot_files
from drawplate.checkpoint.write import MANIFEST_NAME, Pieces, Position, require_good
from drawplate.errors import IntegrityError, UsageError
from drawplate.model.base.adapter_config import WEIGHTS_NAME
from drawplate.model.causal_lm import CausalLM
from drawplate.recipe import Recipe
from drawplate.records import Plan, from_json
from drawplate.run.folder import RunFolder
from drawplate.run.journal import Journal
from drawplate.run.outcome import fingerprints
from drawplate.run.prepare import Prepared, prepare
from drawplate.train.loop import make_optimizer, rate_groups, train
from drawplate.train.task import TrainTask

COMPARED = (WEIGHTS_NAME, OPTIMIZER_NAME, GRADIENT_NAME)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the replay came to.

    Attributes:
        start, end: names of the two checkpoints.
        hashes: file name -> (sha256 in the newer checkpoint, sha256 of the replay).
    """

    start: str
    end: str
    hashes: dict[str, tuple[str, str]]

    @property
    def equal(self) -> bool:
        """Whether every file is."""
        return all(saved == replayed for saved, replayed in self.hashes.values())


def prove(
    folder: RunFolder,
    journal: Journal,
    load: Callable[[Prepared], CausalLM],
    task_of: Callable[[Prepared, CausalLM], TrainTask],
) -> Proof:
    """Replay the last stretch of a run; its folder is only read.

    Args:
        folder: claimed by this process.
        journal: shown the progress; its folder is not written to.
        load: gives the model of a prepared run.
        task_of: gives what it trains on.

    Raises:
        IntegrityError: no checkpoint is good, or the model or the data changed.
        UsageError: there are not two checkpoints with training in between.
    """
    found = require_good(folder.checkpoints, 2, journal.message, "There is nothing to replay.")
    if len(found) < 2:
        raise UsageError(
            f"{folder.path} has {len(found)} good checkpoints, and a replay needs two.",
            safe="Nothing was changed.",
            next_step="Train again with --set train.keep_checkpoints=true: a finished run's checkpoints are removed."
            if folder.finished
            else "Let the run go on until it has written another.",
        )
    newer, older = found
    about = read_about(older)
    recipe = Recipe.model_validate(about["recipe"])
    with journal.in_phase("read"):
        prepared = replace(prepare(recipe), plan=from_json(Plan, about["plan"]))
        now = fingerprints(prepared)
    if now != about["fingerprints"]:
        changed = ", ".join(key for key, value in about["fingerprints"].items() if now[key] != value)
        raise IntegrityError(
            f"The run is not the one that was saved: {changed} changed.",
            safe="Nothing was changed.",
            next_step="Put back what was changed, then prove again.",
        )
    with journal.in_phase("load"):
        model = load(prepared)
    with journal.in_phase("train"):
        return _replay(older, newer, task_of(prepared, model), journal)


def _replay(older: Path, newer: Path, task: TrainTask, journal: Journal) -> Proof:
    end = Position.of(newer)
    assert end is not None
    optimizer = make_optimizer(rate_groups(task.model.adapter, task.loraplus_lr_ratio), task.section)
    state = restore(older, task.model, optimizer)
    curve = read_about(newer)["journal"]["steps"]
    points = [*curve["points"], *([curve["newest"]] if curve["newest"] else [])]
    rates = {point["step"]: float(point["learning_rate"]) for point in points}
    until = (end.step, end.micro_batches)
    train(replace(task, optimizer=optimizer, until=until, rates=rates), journal, state)
    files = snapshot_files(task.model.adapter, optimizer, state, {})
    manifest = json.loads((newer / MANIFEST_NAME).read_bytes())["files"]
    hashes = {
        name: (manifest[name]["sha256"], _sha256(files[name]) if name in files else "missing")
        for name in COMPARED
        if name in manifest
    }
    return Proof(start=older.name, end=newer.name, hashes=hashes)


def _sha256(pieces: Pieces) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
