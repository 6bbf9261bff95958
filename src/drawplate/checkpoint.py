"""What must survive a crash: the adapter as it was after a step, in a folder that is whole or is not there.

    checkpoints/step-000120/   adapter_model.safetensors and adapter_config.json (PEFT's format), state.json

A folder is filled under another name, every file in it is flushed to the disk, and then it is renamed: whoever finds
`step-000120` finds all of it. Two are kept, the newest and the one with the lowest held-out loss.

Left out: what resuming needs beside the adapter (the optimizer's moments, the loss scale, a manifest of hashes). A run
that was killed keeps what it had learnt, but cannot go on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from drawplate.errors import StorageError
from drawplate.model.adapter import Adapter

STATE_NAME = "state.json"


def save_checkpoint(
    checkpoints: Path, step: int, adapter: Adapter, facts: dict[str, Any], *, best_step: int | None = None
) -> Path:
    """Write the adapter as it is now and the facts about it, then remove what is neither the newest nor the best.

    Args:
        checkpoints: the folder of all checkpoints.
        step: optimizer steps taken.
        adapter: what is trained.
        facts: plain JSON values for state.json.
        best_step: the checkpoint to keep whatever its age.

    Raises:
        StorageError: the disk refuses; earlier checkpoints are untouched.
    """
    target = checkpoints / f"step-{step:06d}"

    def fill(folder: Path) -> None:
        adapter.save(folder)
        (folder / STATE_NAME).write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8")

    write_folder(target, fill)
    kept = {target.name} | ({f"step-{best_step:06d}"} if best_step is not None else set())
    for old in checkpoints.glob("step-*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return target


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """A folder that appears under its name only when `fill` has written all of it and the disk has it.

    A folder of that name that is there already is replaced.

    Raises:
        StorageError: the disk refuses; nothing new is under the name.
    """
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} could not be written: {getattr(error, 'strerror', None) or error}.",
            safe="What was written before it is complete.",
            next_step="Free some space on that disk, then start again.",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
