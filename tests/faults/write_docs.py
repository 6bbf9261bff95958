"""Writes docs/faults.md from the matrix in rows.py and from the tests that hold it.

    python tests/faults/write_docs.py

A sentence in it is one that a test has seen a person being shown, and a row without a test says so.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from tests.faults.rows import ELSEWHERE, FAULTS, SEES  # noqa: E402

TARGET = ROOT / "docs" / "faults.md"
OPENING = """# What can go wrong, and what you see

Written by `python tests/faults/write_docs.py` from the tests: every sentence below is asserted by a test of its row,
and `<...>` stands for a name or a number. Tests with `control` in their names take a guard out and see the fault come
through. Those marked GPU need one. `python -m pytest tests/faults` runs them all.
"""


def rows_held() -> dict[int, list[str]]:
    """Row -> its tests as Markdown links, in the files' order."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match = re.match(r"test_row_(\d+)_(\w+)", node.name) if isinstance(node, ast.FunctionDef) else None
            if match:
                gpu = any("gpu" in ast.unparse(mark) for mark in node.decorator_list)  # type: ignore[attr-defined]
                place = path.relative_to(ROOT)
                words = match[2].replace("_", " ") + (" (GPU)" if gpu else "")
                found.setdefault(int(match[1]), []).append(f"[{words}](../{place})")
    return found


def document() -> str:
    """docs/faults.md as text."""
    tests, parts = rows_held(), [OPENING]
    for row in sorted({*FAULTS, *ELSEWHERE}):
        parts.append(f"\n## {row}. {(FAULTS | ELSEWHERE)[row]}\n")
        parts += [f"> {sentence}" + "  " for sentence in SEES.get(row, ())]
        if SEES.get(row):
            parts.append("")
        parts += [f"- {test}" for test in tests.get(row, ["No test is called after this row yet."])]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
