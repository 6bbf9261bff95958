from __future__ import annotations

import json
from typing import Any

import pytest

from bench.peers.goals import (
    DOCUMENT,
    GPU_RESULTS,
    against_itself,
    against_others,
    blocks,
    ceiling_share,
    filled,
    marked,
    packing,
)
from bench.peers.suite import PACKED, PADDED


def run(system: str, setting: str, case: str, speed: float, *, budget: float | None = None, model: str = "3b") -> Any:
    held = (budget or 30) * 2**30
    facts = {"model": model, "system": system, "setting": setting, "case": case, "budget_gib": budget}
    steps = [[100 / speed, 80 / speed], [100 / speed]]
    return {**facts, "tokens_per_second": speed, "process_device_bytes": held, "step_seconds": steps}


RESULTS = [
    run("drawplate", "bf16, all kept", "7x512", 50.0),
    run("drawplate", "fp8, all kept", "7x512", 60.0),
    run("unsloth", "bf16, no checkpointing", "7x512", 40.0),
    run("mission", "nf4", "7x512", 10.0),
    run("drawplate", "planned", "7x512", 26.0, budget=6),
    run("unsloth", "nf4", "7x512", 20.0, budget=6),
    run("drawplate", "bf16, all kept", PACKED, 19.0),
    run("drawplate", "bf16, all kept", PADDED, 10.0),
]


def test_each_goal_has_its_ratios_and_bold_is_met() -> None:
    lines = against_others(RESULTS).splitlines()
    assert lines[0].startswith("| times the speed of | goal | 3B, 7x512 | 3B, 2x2048 | 3B, 7x2048 | 8B, 7x512 |")
    cells = [line.split(" | ")[2] for line in lines[2:]]
    assert cells == ["**1.25** (1.25)", "1.50 (1.50)", "**1.30** (1.30)", "", "**5.00** (5.00)", "**6.00** (6.00)"]


def test_fastest_steps_are_compared_beside_medians() -> None:
    slowed = [{**r, "step_seconds": [[1.0, 4.0]]} if r["system"] == "unsloth" else r for r in RESULTS]
    assert "**1.25** (0.62)" in against_others(slowed)


def test_bold_is_what_reaches_its_goal_as_printed() -> None:
    assert marked(1.2462, 1.25) == "**1.25**"
    assert marked(1.2449, 1.25) == "1.24"


RATIOS = {
    "fp32, climate-padded-8-8": 1.43,
    "bf16, climate-packed-2048-8": 2.4,
    "bf16, compiled, climate-padded-8-8": 2.6,
}


def test_packing_and_the_cpu_have_rows_and_what_was_not_measured_has_none() -> None:
    record: dict[str, Any] = {"results": RESULTS}
    assert packing(RESULTS) == [("bf16", 1.9)]
    text = against_itself(record, {"ratios": RATIOS})
    assert "| 3B, climate, packed over padded, bf16 | 2 | 1.90 |" in text
    assert "| CPU, fp32, padded alike, over transformers + PEFT in fp32 | 1.3 | **1.43** |" in text
    assert "| CPU, bf16, padded alike and compiled, over transformers + PEFT in fp32 | 2.5 | **2.60** |" in text
    assert "| CPU, bf16, packed, over transformers + PEFT in fp32 | 2.5 | 2.40 |" in text
    assert "ceiling" not in text


def test_the_share_of_the_ceiling_is_of_the_products_of_the_same_run() -> None:
    results = [run("drawplate", "bf16, all kept", "2x2048", 17434.0, model="8b")]
    share = ceiling_share({"results": results, "product_flops_per_second": 794e12})
    assert share is not None
    assert 0.69 < share < 0.71
    assert ceiling_share({"results": results}) is None


def test_the_documents_tables_are_those_of_the_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    made = blocks([json.loads(path.read_text(encoding="utf-8")) for path in GPU_RESULTS])
    assert filled(text, made) == text
    assert filled(text, made | {"goals": "other"}) != text


def test_a_block_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for goals"):
        filled("no blocks here", {"goals": "text"})
