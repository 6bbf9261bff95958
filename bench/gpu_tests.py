"""Runs the tests that need a GPU and keeps what became of each.

python bench/gpu_tests.py OUT.json TEST ...        TEST: files, folders or names, as pytest takes them
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402


def outcomes(report: Path) -> list[dict[str, object]]:
    """Name, outcome and seconds of every test of a JUnit file."""
    results: list[dict[str, object]] = []
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")
        name = f"{case.get('classname')}::{case.get('name')}"
        results.append({"test": name, "outcome": ended, "seconds": float(case.get("time") or 0)})
    return results


def main() -> None:
    """Run, collect, write; fails if a test did."""
    out, tests = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        ended = subprocess.run([*command, *tests], cwd=ROOT, check=False)
        results = outcomes(report)
    counts = {kind: sum(r["outcome"] == kind for r in results) for kind in sorted({str(r["outcome"]) for r in results})}
    out.write_text(json.dumps({**about(), "counts": counts, "results": results}, indent=1) + "\n")
    print(counts)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
