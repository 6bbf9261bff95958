"""When a run's checkpoints are written, and what becomes of the run when the disk refuses them.

By steps, by minutes, at a stop, and at both ends of training. On a full disk Drawplate's caches go first. If that is
not enough, it costs a warning: the checkpoint before is
still there, training goes on and the next due moment tries again; the third refusal in a row ends the run where it can
go on. Any other refusal (an I/O error, a folder that is gone) ends it at once: a disk that cannot be trusted is not
asked again.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from drawplate.checkpoint.snapshot import read_about, restore, snapshot_files
from drawplate.checkpoint.write import Pieces, Position, good, keep_only, problem_of, write_checkpoint
from drawplate.errors import DiskFull, StoppedSafely
from drawplate.planner.disk import CHECKPOINTS_KEPT, save_steps_of
from drawplate.run.folder import RunFolder
from drawplate.run.outcome import Outcome
from drawplate.run.prepare import Prepared
from drawplate.train.task import TrainState

KEPT = CHECKPOINTS_KEPT
REFUSALS = 3
RETRY_SECONDS = 60.0


class Saving:
    """The `Keeper` of a run.

    Args:
        folder: the run's.
        outcome: what is kept beside the training state; its model is loaded.
        optimizer: whose moments are kept.
    """

    def __init__(self, folder: RunFolder, outcome: Outcome, optimizer: torch.optim.Optimizer) -> None:
        assert outcome.model is not None
        self._folder, self._outcome, self._model, self._optimizer = folder, outcome, outcome.model, optimizer
        self._every_steps = save_steps(outcome.prepared)
        self._every_seconds = outcome.prepared.recipe.train.save_minutes * 60
        self._good = good(folder.checkpoints, KEPT)
        self._newest: Position | None = None
        self._refusals = 0
        self._saved_at = time.monotonic()

    def take_up(self, folder: Path, state: TrainState, *, same: bool = True) -> None:
        """Put adapter, optimizer and state back as a verified checkpoint has them.

        Without `same` (another plan, other data) a step that was under way begins again.
        """
        vars(state).update(vars(restore(folder, self._model, self._optimizer)))
        if same:
            self._newest = Position.of(folder)
            return
        state.begin_step_again()
        state.rate, state.cutting, state.policies = None, None, None
        self._model.set_policies(None)

    def due(self, state: TrainState) -> bool:
        """Whether it is time; never twice at the same position."""
        if Position(state.step, state.micro_batches) == self._newest:
            return False
        waited = time.monotonic() - self._saved_at
        if self._refusals:
            return waited >= min(RETRY_SECONDS, self._every_seconds)
        by_steps = state.micro_batches == 0 and state.step > 0 and state.step % self._every_steps == 0
        return by_steps or waited >= self._every_seconds

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, verify it, then remove older ones.

        Raises:
            StorageError: the disk fails.
            StoppedSafely: it was full too often.
        """
        position = Position(state.step, state.micro_batches)
        if position == self._newest:
            return
        began = time.monotonic()
        try:
            written = self._written(position, state)
        except DiskFull as error:
            self._on_full(error)
            return
        finally:
            self._saved_at = time.monotonic()
            state.saving_seconds += self._saved_at - began
        self._newest, self._refusals = position, 0
        self._good = [written, *(path for path in self._good if path != written)][:KEPT]
        keep_only(self._folder.checkpoints, self._good)
        self._outcome.journal.write("checkpoint", {"name": written.name, "seconds": round(self._saved_at - began, 3)})

    def _written(self, position: Position, state: TrainState) -> Path:
        try:
            return write_checkpoint(self._folder.checkpoints, position, self._files(state))
        except DiskFull:
            if not self._folder.release_caches():
                raise
        return write_checkpoint(self._folder.checkpoints, position, self._files(state))

    def _files(self, state: TrainState) -> dict[str, Pieces]:
        return snapshot_files(self._model.adapter, self._optimizer, state, self._outcome.kept())

    def _on_full(self, error: DiskFull) -> None:
        self._refusals += 1
        if self._refusals >= REFUSALS:
            raise StoppedSafely(
                f"{error.what} It is the third checkpoint in a row.",
                safe=self.where(),
                next_step=f"Free some space, then: drawplate resume {self._folder.path}",
            )
        self._outcome.journal.on_warning(f"{error.what} Training goes on and tries again. {self.where()}")

    def rewind(self, state: TrainState) -> bool:
        """Put everything back to the newest checkpoint that is still good; False where there is none."""
        for folder in self._good:
            if problem_of(folder) is None:
                state.go_back_to(restore(folder, self._model, self._optimizer))
                if state.policies:  # what was learnt of memory since then stays
                    self._model.set_policies(state.policies)
                self._outcome.journal.take_up_curves(read_about(folder)["journal"])
                self._newest = Position.of(folder)
                return True
        return False

    def stopped(self, why: str) -> StoppedSafely:
        """The error that ends a run which can go on."""
        return StoppedSafely(why, safe=self.where(), next_step=f"drawplate resume {self._folder.path}")

    def where(self) -> str:
        """Names the newest good checkpoint, in a sentence."""
        return where(self._good)


def where(checkpoints: list[Path]) -> str:
    """Names the first of some good checkpoints, in a sentence."""
    if not checkpoints:
        return "No checkpoint was written yet."
    return f"{str(Position.of(checkpoints[0])).capitalize()} is saved, with the optimizer's state, in {checkpoints[0]}."


def save_steps(prepared: Prepared) -> int:
    """Optimizer steps between checkpoints: as asked, else a tenth of the run."""
    return save_steps_of(prepared.recipe, prepared.plan.optimizer_steps)
