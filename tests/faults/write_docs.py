"""Writes docs/faults.md from the matrix in rows.py and from the tests that hold it.

    python tests/faults/write_docs.py

A sentence in it is one that a test has seen a person being shown, and a row without a test says so.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from tests.faults.rows import ELSEWHERE, FAULTS, HELD_ELSEWHERE, SEES  # noqa: E402

TARGET = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "bench" / "results"
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
    for row, tests in HELD_ELSEWHERE.items():
        found.setdefault(row, []).extend(f"[{name.replace('_', ' ')}](../{place})" for place, name in tests)
    return found


def counted() -> Iterator[str]:
    """What was counted, a line for every file of bench/results that is there."""

    def read(name: str) -> tuple[dict[str, Any], str]:
        path = RESULTS / name
        link = f"([{name}](../bench/results/{name}))"
        return (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), link

    sweep, link = read("kill-sweep-cpu.json")
    for name, part in sweep.get("results", {}).items():
        where = name.replace("_", " ").partition(" killed ")[2]
        yield f"SIGKILL {where}, CPU, fp32: {part['kills']} kills, each bit-equal, {part['seconds']:.0f} s {link}"
    for name, device in (("soak-cpu.json", "a CPU"), ("soak-h100.json", "an H100")):
        soak, link = read(name)
        if not soak:
            continue
        exact, rough = (", ".join(f"{n} {k}" for k, n in soak["faults"][run].items()) for run in ("exact", "rough"))
        equal = "equal to a clean run's"
        if not soak["equal"]:
            equal = "not byte for byte a clean run's, which on a GPU is no promise: some sums have no fixed order"
        grown = max(value for key, value in soak.items() if key.endswith("_growth_percent"))
        yield (
            f"{soak['steps']:,} optimizer steps on {device} with faults at random ({exact}): the adapter is {equal}. "
            f"With others ({rough}) it ends too. Memory grew by {grown:.1f} % at most from step 100 on {link}"
        )
    for name in ("kills-3b-h100.json", "kills-3b-2-h100.json"):
        kills, link = read(name)
        if not kills:
            continue
        seconds, share = sorted(kills["checkpoint_seconds"]), 100 * kills["checkpoint_share_at_5_minutes"]
        same = [all(value for key, value in pair.items() if key.endswith("_equal")) for pair in kills["pairs"]]
        yield (
            f"{kills['kills']} kills of a 3B in bf16 on an H100: order of data, learning rates, dropout, adapter and "
            f"optimizer equal byte for byte in {sum(same)} of {len(same)} resumed processes, the first loss to "
            f"{kills['largest_loss_relative_difference']:.1g} in all. A checkpoint of "
            f"{kills['checkpoint_bytes'] / 1e6:.0f} MB took {seconds[len(seconds) // 2]:.1f} s (median), {share:.2f} % "
            f"of five minutes {link}. {kills.get('note', '')}".rstrip()
        )
    gpu, link = read("gpu-faults-h100.json")
    if gpu:
        rows = sorted({int(n) for r in gpu["results"] for n in re.findall(r"row_(\d+)", r["test"])})
        ended = ", ".join(f"{count} {outcome}" for outcome, count in gpu["counts"].items())
        yield f"Tests of rows {', '.join(map(str, rows))} that need a GPU, on an H100: {ended} {link}"


def document() -> str:
    """docs/faults.md as text."""
    tests, parts = rows_held(), [OPENING]
    parts += ["\n## Counted\n", *(f"- {line}" for line in counted())]
    for row in sorted({*FAULTS, *ELSEWHERE}):
        parts.append(f"\n## {row}. {(FAULTS | ELSEWHERE)[row]}\n")
        parts += [f"> {sentence}" + "  " for sentence in SEES.get(row, ())]
        if SEES.get(row):
            parts.append("")
        parts += [f"- {test}" for test in tests.get(row, ["No test holds this row yet."])]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
