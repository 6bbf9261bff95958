"""The goals of the comparison and what was reached, as Markdown: ratios of what one run measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.ceiling import ceiling
from bench.peers.suite import BUDGETS_GIB, LONG, PACKED, PADDED, PARTS, SMALL
from bench.peers.table import best_within, is_fp8, table
from bench.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT, CPU_RESULTS = ROOT / "docs" / "benchmark.md", ROOT / "bench" / "results" / "compare-cpu.json"
GPU_RESULTS = [ROOT / "bench" / "results" / f"compare-{part}-h100.json" for part in PARTS]
COLUMNS = tuple((shape, case) for shape in BUDGETS_GIB for case in (*SMALL, LONG))
RATIO_GOALS = (
    ("Unsloth's best, whole card, bf16", "unsloth", False, False, 1.25),
    ("Unsloth's best, whole card, fp8", "unsloth", False, True, 1.75),
    ("Unsloth's best within 6 GiB (3B) or 8 GiB (8B), bf16 arithmetic", "unsloth", True, False, 1.3),
    ("Unsloth's best within 6 GiB (3B) or 8 GiB (8B), fp8", "unsloth", True, True, 1.3),
    ("the mission's own stack, bf16", "mission", False, False, 4.0),
    ("the mission's own stack, fp8", "mission", False, True, 4.0),
)
"""Words, the peer, within the budgets, in fp8, the goal."""
PACKING_GOAL, CEILING_GOAL, CEILING_CASE = 2.0, 0.7, ("8b", "2x2048")
CPU_GOALS = {"fp32": 1.3, "bf16": 2.5}


def against_others(results: Sequence[dict[str, Any]]) -> str:
    """Drawplate's tokens per second over a peer's, by model and case; bold where the goal is met.

    Of medians, and in brackets of each one's fastest step: a busy host slows what is launched kernel by kernel.
    """
    names = [f"{shape.upper()}, {case}" for shape, case in COLUMNS]
    lines = [f"| times the speed of | goal | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for words, peer, within, fp8, goal in RATIO_GOALS:
        cells = []
        for shape, case in COLUMNS:
            found = [r for r in results if r["model"] == shape and (r["system"] != "drawplate" or is_fp8(r) == fp8)]
            best = best_within(found, case, BUDGETS_GIB[shape] if within else None)
            own, other = best.get("drawplate"), best.get(peer)
            if own and other:
                ratio = own["tokens_per_second"] / other["tokens_per_second"]
                cells.append(f"{marked(ratio, goal)} ({fastest(other) / fastest(own):.2f})")
            else:
                cells.append("")
        lines.append(f"| {words} | {goal:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(result: dict[str, Any]) -> float:
    """Seconds of the shortest timed step."""
    return min(seconds for answer in result["step_seconds"] for seconds in answer)


def against_itself(record: dict[str, Any], cpu: dict[str, Any]) -> str:
    """Packed against padded, the share of the card's ceiling, and the CPU."""
    rows = [
        (f"3B, climate, packed over padded, {how}", PACKING_GOAL, ratio) for how, ratio in packing(record["results"])
    ]
    share = ceiling_share(record)
    rows += [("8B, 2x2048, bf16: share of the ceiling", CEILING_GOAL, share)] if share else []
    for name, ratio in cpu.get("ratios", {}).items():
        kind, _, case = name.partition(", ")
        how = "packed" if "packed" in case else "padded alike and compiled" if "compiled" in case else "padded alike"
        rows.append((f"CPU, {kind}, {how}, over transformers + PEFT in fp32", CPU_GOALS[kind], ratio))
    lines = ["| case | goal | measured |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {words} | {goal:g} | {marked(ratio, goal)} |" for words, goal, ratio in rows)])


def packing(results: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """(bf16 or fp8, tokens per second packed over padded) of the same documents."""
    found = []
    for how in ("bf16", "fp8"):
        own = [r for r in results if r["system"] == "drawplate" and r["model"] == "3b" and is_fp8(r) == (how == "fp8")]
        best = {case: best_within(own, case, None).get("drawplate") for case in (PACKED, PADDED)}
        packed, padded = best[PACKED], best[PADDED]
        if packed and padded:
            found.append((how, packed["tokens_per_second"] / padded["tokens_per_second"]))
    return found


def ceiling_share(record: dict[str, Any]) -> float | None:
    """Of the tokens per second that the card's measured products would allow; None where either is missing."""
    shape, case = CEILING_CASE
    own = [r for r in record["results"] if r["model"] == shape and r["system"] == "drawplate" and not is_fp8(r)]
    best, rate = best_within(own, case, None).get("drawplate"), record.get("product_flops_per_second")
    if not (best and rate):
        return None
    speed: float = best["tokens_per_second"]
    return speed / ceiling(SHAPES[shape], int(case.partition("x")[2]), rate)


def marked(value: float, goal: float) -> str:
    """Two digits, bold where the goal is met as printed."""
    return f"**{value:.2f}**" if round(value, 2) >= goal else f"{value:.2f}"


def blocks(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name -> Markdown, of what DOCUMENT takes from the results; the CPU's are those of CPU_RESULTS."""
    cpu = json.loads(CPU_RESULTS.read_text(encoding="utf-8"))
    results = [result for record in records for result in record["results"]]
    rate = next((r["product_flops_per_second"] for r in records if r.get("product_flops_per_second")), None)
    joined = {"results": results, "product_flops_per_second": rate}
    return {
        "goals": f"{against_others(results)}\n\n{against_itself(joined, cpu)}",
        "tables": table({**records[0], "results": results}),
    }


def filled(text: str, found: dict[str, str]) -> str:
    """A document with its blocks, each between `<!-- NAME -->` and `<!-- end of NAME -->`, written anew.

    Raises:
        ValueError: a block has no place.
    """
    for name, block in found.items():
        before, begin, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (begin and end):
            raise ValueError(f"no place for {name}")
        text = f"{before}{begin}\n\n{block}\n\n{end}{after}"
    return text
