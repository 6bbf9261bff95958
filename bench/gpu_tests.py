"""Runs the tests that need a GPU and keeps what became of each, and how long the process took to end after the last.

python bench/gpu_tests.py OUT.json TEST ...        TEST: files, folders or names, and options, as pytest takes them

The file is written anew after every test, so that a time limit costs only what it cut. What a test records
(`record_property`) is kept with its outcome.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402

OUT = "DRAWPLATE_GPU_TESTS"
"""Environment variable: the file that the tests' own process writes."""
_tests: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """pytest's hook, in the process of the tests: a test was set up, called or torn down."""
    test = _tests.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
    test["seconds"] = round(test["seconds"] + report.duration, 3)
    if report.outcome != "passed" and test["outcome"] == "passed":
        failed = "failure" if report.when == "call" else "error"
        test["outcome"] = failed if report.outcome == "failed" else "skipped"
    if report.user_properties:
        test["recorded"] = dict(report.user_properties)
    if report.when == "teardown":
        _write({"last_test_ended": time.time()})


def _write(more: dict[str, Any]) -> None:
    out = Path(os.environ[OUT])
    counts = Counter(test["outcome"] for test in _tests.values())
    out.write_text(json.dumps({"counts": counts, **more, "results": [*_tests.values()]}, indent=1) + "\n")


def main() -> None:
    """Run, collect, write; fails if a test did."""
    out = Path(sys.argv[1]).resolve()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "bench.gpu_tests"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, OUT: str(out), "PYTHONPATH": paths}
    ended = subprocess.run([*command, *sys.argv[2:]], cwd=ROOT, check=False, env=settings)
    written = json.loads(out.read_text()) if out.exists() else {"counts": {}, "results": []}
    if "last_test_ended" in written:
        written["seconds_from_last_test_to_end"] = round(time.time() - written.pop("last_test_ended"), 3)
    out.write_text(json.dumps({**about(), **written}, indent=1) + "\n")
    print(written["counts"])
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
