"""Counts the kill sweep of the tests: SIGKILL at every write, fsync and rename, and at 100 random moments.

    python bench/kill_sweep.py OUT.json [PYTEST_OPTION ...]

Runs those tests (CPU, fp32, a tiny model), each of whose runs must end with the adapter of a run that nothing happened
to, byte for byte, and keeps how many kills there were and how long they took. docs/faults.md quotes the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from tests.faults.conftest import COUNTS  # noqa: E402

ROWS = {1: "row_01_killed_at_every_write_fsync_and_rename", 2: "row_02_killed_at_random_moments"}


def main() -> None:
    """Run, sum by row, write."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.jsonl"
        tests = ["tests/faults/test_kills.py", "-k", " or ".join(ROWS.values()), *sys.argv[2:]]
        settings = {**os.environ, COUNTS: str(counts), "PYTHONPATH": os.pathsep.join(sys.path[:2])}
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, env=settings, check=True)
        lines = [json.loads(line) for line in counts.read_text().splitlines()]
    results = {
        name: {
            "row": row,
            "kills": sum(line["kills"] for line in lines if line["row"] == row),
            "seconds": round(sum(line["seconds"] for line in lines if line["row"] == row), 1),
            "all_bit_equal": True,  # or the tests would have failed
        }
        for row, name in ROWS.items()
    }
    wall = {"wall_seconds": round(time.monotonic() - began, 1)}
    Path(sys.argv[1]).write_text(json.dumps({**about(), **wall, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
