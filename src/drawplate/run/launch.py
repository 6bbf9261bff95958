"""How the process was started: by itself, or as one of several."""

from __future__ import annotations

import os

from drawplate.errors import UsageError

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Environment variables in which torchrun, accelerate and MPI say how many processes they started."""


def require_one_process() -> None:
    """Refuse to be one of several processes: they would all train the same run in the same folder.

    Raises:
        UsageError: a launcher started more than one.
    """
    for name in COUNTS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise UsageError(
                f"Drawplate runs as one process on one GPU, and this is one of {count} processes ({name}={count}).",
                safe="Nothing was loaded or written.",
                next_step="Start it without torchrun, accelerate or mpirun, as `drawplate tune RECIPE.yaml`; for "
                "several runs at once give each its own CUDA_VISIBLE_DEVICES and output_dir.",
            )
